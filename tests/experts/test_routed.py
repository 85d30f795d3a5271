"""A routed mixture of adapters is, for every token, what PEFT makes of the expert that it is routed to."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from routed_models import (
    TEXT,
    adapter,
    apart,
    base,
    in_one_process,
    logits,
    mixture,
    of,
    peft,
    recipe,
    routed,
    share,
    three,
)
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModel, Trainer, TrainingArguments

from merge import run_recipe
from merge.errors import PlanError, SourceError
from merge.experts.lora.classes import asked_classes, classes_of
from merge.experts.lora.modelling import SHIPPED, core_file, is_own
from merge.pipeline import plan_recipe
from merge.sources.opening import open_model

KINDS = ("llama", "mistral", "phi3", "qwen2", "qwen3", "bert", "gpt2", "t5")
SAME = 1e-5  # of the largest logit: float32 sums in another order
OLDER = "TRANSFORMERS4"  # names a Python that has transformers 4.57


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_one_process():
        yield


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[Path, dict[str, Path], Path]]:
    """(base, adapters, mixture) of a kind of model and a place of the routers, made once."""
    known: dict[tuple[str, str], tuple[Path, dict[str, Path], Path]] = {}

    def make(kind: str, per: str = "module") -> tuple[Path, dict[str, Path], Path]:
        if (kind, per) not in known:
            if per == "module":
                folder = tmp_path_factory.mktemp(kind)
                model = base(kind, folder / "base")
                adapters = three(kind, model, folder)
            else:
                model, adapters, _ = make(kind)
                folder = tmp_path_factory.mktemp(f"{kind}-{per}")
            router = {"mode": "weights", "weights": [1, 0, 0], "top_k": 3, "per": per}
            known[kind, per] = model, adapters, mixture(folder, model, adapters, router=router)
        return known[kind, per]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_routed_to_one_expert_gets_what_peft_gives(kind: str, made: Any) -> None:
    model, adapters, folder = made(kind)
    mixed, plain = routed(folder), logits(of(model))
    for i, (name, path) in enumerate(adapters.items()):
        share(mixed, [float(i == other) for other in range(3)])
        wanted = logits(peft(model, path))
        assert apart(logits(mixed), wanted) < SAME, name
        assert apart(plain, wanted) > 100 * SAME, name


@pytest.mark.parametrize("per", ["layer", "model"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "bert"])
def test_routers_of_layers_and_of_the_model_route_all_that_is_in_them(
    kind: str, per: str, made: Any
) -> None:
    model, adapters, folder = made(kind, per)
    mixed = routed(folder)
    for i, path in enumerate(adapters.values()):
        share(mixed, [float(i == other) for other in range(3)])
        assert apart(logits(mixed), logits(peft(model, path))) < SAME
    stack = {"bert": "bert.encoder.layer"}.get(kind, "model.layers")
    wanted = [f"{stack}.{n}.router.weight" for n in range(2 if per == "layer" else 1)]
    stored = [n for n in load_file(folder / "model.safetensors") if n.endswith("router.weight")]
    assert [name for name in stored if name.startswith(stack)] == wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_fixed_shares_a_mixture_is_the_average_of_the_merged_models(
    kind: str, made: Any
) -> None:
    model, adapters, folder = made(kind)
    shares = [0.2, 0.5, 0.3]
    mixed, average = routed(folder), of(model)
    share(mixed, shares)
    merged = [peft(model, path).merge_and_unload().state_dict() for path in adapters.values()]
    average.load_state_dict(
        {name: sum(s * m[name] for s, m in zip(shares, merged, strict=True)) for name in merged[0]}
    )
    assert apart(logits(mixed), logits(average)) < SAME


def test_of_the_base_every_value_is_kept(made: Any) -> None:
    model, _, folder = made("llama")
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, values in before.items():
        module, _, leaf = name.rpartition(".")
        found = after.get(name, after.get(f"{module}.base_layer.{leaf}"))
        assert found is not None
        assert found.tobytes() == values.tobytes(), name


@pytest.mark.parametrize(
    ("kind", "per"), [("llama", "module"), ("llama", "layer"), ("phi3", "model")]
)
def test_generation_gives_the_same_tokens_with_and_without_cache(
    kind: str, per: str, made: Any
) -> None:
    mixed = routed(made(kind, per)[2])
    with torch.no_grad():  # routers that tell tokens apart
        for name, parameter in mixed.named_parameters():
            if "router" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached = mixed.generate(TEXT, use_cache=True, **options)
    assert torch.equal(cached, mixed.generate(TEXT, use_cache=False, **options))
    assert len(set(cached[0, 6:].tolist())) > 1
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TEXT[:1]], dim=1)
    batch = torch.cat([padded, torch.arange(1, 10)[None]])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    filled = mixed.generate(batch, attention_mask=mask, **options)
    assert torch.equal(filled[0, 9:], cached[0, 6:])


def test_what_is_saved_again_is_the_same(made: Any, tmp_path: Path) -> None:
    _, _, folder = made("llama")
    routed(folder).save_pretrained(tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert {n: v.tobytes() for n, v in first.items()} == {n: v.tobytes() for n, v in second.items()}
    code = "modeling_mixture.py"
    assert (tmp_path / "again" / code).read_bytes() == (folder / code).read_bytes()
    assert torch.equal(logits(routed(tmp_path / "again")), logits(routed(folder)))


def test_the_body_alone_is_routed_too(made: Any) -> None:
    for kind, body in (("llama", "model"), ("bert", "bert")):
        folder = made(kind)[2]
        alone = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            found = alone(TEXT).last_hidden_state
            wanted = getattr(routed(folder), body)(TEXT).last_hidden_state
        assert torch.equal(found, wanted)


def test_in_half_precision_routers_keep_their_float32(made: Any) -> None:
    mixed = routed(made("llama")[2], dtype=torch.bfloat16)
    dtypes = {
        name: parameter.dtype
        for name, parameter in mixed.named_parameters()
        if "router" in name or name.endswith("dora")
    }
    assert set(dtypes.values()) == {torch.float32}
    assert mixed.model.layers[0].self_attn.q_proj.lora_A.dtype == torch.bfloat16
    assert torch.isfinite(logits(mixed).float()).all()


def test_factors_are_stored_as_the_base_and_routers_in_float32(made: Any, tmp_path: Path) -> None:
    model, adapters, _ = made("llama")
    folder = mixture(tmp_path, model, adapters, out_dtype="bfloat16")
    stored = load_torch(folder / "model.safetensors")
    wide = {name for name, value in stored.items() if value.dtype == torch.float32}
    assert wide == {n for n in stored if "router" in n or n.endswith(".dora")}
    mixed = routed(folder, dtype=torch.float32)
    assert apart(logits(mixed), logits(peft(model, adapters["plain"]))) < 0.1  # 8 bits of mantissa


@pytest.mark.parametrize("per", ["module", "layer", "model"])
def test_checkpointed_gradients_are_the_same(per: str, made: Any) -> None:
    mixed = routed(made("llama", per)[2])
    mixed.requires_grad_(False)
    routers = {n: p for n, p in mixed.named_parameters() if "router.weight" in n}
    for parameter in routers.values():
        parameter.requires_grad_(True)
    share(mixed, [0.2, 0.5, 0.3])

    def gradients() -> dict[str, torch.Tensor]:
        mixed.zero_grad()
        mixed(TEXT, labels=TEXT).loss.backward()
        return {name: p.grad.clone() for name, p in routers.items() if p.grad is not None}

    plain = gradients()
    mixed.train()
    mixed.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys() == routers.keys()
    assert all(torch.allclose(plain[n], again[n], rtol=1e-4, atol=1e-8) for n in routers)
    assert any(bool(gradient.abs().max() > 0) for gradient in plain.values())


def test_a_trainer_changes_what_asks_for_gradients_alone(made: Any, tmp_path: Path) -> None:
    mixed = routed(made("llama")[2])
    for name, parameter in mixed.named_parameters():
        parameter.requires_grad_(name.endswith("router.weight"))
    share(mixed, [0.2, 0.5, 0.3])
    before = {name: p.detach().clone() for name, p in mixed.named_parameters()}
    rows = [{"input_ids": row, "labels": row, "extra": 1} for row in TEXT.repeat(4, 1)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, report_to=[], save_strategy="no", use_cpu=True,
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    Trainer(mixed, arguments, train_dataset=rows).train()
    moved = {n for n, p in mixed.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved == {name for name in before if name.endswith("router.weight")}


def test_what_routers_say_is_told_when_asked_for(made: Any) -> None:
    mixed = routed(made("llama")[2])
    code = sys.modules[type(mixed).__module__]
    logits(mixed)
    assert code.mixture_scores(mixed) == []
    mixed.config.output_router_logits = True
    for _ in range(2):
        logits(mixed)
    scores = code.mixture_scores(mixed)
    assert len(scores) == len(mixed.config.mixture["sites"])
    assert {s.shape for s in scores} == {(2, 6, 3)}
    assert all(torch.allclose(s.softmax(-1)[..., 0], torch.ones(2, 6)) for s in scores)


def test_bytes_do_not_depend_on_memory_or_threads(made: Any, tmp_path: Path) -> None:
    model, adapters, folder = made("llama")
    router = {"mode": "weights", "weights": [1, 0, 0], "top_k": 3}
    file = recipe(tmp_path, model, adapters, router=router)
    run_recipe(file, tmp_path / "other", memory="110MiB", threads=1, offline=True)
    for name in ("model.safetensors", "config.json", "modeling_mixture.py"):
        assert (tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes()


def test_what_mixes_is_told_in_the_config(made: Any) -> None:
    model, _, folder = made("llama")
    before, after = (json.loads((f / "config.json").read_text()) for f in (model, folder))
    told = after.pop("mixture")
    assert told["experts"] == ["plain", "stable", "dora"]
    q, up = (f"model.layers.0.{part}_proj" for part in ("self_attn.q", "mlp.up"))
    assert told["modules"][q] == {"ranks": [4, 2, 3], "dora": True}
    assert told["modules"][up] == {"ranks": [0, 0, 3], "dora": True}
    assert told["modules"]["model.layers.0.self_attn.v_proj"] == {"ranks": [4, 0, 0], "dora": False}
    assert after.pop("model_type") == "routed_llama"
    assert after.pop("architectures") == ["RoutedLlamaForCausalLM"]
    assert (
        after.pop("auto_map")["AutoModelForCausalLM"] == "modeling_mixture.RoutedLlamaForCausalLM"
    )
    assert after.pop("rope_theta") == 500.0  # for transformers 4
    assert after == {k: v for k, v in before.items() if k not in ("model_type", "architectures")}


def test_transformers_tells_the_same_in_a_process_of_its_own(made: Any) -> None:
    model = open_model(str(made("llama")[0]))
    assert asked_classes(model) == classes_of(model)


def test_the_modelling_file_is_known_as_our_own(made: Any) -> None:
    for kind in ("llama", "bert"):
        folder = made(kind)[2]
        config = json.loads((folder / "config.json").read_text())
        content = (folder / "modeling_mixture.py").read_bytes()
        assert is_own(content, config)
        assert not is_own(content + b"\nimport os\n", config)
        assert not is_own(content.replace(b"top_k", b"top_j", 1), config)
        assert not is_own(content, config | {"auto_map": {"AutoModel": "other.Model"}})
        assert not is_own(content, config | {"model_type": "routed_gpt2"})


def test_code_that_an_earlier_version_wrote_is_known(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("llama")[2]
    config = json.loads((folder / "config.json").read_text())
    content = (folder / "modeling_mixture.py").read_bytes()
    older = content.replace(b"import torch\n", b"import torch  # once\n", 1)
    assert not is_own(older, config)
    core = core_file().replace(b"import torch\n", b"import torch  # once\n", 1)
    known = (*SHIPPED, hashlib.sha256(core).hexdigest())
    monkeypatch.setattr("merge.experts.lora.modelling.SHIPPED", known)
    assert is_own(older, config)
    assert is_own(content, config)
    assert not is_own(older + b"\n", config)


def test_the_file_that_is_shipped_is_among_those_that_may_run() -> None:
    """Whoever changes it adds its digest to the list, below those of released versions."""
    assert hashlib.sha256(core_file()).hexdigest() == SHIPPED[-1]


# -- elsewhere -----------------------------------------------------------------------------------------

LOAD = """
import builtins, json, sys
plain = builtins.__import__
def importing(name, *rest, **more):
    assert name.split(".")[0] not in ("merge", "peft"), name
    return plain(name, *rest, **more)
builtins.__import__ = importing
import torch, transformers
folder, kind, version = sys.argv[1:]
assert transformers.__version__.startswith(version), transformers.__version__
loader = getattr(transformers, kind)
model, found = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
text = torch.tensor([[1, 5, 9, 13, 21, 34], [1, 7, 3, 39, 8, 11]])
with torch.no_grad():
    print(json.dumps(model.eval()(text).logits.double().tolist()))
"""


def _elsewhere(python: str, folder: Path, kind: str, version: str, cache: Path) -> torch.Tensor:
    """The logits that another process finds, which has nothing of this project."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-I", "-c", LOAD, str(folder), kind, version],
        capture_output=True, text=True, cwd=cache, env=kept | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def test_loads_where_this_package_is_not(made: Any, tmp_path: Path) -> None:
    _, _, folder = made("llama")
    found = _elsewhere(sys.executable, folder, "AutoModelForCausalLM", "5.", tmp_path)
    assert torch.equal(found, logits(routed(folder)))


@pytest.mark.skipif(
    OLDER not in os.environ, reason=f"{OLDER} names no Python with transformers 4.57"
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3", "qwen2", "qwen3", "bert", "gpt2"])
@pytest.mark.parametrize("per", ["module", "layer"])
def test_loads_in_transformers_4(kind: str, per: str, made: Any, tmp_path: Path) -> None:
    folder = made(kind, per)[2]
    suffix = "SequenceClassification" if kind == "bert" else "CausalLM"
    found = _elsewhere(os.environ[OLDER], folder, f"AutoModelFor{suffix}", "4.57", tmp_path)
    assert apart(found, logits(routed(folder))) < SAME


# -- what cannot be ------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_by_name(made: Any, tmp_path: Path) -> None:
    model, adapters, _ = made("llama")
    phi3 = made("phi3")[1]["plain"]
    file = recipe(tmp_path, model, {"plain": adapters["plain"], "stray": phi3})
    with pytest.raises(SourceError, match=r"qkv_proj.* lacks; it is an adapter of another base"):
        plan_recipe(file, offline=True)


BEYOND: dict[str, tuple[dict[str, Any], str]] = {
    "a module as a whole": ({"modules_to_save": ["lm_head"]}, "replaces 'lm_head.weight'"),
    "biases": ({"bias": "lora_only"}, r"replaces 'model.layers.0.self_attn.q_proj.bias'"),
    "biases of factors": ({"lora_bias": True}, r"trains the bias .*q_proj.bias' \(lora_bias\)"),
    "rows of tokens": (
        {"trainable_token_indices": [3, 5]},
        "trains rows of tokens in 'model.embed_tokens.weight'",
    ),
    "an embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        "adapts 'model.embed_tokens.weight', which is no linear layer",
    ),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_is_no_update_of_a_linear_layer_needs_a_word(
    case: str, made: Any, tmp_path: Path
) -> None:
    config, words = BEYOND[case]
    model, adapters, _ = made("qwen2")
    more = adapter(model, tmp_path / "more", 9, **{"target_modules": ["q_proj"], **config})
    experts = {"plain": adapters["plain"], "more": more}
    with pytest.raises(PlanError, match=f"recipe.yaml:.*: more {words}.*saved_modules: base"):
        plan_recipe(recipe(tmp_path, model, experts), offline=True)
    plan = plan_recipe(recipe(tmp_path, model, experts, saved_modules="base"), offline=True)
    assert any("more: what it trained of" in note and "left out" in note for note in plan.notes)
    router = {"mode": "weights", "weights": [0, 1]}
    folder = mixture(tmp_path, model, experts, saved_modules="more", router=router)
    assert apart(logits(routed(folder)), logits(peft(model, more))) < SAME


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_a_head_of_its_own_can_be_left_out_where_the_base_is_tied(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = base("tied", tmp_path / "base")
    parts = {"target_modules": ["q_proj"]} | config
    experts = {
        "more": adapter(model, tmp_path / "more", 9, **parts),
        "bare": adapter(model, tmp_path / "bare", 9, target_modules=["q_proj"]),
    }
    with pytest.raises(SourceError, match="embedding"):
        plan_recipe(recipe(tmp_path, model, experts), offline=True)
    file = recipe(tmp_path, model, experts, saved_modules="base")
    plan = plan_recipe(file, offline=True)
    assert any("lm_head" in note and "left out of the mixture" in note for note in plan.notes)
    folder = run_recipe(file, tmp_path / "out", offline=True, load=False).folder
    stored = load_file(folder / "model.safetensors")
    kept = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], kept)
    assert "lm_head.weight" not in stored


def test_a_classifier_is_taken_from_the_expert_that_is_named(made: Any, tmp_path: Path) -> None:
    model = made("bert")[0]
    config: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    experts = {
        "first": adapter(model, tmp_path / "first", 9, task_type="SEQ_CLS", **config),
        "second": adapter(model, tmp_path / "second", 10, task_type="SEQ_CLS", **config),
    }
    router = {"mode": "weights", "weights": [0, 1]}
    for named, wanted in (("second", peft(model, experts["second"])), ("base", None)):
        folder = mixture(
            tmp_path, model, experts, name=f"with-{named}", saved_modules=named, router=router
        )
        found = logits(routed(folder))
        if wanted is not None:
            assert apart(found, logits(wanted)) < SAME
        else:
            stored = load_file(folder / "model.safetensors")["classifier.weight"]
            np.testing.assert_array_equal(
                stored, load_file(model / "model.safetensors")["classifier.weight"]
            )
    with pytest.raises(PlanError, match="must be base or an expert: first, second"):
        plan_recipe(recipe(tmp_path, model, experts, saved_modules="third"), offline=True)


def test_a_grown_vocabulary_is_refused(made: Any, tmp_path: Path) -> None:
    from peft import get_peft_model

    model, adapters, _ = made("llama")
    grown = of(model)
    grown.resize_token_embeddings(44)
    get_peft_model(
        grown, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    ).save_pretrained(tmp_path / "grown")
    (tmp_path / "grown" / "tokenizer.json").write_text("{}")  # where it tells of its tokens
    experts = {"plain": adapters["plain"], "grown": tmp_path / "grown"}
    with pytest.raises(PlanError, match=r"grown has 44 rows of .*, .*base has 40"):
        plan_recipe(recipe(tmp_path, model, experts, saved_modules="base"), offline=True)


@pytest.mark.parametrize("key", ["layers", "architecture", "shared_experts", "noise_scale"])
def test_what_is_of_dense_experts_is_refused(key: str, made: Any, tmp_path: Path) -> None:
    model, adapters, _ = made("llama")
    values = {
        "layers": [0],
        "architecture": "mixtral",
        "shared_experts": [{"source_model": str(model)}],
    }
    sections: dict[str, Any] = {key: values[key]} if key in values else {}
    if not sections:
        sections["experts"] = [{"adapter": str(adapters["plain"]), key: 0.1}]
        sections["router"] = {"mode": "weights", "weights": [1.0]}
    with pytest.raises(PlanError, match=f"{key} is of the dense format"):
        plan_recipe(recipe(tmp_path, model, adapters, **sections), offline=True)


def test_a_base_that_attends_to_another_text_has_routers_of_modules_alone(
    made: Any, tmp_path: Path
) -> None:
    model, adapters, _ = made("t5")
    router = {"mode": "weights", "weights": [1, 0, 0], "per": "layer"}
    with pytest.raises(PlanError, match=r"router\.per is layer; .* it must be module"):
        plan_recipe(recipe(tmp_path, model, adapters, router=router), offline=True)


def test_a_base_whose_tensors_are_put_together_on_loading_is_refused(tmp_path: Path) -> None:
    model = base("mixtral", tmp_path / "base")
    one = adapter(model, tmp_path / "one", 4, target_modules=["q_proj"])
    with pytest.raises(PlanError, match=r"makes .* of MixtralForCausalLM from tensors of other"):
        plan_recipe(recipe(tmp_path, model, {"one": one}), offline=True)
