"""A model that does not load as its files say is found, whatever transformers says of it."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Ran
from real import SMALL, saved
from routed_models import adapter, base, in_one_process, mixture
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    T5Config,
)

import merge.experts.checks.loading
from merge.errors import RequestError, VerifyError
from merge.experts.checks.loading import (
    _check_described,
    _check_values,
    _described,
    _loaded,
    _opened,
    check_loads,
    check_loads_here,
)

MOE = {**SMALL, "num_hidden_layers": 2, "num_experts_per_tok": 2}
NARROW = {"moe_intermediate_size": 8}
KINDS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**MOE, num_local_experts=3),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **MOE, **NARROW, num_experts=3, shared_expert_intermediate_size=8, mlp_only_layers=[0]
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**MOE, **NARROW, num_experts=3),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{key: value for key, value in MOE.items() if key != "head_dim"} | {"num_key_value_heads": 4},
        **NARROW, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    ),
    "llama": lambda: LlamaConfig(**SMALL, num_hidden_layers=2, tie_word_embeddings=True),
    "t5": lambda: T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4),
    "bert": lambda: BertConfig(**SMALL, num_hidden_layers=2),
}  # fmt: skip
LOADERS = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForSequenceClassification"}
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w1.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: saved(folder / kind, config(), loader=LOADERS.get(kind, "AutoModelForCausalLM"))
        for kind, config in KINDS.items()
    }


def changed(model: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of `model` with `change` made to its tensors."""
    shutil.copytree(model, folder)
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def renamed(tensors: Tensors, before: str, after: str) -> None:
    tensors[after] = tensors.pop(before)


def refused(folder: Path, kind: type[Exception] = VerifyError) -> str:
    with pytest.raises(kind) as caught:
        check_loads_here(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_wrote_loads_to_the_bit(kind: str, models: Mapping[str, Path]) -> None:
    named = json.loads((models[kind] / "config.json").read_text())["architectures"][0]
    found = check_loads_here(models[kind])
    assert found == {"loads_as": named, "compared": True, "forward": True}


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ("experts.1.w9", EXPERT),  # no such projection
        (
            "experts.7.w1",
            EXPERT,
        ),  # transformers counts on and takes it for the last: not a word of it
        ("expert.1.w1", EXPERT),
    ],
)
def test_an_expert_under_another_name_is_told(
    models: Mapping[str, Path], tmp_path: Path, after: str, told: str
) -> None:
    other = EXPERT.replace("experts.1.w1", after)
    model = changed(models["mixtral"], tmp_path / "m", lambda t: renamed(t, EXPERT, other))
    assert told in refused(model) or other in refused(model)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_names_and_shapes_alone_tell_it_too(
    kind: str, models: Mapping[str, Path], tmp_path: Path
) -> None:
    """What is done where the free memory does not hold the values."""
    opened = _opened(models[kind])
    _check_described(opened, _described(opened, remote=False))
    name = next(n for n in opened.source.tensors if ".layers.1." in n and ".experts.1." in n)
    other = name.replace("experts.1.", "experts.7.")
    for change, told in (
        (lambda t: renamed(t, name, other), f"{name!r} is missing"),
        (lambda t: t.update({other: t[name].clone()}), f"{other!r} is not expected"),
        (lambda t: t.update({name: t[name][:-1].clone()}), f"{name!r} has shape"),
    ):
        opened = _opened(changed(models[kind], tmp_path / told[-11:].strip(), change))
        with pytest.raises(VerifyError) as caught:
            _check_described(opened, _described(opened, remote=False))
        assert told in str(caught.value)


def test_what_is_not_written_back_by_layers_is_compared_all_the_same(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where what is one tensor in files is several of other layers in memory."""
    name = "model.layers.1.input_layernorm.weight"
    opened = _opened(models["mixtral"])
    model = _loaded(opened, False, "auto")
    written = merge.experts.checks.loading._written

    def together(model: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
        found = dict(written(model, state))
        if "lm_head.weight" not in state or name not in state:
            found.pop(name, None)
        return found

    monkeypatch.setattr("merge.experts.checks.loading._written", together)
    _check_values(opened, model)
    with torch.no_grad():
        model.get_parameter(name)[3] += 1
    with pytest.raises(VerifyError, match=r"input_layernorm\.weight' has other values loaded"):
        _check_values(opened, model)


@pytest.mark.parametrize("name", [EXPERT, "model.layers.0.block_sparse_moe.gate.weight"])
def test_a_nan_is_told(name: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    model = changed(models["mixtral"], tmp_path / "m", lambda t: t[name][3:].fill_(torch.nan))
    if name == EXPERT:
        assert f"{name!r} holds NaN or infinity" in refused(model)
    else:
        model = changed(models["mixtral"], tmp_path / "n", lambda t: t[name][1, 2].fill_(torch.nan))
        assert f"{name!r} holds NaN or infinity" in refused(model)


def test_outputs_that_overflow_are_told(models: Mapping[str, Path], tmp_path: Path) -> None:
    def half(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.half()
        tensors["lm_head.weight"].fill_(6e4)

    model = changed(models["mixtral"], tmp_path / "m", half)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert "its outputs for 3 tokens are not finite" in refused(model)
    assert check_loads_here(model, forward=False)["forward"] is False


def test_a_router_of_another_dtype_than_the_rest_is_compared_after_rounding(
    models: Mapping[str, Path], tmp_path: Path
) -> None:
    def rounded(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor if name.endswith("gate.weight") else tensor.bfloat16()

    model = changed(models["mixtral"], tmp_path / "m", rounded)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert check_loads_here(model)["compared"]


def test_nothing_of_the_current_folder_runs(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "transformers", "merge"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    found = check_loads(Path(os.path.relpath(models["mixtral"])))
    assert found["loads_as"] == "MixtralForCausalLM"


# -- mixtures of adapters, which bring code --------------------------------------------------------


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    model = base("llama", folder / "base")
    adapters = {
        "first": adapter(model, folder / "first", 5, target_modules=["q_proj", "down_proj"]),
        "second": adapter(model, folder / "second", 6, target_modules=["q_proj"], use_dora=True),
    }
    with in_one_process():
        return mixture(folder, model, adapters, router={"mode": "arrow"})


@pytest.fixture
def own(routed: Path, tmp_path: Path) -> Path:
    """A copy of the mixture, to be damaged."""
    return shutil.copytree(routed, tmp_path / "own")


def test_a_mixture_of_adapters_is_loaded_by_the_code_that_came_with_it(routed: Path) -> None:
    found = check_loads(routed)
    assert found == {"loads_as": "RoutedLlamaForCausalLM", "compared": True, "forward": True}


def test_a_factor_under_another_name_is_told(routed: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.lora_A"
    model = changed(routed, tmp_path / "m", lambda t: renamed(t, name, f"{name}s"))
    assert name in refused(model)


def test_code_that_is_not_ours_runs_only_where_it_is_trusted(own: Path) -> None:
    code, trace = own / "modeling_mixture.py", own.parent / "ran"
    code.write_text(code.read_text() + f"\nopen({str(trace)!r}, 'w').close()\n")
    told = refused(own, RequestError)
    assert "modeling_mixture.py: is not what this version of mergetool writes" in told
    assert "--trust-remote-code" in told
    assert not trace.exists()
    assert check_loads(own, trusted=True)["forward"]
    assert trace.exists()


@pytest.mark.parametrize("what", ["auto_map", "custom_generate", "no file"])
def test_code_that_would_run_beside_ours_is_refused(own: Path, what: str) -> None:
    if what == "auto_map":
        config = json.loads((own / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = "other/place--modeling.Model"
        (own / "config.json").write_text(json.dumps(config))
    elif what == "custom_generate":
        (own / "custom_generate").mkdir()
        (own / "custom_generate" / "generate.py").write_text("raise SystemExit('ran')")
    else:
        (own / "modeling_mixture.py").unlink()
    assert "so it is not run" in refused(own, RequestError)


def test_the_command_says_what_was_checked(
    routed: Path, own: Path, command: Callable[..., Ran]
) -> None:
    told = command("verify", routed, "--load")
    assert told.code == 0
    assert "loads as RoutedLlamaForCausalLM; no tensor missing, none unexpected" in told.out
    assert "every bit in its place; its outputs are finite" in told.out
    (own / "mergetool.json").unlink()
    (own / "modeling_mixture.py").write_text("")
    refusal = command("verify", own, "--load")
    assert refusal.code == 2
    assert "--trust-remote-code" in refusal.error
