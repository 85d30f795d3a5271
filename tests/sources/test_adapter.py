"""A model with a LoRA adapter reads as what PEFT merges, and an adapter that does not fit is refused."""

import json
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import write_recipe
from numpy.typing import NDArray
from peft import (
    IA3Config,
    LoHaConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft_models import MODELS, WIDE, adapter, loaded, merged_by_peft, saved
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import merge.budget
from merge import run_recipe
from merge.errors import OutputError, SourceError
from merge.numerics import grain_rows, to_float32
from merge.shipped import shipped
from merge.sources.model import Model
from merge.sources.opening import open_model

MIXED = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*_proj": 5},
    "alpha_pattern": {"model.layers.0.self_attn.v_proj": 3, "^layers.1.self_attn.q_proj": 7},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "mistral, everything linear": ("mistral", {"target_modules": "all-linear"}),
    "phi3, fused modules": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "qwen2, a pattern": ("qwen2", {"target_modules": r".*layers\.1.*(q|down)_proj"}),
    "bert and its head": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "gpt2, transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2, transposed and square": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "mixed ranks": ("llama", {"target_modules": "all-linear", **MIXED}),
    "mixed ranks, rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True, **MIXED}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": (
        "llama",
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4},
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora, transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
    "positions": ("gpt2", {"target_modules": ["wpe"]}),
    "biases of all": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "biases of all and a module that has one": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_1"]},
    ),
    "biases of the adapted": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "a bias of its own": ("bert", {"target_modules": ["query"], "lora_bias": True}),
    "whole embedding and head": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "token rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 39, 0]}),
    "token rows by module": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 5]}},
    ),
    "token rows of tied": (
        "tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ),
    "tied and kept so": (
        "tied",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
}


def read(model: Model, name: str, step: int | None = None) -> NDArray[np.float32]:
    info = model.source.tensors[name]
    out = bytearray(info.nbytes)
    for first in range(0, info.rows, step or max(1, info.rows)):
        end = min(first + (step or info.rows), info.rows)
        part = memoryview(out)[first * info.row_bytes : end * info.row_bytes]
        model.source.read(name, first, end, part)
    stored = np.dtype({"F32": "<f4", "BF16": "<u2", "F16": "<f2", "F64": "<f8"}[info.dtype])
    return to_float32(np.frombuffer(out, stored), info.dtype).reshape(info.shape)


def agree(ours: NDArray[np.float32], exact: NDArray[Any]) -> None:
    """One rounding of the exact value to float32: half a unit in its last place, and a millionth for
    the sums in float64."""
    error = np.abs(ours - exact)
    assert (error <= 0.500001 * np.spacing(np.abs(exact).astype("<f4"))).all(), error.max()


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_adapter_reads_as_peft_merges_it(tmp_path: Path, case: str) -> None:
    kind, config = CASES[case]
    base = saved(MODELS[kind](), tmp_path / "base")
    own = adapter(base, tmp_path / "adapter", **config)
    expected = merged_by_peft(base, own, into=tmp_path / "merged")
    model = open_model(f"{base}+{own}")
    plain = load_file(base / "model.safetensors")
    assert model.source.tensors.keys() == expected.keys()
    changed = {name for name, value in expected.items() if not np.array_equal(value, plain[name])}
    assert changed
    for name, exact in expected.items():
        agree(read(model, name), exact)
        assert model.source.tensors[name].written == "F32"


def test_the_shipped_adapters_read_as_peft_merges_them(tmp_path: Path) -> None:
    base = shipped("evals/zoo/base")
    for own in sorted(shipped("evals/zoo/adapters").iterdir()):
        model = open_model(f"zoo:base+zoo:adapters/{own.name}")
        assert not model.notes
        assert model.public_name == f"zoo:base+zoo:adapters/{own.name}"
        for name, exact in merged_by_peft(base, own, into=tmp_path / own.name).items():
            agree(read(model, name), exact)
            assert model.source.tensors[name].written == "BF16"


def test_adapters_in_a_row_are_merged_one_after_the_other(tmp_path: Path) -> None:
    """The second adapter stands on the float32 values of the first, hence a second rounding."""
    base = saved(MODELS["llama"](), tmp_path / "base")
    one = adapter(base, tmp_path / "one", target_modules=["q_proj", "up_proj"], use_dora=True)
    two = adapter(base, tmp_path / "two", target_modules=["q_proj", "v_proj"], use_rslora=True)
    expected = merged_by_peft(base, one, two, into=tmp_path / "merged")
    model = open_model(f"{base}+{one}+{two}")
    for name, exact in expected.items():
        assert np.abs(read(model, name) - exact).max() <= np.spacing(
            np.abs(exact).max().astype("<f4")
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "use_dora": True}
    own = adapter(base, tmp_path / "adapter", dtype, **config)
    model = open_model(f"{base}+{own}")
    for name, exact in merged_by_peft(base, own, into=tmp_path / "merged").items():
        agree(read(model, name), exact)


def renamed(base: Path, rule: Callable[[str], str], more: dict[str, Any] | None = None) -> Path:
    file = base / "model.safetensors"
    save_file({rule(name): value for name, value in load_file(file).items()} | (more or {}), file)
    return base


@pytest.mark.parametrize(
    ("rule", "tower"),
    [
        (lambda name: name.removeprefix("model."), False),
        (lambda name: f"language_model.{name}", False),
        (lambda name: f"language_model.{name}", True),
    ],
)
def test_stored_names_may_begin_otherwise_than_modules(
    tmp_path: Path, rule: Callable[[str], str], tower: bool
) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    own = adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["norm"])
    expected = merged_by_peft(base, own, into=tmp_path / "merged")
    same = "vision_tower.layers.0.self_attn.q_proj.weight"
    more = {same: expected["model.layers.0.self_attn.q_proj.weight"].astype("<f4")} if tower else {}
    model = open_model(f"{renamed(base, rule, more)}+{own}")
    for name, exact in expected.items():
        agree(read(model, rule(name)), exact)
    assert model.source.tensors.keys() == {*map(rule, expected), *more}


def test_a_name_that_fits_two_tensors_is_refused(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    own = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    twin = {f"b.{name}": value for name, value in load_file(base / "model.safetensors").items()}
    assert "may belong to 'a.model.layers.0" in refusal(
        renamed(base, lambda n: f"a.{n}", twin), own
    )


def test_every_tensor_of_the_adapter_is_used_or_named(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    own = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = own / "adapter_model.safetensors"
    whole = load_file(file)
    prefix = "base_model.model.model.layers.0.self_attn"
    for name, part in (
        ("q_proj.lora_B.weight", "stands alone"),
        ("q_proj.lora_A.weight", "stands alone"),
    ):
        save_file({k: v for k, v in whole.items() if k != f"{prefix}.{name}"}, file)
        assert part in refusal(base, own)
    for name in ("q_proj.lora_C.weight", "z_proj.weight", "q_proj.lora_magnitude_vector"):
        save_file(whole | {f"{prefix}.{name}": np.ones((16, 3), "<f4")}, file)
        assert f"{prefix}.{name}" in refusal(base, own)
    twin = f"{prefix}.q_proj.lora_A.weight"
    save_file(whole | {f"{twin}.weight": whole[twin]}, file)
    assert "are the same" in refusal(base, own)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("r", 4, "has shape [3, 16], but [4, 16] would fit"),
        ("r", 0, "r is '0'"),
        ("r", True, "r is 'True'"),
        ("lora_alpha", "8", "lora_alpha is '8'"),
        ("lora_alpha", float("nan"), "lora_alpha is 'nan'"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern 'q_proj' is '-1'"),
        ("rank_pattern", [1], "rank_pattern is not a table"),
        ("alpha_pattern", {"(a+)+": 1}, "alpha_pattern has '(a+)+'; name the modules"),
        ("rank_pattern", {".?" * 90 + "!": 3}, "name the modules"),
        ("rank_pattern", {f"layers.{i}": 3 for i in range(1001)}, "1001 patterns; at most 1000"),
        ("alpha_pattern", {"(": 1}, "alpha_pattern has '('"),
        ("alpha_pattern", {"(?i)q": 1}, "alpha_pattern has '(?i)q'"),
        ("use_dora", True, "has no lora_magnitude_vector"),
        ("trainable_token_indices", ["1"], "lists of token numbers"),
        ("some_new_kind", {"of": "adapter"}, "'some_new_kind' is"),
        ("new\nline", 1, r"'new\nline' is '1'"),
        ("peft_type", None, "peft_type is None"),
    ],
)
def test_a_config_that_lies_is_refused(tmp_path: Path, key: str, value: Any, part: str) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    own = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    assert part in refusal(base, own)


def test_an_adapter_trained_on_another_model_is_noted(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    own = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert not open_model(f"{base}+{own}").notes
    config = json.loads((own / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "lab/other"
    (own / "adapter_config.json").write_text(json.dumps(config))
    model = open_model(f"{base}+{own}")
    assert model.notes == ("base+adapter: the adapter was trained on 'lab/other'",)
    assert own / "adapter_config.json" in model.files()


def test_hub_adapters_are_fetched_by_their_own_rule(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    own = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    asked: list[tuple[str, str | None]] = []

    def fetch(folder: Path, repo: str, revision: str | None) -> tuple[Path, str]:
        asked.append((repo, revision))
        return folder, f"commit of {repo}"

    label = "lab/base@v1+lab/adapter@v2"
    model = open_model(label, fetch=partial(fetch, base), fetch_adapter=partial(fetch, own))
    assert asked == [("lab/base", "v1"), ("lab/adapter", "v2")]
    assert model.label == model.public_name == label
    assert model.commit == "commit of lab/base+commit of lab/adapter"
    with pytest.raises(SourceError, match="'lab/adapter@v2': no such folder"):
        open_model(label, fetch=partial(fetch, base))


def test_a_label_is_split_at_pluses_that_no_folder_has(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "c++" / "base")
    own = adapter(base, tmp_path / "c++" / "a+b", target_modules=["q_proj"])
    assert open_model("base", [base.parent]).public_name == "base"
    model = open_model("base+a+b+a+b", [base.parent])
    assert model.public_name == "base+a+b+a+b"
    assert model.beside.count(own / "adapter_model.safetensors") == 2
    assert open_model(f"{base}+{own}").public_name == "base+a+b"
    for label, part in (
        ("base+", "nothing before or after"),
        ("+base", "nothing"),
        ("a+b", "is an adapter"),
    ):
        with pytest.raises(SourceError, match=part):
            open_model(label, [base.parent])


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_with_adapters_has_the_same_bytes_whatever_threads_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    wide = {"hidden_size": 192, "intermediate_size": 3000, "vocab_size": 3000}
    base = saved(other(**wide), tmp_path / "base").rename(tmp_path / "named")
    linear = {"target_modules": "all-linear", "r": 8}
    one = adapter(base, tmp_path / "one", **linear, use_dora=True)
    two = adapter(base, tmp_path / "two", torch.bfloat16, **linear, use_rslora=True)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        models={f"named+{one.name}": {"weight": 0.4}, f"named+{two.name}": {"weight": 0.8}},
        merge_method=method,
        out_dtype="bfloat16",
        **({"base_model": "named"} if method == "ties" else {}),
    )
    outputs = []
    for threads, block in ((1, 4 << 20), (4, 4 << 20), (3, 1)):
        monkeypatch.setattr(merge.budget, "BLOCK", block)
        out = tmp_path / f"out{len(outputs)}"
        run_recipe(recipe, out, threads=threads)
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    assert run_recipe(recipe, tmp_path / "out0").existed
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    with pytest.raises(OutputError, match="of another recipe or of other models"):
        run_recipe(recipe, tmp_path / "out0")


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_rows_do_not_depend_on_what_is_read_with_them(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """Also not on the threads that BLAS would like to use, nor on how often factors are loaded anew."""
    wide = {"n_embd": 512, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**wide, bos_token_id=1, eos_token_id=2))
    base = saved(model, tmp_path / "base")
    own = adapter(base, tmp_path / "adapter", target_modules=["c_fc", "c_proj", "c_attn"], **config)
    names = [
        f"transformer.h.{i}.mlp.{layer}.weight" for i in (0, 1) for layer in ("c_fc", "c_proj")
    ]

    def all_rows(grains: int) -> list[bytes]:
        opened = open_model(f"{base}+{own}")
        jobs = [(name, grains * grain_rows(opened.source.tensors[name].shape)) for name in names]
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda job: read(opened, *job).tobytes(), jobs * 3))

    with threadpool_limits(4):
        expected = all_rows(1)
    assert expected[:4] * 3 == expected
    with threadpool_limits(1):
        assert all_rows(2) == expected
    assert all_rows(3) == expected


TIED, UNTIED = "embedding and head", "its embedding is its head"
NO_FIT = "an adapter of another base"


@pytest.mark.parametrize(
    ("kind", "config", "part"),
    [
        ("tied", {"target_modules": ["embed_tokens"]}, TIED),
        ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, UNTIED),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, TIED),
        ("tied", {"target_modules": ["lm_head"]}, UNTIED),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, UNTIED),
        ("gpt2", {"target_modules": ["wte"]}, TIED),
        ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, "q_proj.bias"),
        (
            "llama",
            {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa'",
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
            "init_lora_weights is 'olora'",
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "alora_invocation_tokens": [1, 2]},
            "alora_invocation_tokens",
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]},
            "layer_replication",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tmp_path: Path, kind: str, config: dict[str, Any], part: str
) -> None:
    base = saved(MODELS[kind](), tmp_path / "base")
    assert part in refusal(base, adapter(base, tmp_path / "adapter", **config))


def refusal(base: Path, own: Path) -> str:
    """The one line that is said of an adapter; no values are read for it."""
    for file in own.glob("*.safetensors"):
        file.rename(own / "values")
        header = (own / "values").read_bytes()
        size = 8 + int.from_bytes(header[:8], "little")
        file.write_bytes(header[:size])
        with file.open("r+b") as stream:
            stream.truncate(len(header))
    with pytest.raises(SourceError) as caught:
        open_model(f"{base}+{own}")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(target_modules=["q_proj"]),
        VeraConfig(target_modules=["q_proj"]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_other_kinds_of_adapter_are_refused_by_name(tmp_path: Path, config: Any) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    get_peft_model(loaded(base), config).save_pretrained(tmp_path / "adapter")
    assert f"peft_type is {config.peft_type.value!r}" in refusal(base, tmp_path / "adapter")


def other(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**WIDE, **changes}))


@pytest.mark.parametrize(
    ("changes", "config", "part"),
    [
        ({"hidden_size": 32}, {"target_modules": ["q_proj"]}, NO_FIT),
        ({"intermediate_size": 20}, {"target_modules": ["up_proj"]}, NO_FIT),
        (
            {"num_hidden_layers": 1},
            {"target_modules": ["q_proj"]},
            "'model.layers.1.self_attn.q_proj.weight'",
        ),
        (
            {"vocab_size": 36},
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "has shape [40, 16], but [36, 16] would fit",
        ),
        (
            {"vocab_size": 36},
            {"target_modules": ["q_proj"], "trainable_token_indices": [38]},
            "trains token 38, but 'model.embed_tokens.weight'",
        ),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, changes: dict[str, Any], config: dict[str, Any], part: str
) -> None:
    own = adapter(saved(other(), tmp_path / "trained"), tmp_path / "adapter", **config)
    message = refusal(saved(other(**changes), tmp_path / "base"), own)
    assert part in message
    assert "vocabulary was resized" in message or "modules_to_save" not in config


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
@pytest.mark.parametrize("kind", ["c_fc", "wpe"])
def test_reading_takes_no_more_memory_than_is_told(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    wide = {"n_embd": 512, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 2000}
    base = saved(
        GPT2LMHeadModel(GPT2Config(**wide, bos_token_id=1, eos_token_id=2)), tmp_path / "base"
    )
    own = adapter(base, tmp_path / "adapter", target_modules=[kind], r=32, **config)
    source = open_model(f"{base}+{own}").source
    name = {"c_fc": "transformer.h.0.mlp.c_fc.weight", "wpe": "transformer.wpe.weight"}[kind]
    info = source.tensors[name]
    out = bytearray(info.nbytes)
    tracemalloc.start()
    source.read(name, 0, info.rows, memoryview(out))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert info.rows > grain_rows(info.shape)
    assert peak <= source.scratch(name, info.rows) + source.held
