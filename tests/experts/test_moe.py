"""Dense models as experts of stock mixtures: read by transformers, against the dense models and by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_models import CONFIGS, LAYERS, dense, logits, mixed, written
from families import contents
from grounds import tokenized
from peft_models import adapter, merged_by_peft
from real import LLAMA, generated, loaded, saved
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

from merge.budget import PER_INPUT, make_budget
from merge.errors import PlanError, RequestError
from merge.experts.stock.families import DENSE, setting
from merge.pipeline import plan_recipe, run_recipe

EXACT = 1e-5  # of logits of a few units in float32: what another order of the same sums leaves
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the results in this process, where it is imported already: the check that each run
    ends with would import it anew each time."""
    monkeypatch.setattr("merge.pipeline.check_loads", lambda folder, **_: {}, raising=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def rewritten(folder: Path, changes: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> None:
    """config.json with other values, and without some keys."""
    config = {key: value for key, value in told(folder).items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config | changes))


def mlp(tensors: Tensors, prefix: str, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """An MLP by hand."""
    gate, up, down = (tensors[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return scale * (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def closest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# -- the same as the dense model -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3", "long-phi3", "qwen2", "qwen3"])
def test_one_expert_is_the_dense_model(kind: str, tmp_path: Path) -> None:
    dense(tmp_path, kind, "base")
    found = loaded(mixed(tmp_path, ["base"], router={"top_k": 1}).folder)
    before = loaded(tmp_path / "base")
    assert type(found) is not type(before)
    assert closest(logits(found), logits(before)) <= EXACT
    if kind != "long-phi3":
        assert generated(found) == generated(before)


def test_where_a_long_phi3_would_begin_its_cache_anew_is_noted(tmp_path: Path) -> None:
    dense(tmp_path, "long-phi3", "base")
    plan = plan_recipe(written(tmp_path, ["base"] * 2, gate_mode="random"))
    lost = "mixtral keeps its cache where phi3 begins a new one, as a text grows beyond 8 tokens"
    assert [note for note in plan.notes if note.startswith(lost)]


@pytest.mark.parametrize("mode", ["random", "uniform_random", "uniform"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_two_identical_experts_are_the_dense_model(kind: str, mode: str, tmp_path: Path) -> None:
    dense(tmp_path, kind, "base")
    found = loaded(mixed(tmp_path, ["base", "base"], router={"mode": mode}).folder)
    assert closest(logits(found), logits(loaded(tmp_path / "base"))) <= EXACT


@pytest.mark.parametrize(
    "kind", ["llama", "wide-mistral", "phi3", "part-phi3", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3"]
)  # fmt: skip
def test_identical_experts_of_deepseek_are_the_dense_model(kind: str, tmp_path: Path) -> None:
    dense(tmp_path, kind, "base")
    experts, router = ["base"] * 3, {"top_k": 3 if kind == "deepseek_v2" else 2}
    result = mixed(tmp_path, experts, router=router, architecture="deepseek")
    assert closest(logits(loaded(result.folder)), logits(loaded(tmp_path / "base"))) <= EXACT
    assert any("one of zeros is written" in note for note in result.plan.notes)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "deepseek_v3"])
def test_other_layers_keep_their_mlp(kind: str, tmp_path: Path) -> None:
    dense(tmp_path, kind, "base", "other")
    found = mixed(tmp_path, ["base", "base"], layers=[1]).folder
    before, after = weights(tmp_path / "base"), weights(found)
    assert torch.equal(before[key := "model.layers.0.mlp.up_proj.weight"], after[key])
    assert not any(name.startswith("model.layers.0.mlp.experts") for name in after)
    assert closest(logits(loaded(found)), logits(loaded(tmp_path / "base"))) <= EXACT


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("architecture", [None, "deepseek"])
def test_what_config_json_leaves_to_the_class_stays_so(
    kind: str, architecture: str | None, tmp_path: Path
) -> None:
    """A mixture's class takes other rotations, norms and windows than the dense one where none are said."""
    silent = ("rope_theta", "rope_parameters", "rms_norm_eps", "hidden_act", "tie_word_embeddings")
    dense(
        tmp_path,
        kind if (kind, architecture) != ("mistral", "deepseek") else "wide-mistral",
        "base",
    )
    rewritten(tmp_path / "base", {}, without=silent)
    keys = {"architecture": architecture} if architecture else {}
    found = loaded(mixed(tmp_path, ["base", "base"], **keys).folder)
    assert closest(logits(found), logits(loaded(tmp_path / "base"))) <= EXACT


@pytest.mark.parametrize(
    "kind", sorted({kind for kind in DENSE if not kind.startswith("deepseek")})
)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    loader = CONFIG_MAPPING[kind]
    for key, value in DENSE[kind].items():
        default = (
            loader().rope_parameters[key] if key == "rope_theta" else getattr(loader, key, None)
        )
        assert value == default, key


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek"])
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_scaled_rotations_are_told_to_old_and_new_transformers(
    form: str, architecture: str, tmp_path: Path
) -> None:
    dense(tmp_path, "llama", "base")
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }  # fmt: skip
    old = {"rope_theta": 700.0, "rope_scaling": scaling}
    new = {"rope_parameters": {**scaling, "rope_theta": 700.0}}
    forms = ("rope_theta", "rope_scaling", "rope_parameters")
    rewritten(tmp_path / "base", old if form == "rope_scaling" else new, without=forms)
    folder = mixed(tmp_path, ["base", "base"], architecture=architecture).folder
    assert closest(logits(loaded(folder)), logits(loaded(tmp_path / "base"))) <= EXACT
    assert told(folder)["rope_theta"] == 700.0
    assert told(folder)["rope_scaling"] == scaling


def test_everything_but_the_mlps_is_the_bases(tmp_path: Path) -> None:
    dense(tmp_path, "qwen3", "base", "a", "b")
    before, after = weights(tmp_path / "base"), weights(mixed(tmp_path, ["a", "b"]).folder)
    kept = {name for name in before if ".mlp." not in name}
    assert kept
    for name in kept:
        assert torch.equal(before[name], after[name]), name
    for number, name in enumerate("ab"):
        for key, value in weights(tmp_path / name).items():
            if ".mlp." in key:
                found = after[key.replace(".mlp.", f".mlp.experts.{number}.")]
                assert torch.equal(found, value), key


def test_code_and_names_of_the_dense_class_are_gone(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    rewritten(tmp_path / "base", {"auto_map": {"AutoConfig": "code.C"}, "sliding_window": 3})
    config = told(mixed(tmp_path, ["base", "base"]).folder)
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["model_type"] == "mixtral"
    assert "auto_map" not in config
    assert config["sliding_window"] is None  # Llama does not know it, Mixtral would


# -- what experts do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {"router": {"normalise": False}}),
        ("llama", {"architecture": "deepseek"}),
        ("deepseek_v2", {"router": {"normalise": False}}),
    ],
)
def test_a_layer_is_the_gated_sum_of_its_experts(
    kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    dense(tmp_path, kind, "base", "a", "b", "c")
    folder = mixed(
        tmp_path, ["a", "b", "c"], router={"top_k": 2, **keys.pop("router", {})}, **keys
    ).folder
    block = loaded(folder).model.layers[1].mlp
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    stored = weights(folder)
    router = next(
        v
        for k, v in stored.items()
        if k.startswith("model.layers.1.") and k.endswith(".gate.weight")
    )
    scores = x @ router.T
    shares = torch.sigmoid(scores) if "architecture" in keys else torch.softmax(scores, dim=-1)
    top, chosen = shares.topk(2, dim=-1)
    if kind in ("llama", "qwen2"):
        top = top / top.sum(dim=-1, keepdim=True)
    experts = torch.stack([mlp(weights(tmp_path / n), "model.layers.1.mlp", x) for n in "abc"], 1)
    wanted = (experts.gather(1, chosen[..., None].expand(-1, -1, 16)) * top[..., None]).sum(1)
    with torch.no_grad():
        found = block(x[None])
    found = found[0] if isinstance(found, tuple) else found
    assert closest(found.reshape(20, 16), wanted) <= EXACT
    assert len(chosen.unique()) == 3


def test_a_shared_expert_of_qwen2_counts_in_full(tmp_path: Path) -> None:
    """Its gate is a sigmoid, a half at 0; what it halves is made up for."""
    dense(tmp_path, "qwen2", "base", "a", "s")
    shared = [{"source_model": "s", "residual_scale": 0.25}]
    folder = mixed(tmp_path, ["a", "a"], shared_experts=shared).folder
    block = loaded(folder).model.layers[0].mlp
    x = torch.randn(1, 9, 16)
    a, s = (weights(tmp_path / name) for name in "as")
    wanted = mlp(a, "model.layers.0.mlp", x) + mlp(s, "model.layers.0.mlp", x, 0.25)
    with torch.no_grad():
        assert closest(block(x), wanted) <= EXACT
    assert told(folder)["shared_expert_intermediate_size"] == 32


@pytest.mark.skipif(not LLAMA.is_dir(), reason="no real Llama here")
def test_a_real_llama_routed_by_prompts(tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(LLAMA)
    prompts = ["Once upon a time", "The cat sat"], ["One day, Tom and Lily", "A big dog"]
    entries = [{"source_model": "base", "positive_prompts": p} for p in prompts]
    result = run_recipe(written(tmp_path, entries, gate_mode="hidden"), tmp_path / "out")
    found, before = loaded(result.folder), loaded(LLAMA)
    assert closest(logits(found), logits(before)) <= EXACT * logits(before).abs().max()
    assert generated(found, 40) == generated(before, 40)
    routers = [v for name, v in weights(result.folder).items() if name.endswith(".gate.weight")]
    assert len(routers) == told(LLAMA)["num_hidden_layers"]
    for router in routers:
        assert closest(router.norm(dim=1), torch.ones(2)) <= EXACT
        assert closest(router[0], router[1]) > 0.1


@pytest.mark.usefixtures("here")
def test_prompts_teach_the_gate_of_a_shared_expert(tmp_path: Path) -> None:
    """As of mergekit: then it is the gate that says how much the shared expert counts."""
    dense(tmp_path, "qwen2", "base", "a", "s")
    tokenized(tmp_path / "base", 64)
    entries = [{"source_model": "a", "positive_prompts": ["red cat", "one dog"]}] * 2
    shared = [{"source_model": "s", "positive_prompts": ["blue hen"], "residual_scale": 0.1}]
    recipe = written(tmp_path, entries, gate_mode="hidden", shared_experts=shared)
    folder = run_recipe(recipe, tmp_path / "out").folder
    block, x = loaded(folder).model.layers[1].mlp, torch.randn(1, 9, 16)
    gate = weights(folder)["model.layers.1.mlp.shared_expert_gate.weight"]
    assert abs(float(gate.norm()) - 1) <= EXACT
    a, s = (weights(tmp_path / name) for name in "as")
    share = torch.sigmoid(x @ gate.T)
    wanted = mlp(a, "model.layers.1.mlp", x) + share * mlp(s, "model.layers.1.mlp", x, 0.1)
    with torch.no_grad():
        assert closest(block(x), wanted) <= EXACT


def test_several_shared_experts_of_deepseek_are_added(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base", "a", "s", "t")
    shared = [{"source_model": "s", "residual_scale": 0.5}, {"source_model": "t"}]
    keys = {"architecture": "deepseek", "shared_experts": shared}
    folder = mixed(tmp_path, ["a", "a"], **keys).folder
    block = loaded(folder).model.layers[1].mlp
    x = torch.randn(1, 9, 16)
    a, s, t = (mlp(weights(tmp_path / n), "model.layers.1.mlp", x) for n in "ast")
    with torch.no_grad():
        assert closest(block(x), a + 0.5 * s + t) <= EXACT
    assert told(folder)["n_shared_experts"] == 2


def test_equal_shared_experts_have_noise_of_their_own(tmp_path: Path) -> None:
    dense(tmp_path, "qwen3", "base", "a")
    keys = {"architecture": "deepseek", "shared_experts": [NOISY] * 2}
    found = weights(mixed(tmp_path, ["a", "a"], **keys).folder)
    up = found["model.layers.0.mlp.shared_experts.up_proj.weight"]
    down = found["model.layers.0.mlp.shared_experts.down_proj.weight"]
    assert closest(up[:32], up[32:]) > 0.05
    assert closest(down[:, :32], down[:, 32:]) > 0.05


def test_an_expert_with_an_adapter_is_what_peft_merges(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    for rank, name in enumerate("ab", start=2):
        adapter(
            tmp_path / "base", tmp_path / name, r=rank, target_modules=["gate_proj", "down_proj"]
        )
    entries = [{"adapter": "a"}, {"source_model": "base+b"}]
    result = mixed(tmp_path, entries[:1] * 2, "adapters", format="dense")
    found = weights(result.folder)
    wanted = merged_by_peft(tmp_path / "base", tmp_path / "a", into=tmp_path / "peft")
    for part, name in (("gate", "w1"), ("down", "w2")):
        value = found[f"model.layers.0.block_sparse_moe.experts.1.{name}.weight"].numpy()
        assert np.abs(value - wanted[f"model.layers.0.mlp.{part}_proj.weight"]).max() < 1e-6
    assert not any("adapter changes" in n for n in mixed(tmp_path, entries[1:] * 2).plan.notes)


def test_what_an_adapter_of_a_model_changes_beside_mlps_is_noted(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    adapter(tmp_path / "base", tmp_path / "a", target_modules=["k_proj", "up_proj"])
    plan = plan_recipe(written(tmp_path, ["base", "base+a"], gate_mode="random"))
    lost = "its adapter changes 'model.layers.0.self_attn.k_proj.weight' too"
    assert [note for note in plan.notes if lost in note]


def test_another_vocabulary_is_noted(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    saved(tmp_path / "wide", LlamaConfig(**LAYERS | {"vocab_size": 70}))
    plan = plan_recipe(written(tmp_path, ["base", "wide"], gate_mode="random"))
    assert "wide: vocab_size is 70 in config.json, but 64 in base" in plan.notes


# -- changed experts -------------------------------------------------------------------------------


def test_residual_scale_is_of_the_down_projection(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base", "a")
    experts = ["base", {"source_model": "a", "residual_scale": 0.25}]
    found, a = weights(mixed(tmp_path, experts).folder), weights(tmp_path / "a")
    prefix = "model.layers.1.block_sparse_moe.experts.1"
    assert torch.equal(
        found[f"{prefix}.w2.weight"], 0.25 * a["model.layers.1.mlp.down_proj.weight"]
    )
    assert torch.equal(found[f"{prefix}.w1.weight"], a["model.layers.1.mlp.gate_proj.weight"])


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_noise_is_normal_of_its_scale_and_comes_before_the_residual(
    kind: str, tmp_path: Path
) -> None:
    dense(tmp_path, kind, "base")
    entry = {"source_model": "base", "noise_scale": 0.03, "residual_scale": 0.5}
    noisy, plain = (
        weights(mixed(tmp_path, ["base", e], out).folder)
        for e, out in ((entry, "n"), ("base", "p"))
    )
    for name, scale in (("w1", 0.03), ("w3", 0.03), ("w2", 0.015)):
        key = f"model.layers.0.block_sparse_moe.experts.1.{name}.weight"
        noise = noisy[key] - plain[key] * (0.5 if name == "w2" else 1.0)
        # 512 numbers: their standard deviation is known to 3 %
        assert 0.87 * scale < noise.std() < 1.13 * scale
        assert abs(noise.mean()) < 0.2 * scale
    first = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert torch.equal(noisy[first], plain[first])


def test_a_share_of_the_inner_columns_is_drawn_anew(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    experts = [{"source_model": "base", "reinitialise": 0.25}] * 2
    found, base = weights(mixed(tmp_path, experts).folder), weights(tmp_path / "base")
    sets = []
    for layer, number in ((0, 0), (0, 1), (1, 0)):
        changed = {}
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            after = found[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{name}.weight"]
            before = base[f"model.layers.{layer}.mlp.{part}_proj.weight"]
            other = (after != before).T if part == "down" else after != before
            changed[part] = other.any(1)
            assert torch.equal(other.all(1), other.any(1))
            assert other.any(1).sum() == 8
        assert torch.equal(changed["gate"], changed["up"])
        assert torch.equal(changed["gate"], changed["down"])
        sets.append(tuple(changed["gate"].tolist()))
    assert len(set(sets)) == 3


NOISY = {"source_model": "a", "noise_scale": 0.1}


def altered_entries() -> list[str | dict[str, Any]]:
    changes = {"noise_scale": 0.1, "reinitialise": 0.5, "residual_scale": 0.7}
    return ["base", {"source_model": "a", **changes}]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("phi3", {}),
        ("llama", {"architecture": "deepseek", "shared_experts": [NOISY] * 2}),
    ],
)
def test_the_same_bytes_whatever_memory_and_threads(
    kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    wide = LAYERS | {
        "hidden_size": 512,
        "head_dim": 128,
        "intermediate_size": 700,
        "num_hidden_layers": 1,
    }
    for seed, name in enumerate(("base", "a")):
        saved(tmp_path / name, CONFIG_MAPPING[kind](**wide), seed=seed)
    router = {"mode": "random", "seed": 3}
    recipe = written(tmp_path, altered_entries(), out_dtype="bfloat16", router=router, **keys)
    first = run_recipe(recipe, tmp_path / "one", threads=1, memory="140MiB")
    second = run_recipe(recipe, tmp_path / "two", threads=3, memory="1GiB", fuse=True)
    assert contents(first.folder) == contents(second.folder)
    assert run_recipe(recipe, tmp_path / "two").existed


def test_another_seed_gives_other_bytes(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base", "a")
    one, two = (
        weights(mixed(tmp_path, altered_entries(), f"out{seed}", router={"seed": seed}).folder)
        for seed in (1, 2)
    )
    other = {name for name in one if not torch.equal(one[name], two[name])}
    block = "model.layers.{}.block_sparse_moe.{}.weight"
    wanted = ("gate", "experts.1.w1", "experts.1.w2", "experts.1.w3")
    assert other == {block.format(layer, part) for layer in (0, 1) for part in wanted}


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    dense(tmp_path, "phi3", "base", "a")
    peaks, reads = [], []
    for count in (1, 8):
        plan = plan_recipe(written(tmp_path, altered_entries() * count, gate_mode="random"))
        peaks.append(make_budget(plan, "512MiB", 1).peak)
        reads.append(sum(len(step.inputs) for step in plan.steps))
    # the plan itself grows, and rows of routers by an expert's column each
    assert peaks[1] - peaks[0] - PER_INPUT * (reads[1] - reads[0]) < 64 << 10


# -- refusals --------------------------------------------------------------------------------------


def refused(folder: Path, experts: list[Any], **keys: Any) -> str:
    file = written(folder, experts, **{"router": {"mode": "random"}} | keys)
    with pytest.raises(RequestError) as caught:
        plan_recipe(file)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{file}:", "recipe:").replace(f"{folder}/", "")


DEEPSEEK = {"architecture": "deepseek"}
SHARED = [{"source_model": "base"}]
UNCERTAIN = {"mode": "random", "normalise": False, "top_k": 1}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"architecture": "qwen3_moe"},
        "architecture qwen3_moe is of qwen3, and base is llama; write mixtral or deepseek",
    ),
    (
        "llama",
        {"layers": [1]},
        "layers leaves some of 2 without experts, and in mixtral all have them",
    ),
    (
        "llama",
        {"layers": [0], **DEEPSEEK},
        "layers is [0]; in glm4_moe only the first layers have no experts: write all from 0 to 1",
    ),
    ("qwen3", {"layers": [2]}, "layers has 2; base has layers 0 to 1"),
    (
        "llama",
        {"router": {"mode": "uniform", "top_k": 1}},
        "of equal scores the first 1 experts are always chosen; uniform needs top_k 2",
    ),
    (
        "llama",
        {"router": {"weights": [1, 3]}},
        "fixed weights need routers with a bias, which mixtral does not have",
    ),
    (
        "llama",
        {"router": {"mode": "arrow"}},
        "mode arrow goes by the size of scores whatever their sign",
    ),
    (
        "llama",
        {"router": UNCERTAIN},
        "normalise is false, and in mixtral it is always true; write router: {normalise: true}",
    ),
    (
        "deepseek_v2",
        {"router": {"mode": "random", "top_k": 1}},
        "normalise is true, and in deepseek_v2 it is always false",
    ),
    (
        "llama",
        {"router": {"mode": "random", "per": "model"}},
        "per is model; mixtral has a router in every layer",
    ),
    ("qwen3", {"shared_experts": SHARED}, "qwen3_moe has no shared experts"),
    (
        "qwen2",
        {"shared_experts": SHARED * 2},
        "2 shared experts are listed, and qwen2_moe has one",
    ),
    (
        "mistral",
        DEEPSEEK,
        "sliding_window is 5 in config.json, and glm4_moe always attends to everything",
    ),
    (
        "part-phi3",
        {},
        "partial_rotary_factor is 0.5 in config.json, and mixtral rotates whole heads; write arch",
    ),
]


@pytest.mark.parametrize(("kind", "keys", "message"), REFUSED)
def test_what_a_mixture_cannot_be_is_refused(
    kind: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dense(tmp_path, kind, "base")
    assert message in refused(tmp_path, ["base", "base"], **keys)


def test_one_expert_of_deepseek_is_refused(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    message = refused(tmp_path, ["base"], architecture="deepseek")
    assert "glm4_moe needs at least 2 experts, and there is 1" in message


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**LAYERS, attention_bias=True), "k_proj.bias' has no place in mixtral"),
        (LlamaConfig(**LAYERS, mlp_bias=True), "mlp.down_proj.bias' has no place in mixtral"),
        (
            Qwen2Config(**LAYERS | {"head_dim": 6}),
            "head_dim is 6 in config.json, and qwen2_moe takes",
        ),
        (Qwen3Config(**LAYERS, **WINDOW), "sliding_window is 8"),
        (
            Phi3Config(**LAYERS | {"num_attention_heads": 2}),
            "has 24 rows, but config.json tells of 8",
        ),
    ],
)
def test_a_base_that_no_mixture_computes_is_refused(
    config: Any, message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "base", config)
    if isinstance(config, Phi3Config):
        rewritten(tmp_path / "base", {"num_attention_heads": 4, "head_dim": 4})
    assert message in refused(tmp_path, ["base", "base"])


def test_models_that_are_no_gated_decoders_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    saved(
        tmp_path / "base", GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8)
    )
    message = refused(tmp_path, ["base", "base"])
    assert "model_type is 'gpt2'; models can become experts in llama, mistral, phi3" in message


def test_experts_of_another_size_or_name_are_refused(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    saved(tmp_path / "wide", LlamaConfig(**LAYERS | {"intermediate_size": 48}))
    message = refused(tmp_path, ["base", "wide"])
    assert (
        "'model.layers.0.mlp.gate_proj.weight' of wide has shape [48, 16], but [32, 16] in base"
        in message
    )
    saved(tmp_path / "gpt", Phi3Config(**LAYERS))
    assert "gpt lacks tensor 'model.layers.0.mlp.gate_proj.weight' of base" in refused(
        tmp_path, ["base", "gpt"]
    )


def test_an_adapter_of_more_than_mlps_is_refused(tmp_path: Path) -> None:
    dense(tmp_path, "qwen3", "base")
    for name, modules in (("mlp", ["up_proj"]), ("both", ["up_proj", "o_proj"])):
        adapter(tmp_path / "base", tmp_path / name, target_modules=modules)
    entries = [{"adapter": "mlp"}, {"adapter": "both"}]
    message = refused(tmp_path, entries, format="dense")
    assert "adapter 'both' changes 'model.layers.0.self_attn.o_proj.weight'" in message
    assert "write format: routed" in message
    message = refused(tmp_path, entries[:1] * 2, format="dense", layers=[1])
    assert (
        "'mlp-0' changes 'model.layers.0.mlp.up_proj.weight', which is no MLP of a layer with"
        in message
    )


def test_parts_of_a_merge_of_the_same_file_are_refused(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base", "a")
    file = written(
        tmp_path, ["base", {"source_model": "soup", "noise_scale": 0.1}], gate_mode="random"
    )
    stage = "merge_method: linear\nname: soup\nmodels:\n"
    stage += "".join(f"- {{model: {name}, parameters: {{weight: 1}}}}\n" for name in ("base", "a"))
    file.write_text(f"{stage}---\n{file.read_text()}")
    with pytest.raises(
        PlanError, match="soup: is a merge of the same file, of whose tensors no part"
    ):
        plan_recipe(file)
    file.write_text(file.read_text().replace("noise_scale: 0.1", "residual_scale: 0.5"))
    result = run_recipe(file, tmp_path / "out")
    found, base, a = weights(result.folder), weights(tmp_path / "base"), weights(tmp_path / "a")
    key = "model.layers.0.mlp.down_proj.weight"
    down = found["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    assert closest(down, 0.25 * (base[key] + a[key])) < 1e-7


def test_settings_are_read_as_the_class_reads_them() -> None:
    config = CONFIGS["qwen3"]().to_dict()
    assert setting(config, "head_dim") == 6
    assert setting({**config, "head_dim": None}, "head_dim") == 4
    assert setting({"model_type": "llama", "num_attention_heads": 8}, "num_key_value_heads") == 8
    assert (
        setting({"model_type": "llama", "rope_parameters": {"rope_theta": 7.0}}, "rope_theta")
        == 7.0
    )
    assert setting({"model_type": "mistral"}, "sliding_window") == 4096


def test_a_tensor_that_no_mixture_has_is_refused(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    tensors = weights(tmp_path / "base")
    tensors["model.layers.1.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    message = refused(tmp_path, ["base", "base"])
    assert "tensor 'model.layers.1.self_attn.sinks' has no place in mixtral" in message
