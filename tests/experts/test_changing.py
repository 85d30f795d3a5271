"""Experts leave a mixture and join it, and those that stay do not change by a bit."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dense_models import LAYERS, dense, mixed
from grounds import tokenized
from peft_models import adapter as plain_adapter
from real import loaded, saved
from routed_models import adapter, apart, base, in_one_process, logits, mixture, routed
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

from merge.budget import make_budget
from merge.errors import PlanError, RecipeError, RequestError
from merge.experts.checks.loading import check_loads, check_loads_here
from merge.pipeline import plan_recipe, run_recipe
from merge.verify import verify_folder


def written(folder: Path, **keys: Any) -> Path:
    file = folder / "change.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    return file


def change(out: Path, former: Path, **keys: Any) -> Path:
    """The mixture in `former` with other experts, in the folder `out`."""
    file = written(out.parent, mixture=str(former), **keys)
    return run_recipe(file, out, offline=True, load=False).folder


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of everything in a model, by name."""
    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in load_file(folder / "model.safetensors").items()
    }


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def same(a: Path, b: Path) -> None:
    """Two mixtures with the same tensors and the same config.json."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert config(a) == config(b)


# -- mixtures of adapters --------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_one_process():
        yield


ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "stable": {"target_modules": ["q_proj", "down_proj"], "r": 2, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True},
}
PAIR = ("plain", "stable")
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and its adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    model = base("llama", folder / "base")
    made = {
        name: adapter(model, folder / name, seed, **keys)
        for seed, (name, keys) in enumerate(ADAPTERS.items(), start=5)
    }
    return {"base": model} | made


@pytest.fixture(scope="module")
def made(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A mixture of adapters by names, made once for each `router`."""
    known: dict[str, Path] = {}

    def make(*names: str, **router: Any) -> Path:
        key = json.dumps([names, router])
        if key not in known:
            chosen = {name: adapters[name] for name in names}
            folder = tmp_path_factory.mktemp("mixture")
            given = {"mode": "arrow", "top_k": 2} | router
            known[key] = mixture(folder, adapters["base"], chosen, router=given)
        return known[key]

    return make


@pytest.mark.parametrize("per", ["module", "layer"])
def test_of_three_experts_less_one_the_mixture_of_two_is_left(
    made: Made, per: str, tmp_path: Path
) -> None:
    """Down to layers that only the dropped one adapted, and DoRA's that only it had."""
    whole = made(*ADAPTERS, per=per)
    less = change(tmp_path / "out", whole, drop=["dora"])
    same(less, made(*PAIR, per=per))
    assert verify_folder(less)["digests"] == "all equal"
    if per == "layer":
        assert check_loads(less)["compared"]


@pytest.mark.parametrize("dropped", ["plain", 0])
def test_experts_are_dropped_by_name_or_number(
    made: Made, dropped: str | int, tmp_path: Path
) -> None:
    less = change(tmp_path / "out", made(*ADAPTERS), drop=[dropped])
    same(less, made("stable", "dora"))


@pytest.mark.parametrize("per", ["module", "layer"])
def test_what_is_added_and_dropped_again_leaves_no_trace(
    made: Made, adapters: dict[str, Path], per: str, tmp_path: Path
) -> None:
    pair, entry = made(*PAIR, per=per), {"adapter": str(adapters["dora"]), "name": "dora"}
    more = change(tmp_path / "more", pair, experts=[entry])
    same(more, made(*ADAPTERS, per=per))
    same(change(tmp_path / "less", more, drop=["dora"]), pair)


def test_one_leaves_as_another_comes(made: Made, adapters: dict[str, Path], tmp_path: Path) -> None:
    entry = {"adapter": str(adapters["dora"]), "name": "dora"}
    out = change(tmp_path / "out", made(*PAIR), drop=["plain"], experts=[entry])
    same(out, made("stable", "dora"))
    again = run_recipe(tmp_path / "change.yaml", tmp_path / "out", offline=True, load=False)
    assert again.existed


def test_top_k_is_lowered_where_it_has_to_be(made: Made, tmp_path: Path) -> None:
    former = made(*PAIR)
    plan = plan_recipe(written(tmp_path, mixture=str(former), drop=["plain"]), offline=True)
    assert "top_k is 1 instead of 2: there is 1 expert" in plan.notes
    assert plan.config["mixture"]["top_k"] == 1


def test_fixed_shares_keep_their_proportions_or_are_given_anew(
    made: Made, adapters: dict[str, Path], tmp_path: Path
) -> None:
    shares = [0.5, 0.3, 0.2]
    whole = made(*ADAPTERS, mode="weights", weights=shares, top_k=3)
    less = routed(change(tmp_path / "less", whole, drop=["plain"]))
    wanted = routed(made("stable", "dora", mode="weights", weights=[0.6, 0.4], top_k=2))
    assert apart(logits(less), logits(wanted)) < 1e-6
    anew = change(
        tmp_path / "anew", made(*PAIR, mode="weights", weights=[1, 0], top_k=2),
        experts=[{"adapter": str(adapters["dora"]), "name": "dora"}],
        router={"weights": shares, "top_k": 3},
    )  # fmt: skip
    same(anew, whole)


@pytest.mark.parametrize(("router", "noted"), [({}, True), ({"top_k": 3}, False)])
def test_an_expert_that_equal_scores_never_choose_is_noted(
    made: Made, adapters: dict[str, Path], router: dict[str, Any], noted: bool, tmp_path: Path
) -> None:
    entry = {"adapter": str(adapters["dora"]), "name": "dora"}
    file = written(
        tmp_path, mixture=str(made(*PAIR, mode="uniform")), experts=[entry], router=router
    )
    notes = plan_recipe(file, offline=True).notes
    assert any("the first 2 of 3 experts are always chosen" in note for note in notes) == noted


def test_a_model_with_random_routers_keeps_their_rows(
    made: Made, adapters: dict[str, Path], tmp_path: Path
) -> None:
    former = made(*PAIR, mode="random")
    entry = {"adapter": str(adapters["dora"]), "name": "dora"}
    out = change(tmp_path / "out", former, experts=[entry], router={"mode": "random"})
    before, after = (load_file(f / "model.safetensors") for f in (former, out))
    for name in before:
        if name.endswith("router.weight"):
            assert torch.equal(after[name][:2], before[name])
            assert not torch.equal(after[name][2], before[name][0])
            assert torch.allclose(after[name][2].norm(), torch.tensor(1.0))
    assert config(out)["mixture"]["experts"] == [*PAIR, "dora"]


@pytest.mark.usefixtures("here")
def test_what_prompts_teach_an_added_expert_is_what_they_teach_in_a_new_mixture(
    tmp_path: Path,
) -> None:
    """The base inside the mixture reads them as the base itself does."""
    prompts = {
        "sort-mixed-ranks": "sort hcabd=",
        "elements-mlp": "elements 27=",
        "roman-rslora": "roman 9=",
    }
    experts = [
        {"adapter": f"zoo:adapters/{name}", "positive_prompts": [prompt]}
        for name, prompt in prompts.items()
    ]
    outs = {}
    for count in (2, 3):
        told = {"base_model": "zoo:base", "experts": experts[:count]}
        told["router"] = {"mode": "hidden", "per": "layer"}
        outs[count] = tmp_path / str(count)
        run_recipe(written(tmp_path, **told), outs[count], load=False)
    file = written(tmp_path, mixture=str(outs[2]), experts=experts[2:])  # hidden, as it was made
    result = run_recipe(file, tmp_path / "out", load=False)
    same(result.folder, outs[3])
    assert result.plan.notes == ()
    card = (result.folder / "README.md").read_text()
    assert "A mixture of 3 experts" in card
    assert "roman-rslora added; the others are copies, bit for bit" in card
    told = json.loads((result.folder / "mergetool.json").read_text()) | {"training": {"asked": 1}}
    (result.folder / "mergetool.json").write_text(json.dumps(told))
    file = written(
        tmp_path, mixture=str(result.folder), experts=[experts[0] | {"name": "again"}],
        router={"mode": "hidden"},
    )  # fmt: skip
    assert any("train them again" in note for note in plan_recipe(file).notes)


@pytest.mark.usefixtures("here")
def test_a_base_whose_files_begin_otherwise_than_in_memory_reads_prompts_for_added_experts(
    tmp_path: Path,
) -> None:
    """As GPT-2 lies on the hub, without the name of its body."""
    model = tokenized(base("gpt2", tmp_path / "base"))
    held = load_file(model / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    save_file(short, model / "model.safetensors", {"format": "pt"})
    experts = [
        {
            "adapter": str(adapter(model, tmp_path / name, seed, target_modules=["c_attn"])),
            "positive_prompts": [f"{name} cat"],
        }
        for seed, name in enumerate(("red", "blue"))
    ]
    outs = {}
    for count in (1, 2):
        told = {"base_model": str(model), "experts": experts[:count]}
        told["router"] = {"mode": "hidden", "top_k": 1}
        outs[count] = tmp_path / str(count)
        run_recipe(written(tmp_path, **told), outs[count], load=False, offline=True)
    added = change(tmp_path / "out", outs[1], experts=experts[1:], router={"mode": "hidden"})
    same(added, outs[2])


def test_nothing_depends_on_memory_or_threads(
    made: Made, adapters: dict[str, Path], tmp_path: Path
) -> None:
    entry = {"adapter": str(adapters["dora"]), "name": "dora"}
    file = written(tmp_path, mixture=str(made(*PAIR)), experts=[entry], drop=["plain"])
    for name, threads, memory in (("a", 1, "512MiB"), ("b", 3, "2GiB")):
        run_recipe(file, tmp_path / name, threads=threads, memory=memory, load=False, offline=True)
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")


def test_memory_does_not_grow_with_the_kept_experts(made: Made, tmp_path: Path) -> None:
    few = plan_recipe(written(tmp_path, mixture=str(made(*PAIR)), drop=["plain"]), offline=True)
    many = plan_recipe(
        written(tmp_path, mixture=str(made(*ADAPTERS)), drop=["plain"]), offline=True
    )
    peaks = [make_budget(plan, threads=1).peak for plan in (few, many)]
    assert peaks[1] - peaks[0] < 1 << 20


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"drop": ["none"]}, "has no expert 'none'; it has plain (0), stable (1)"),
        ({"drop": [2]}, "has no expert 2"),
        ({"drop": ["plain", 1]}, "drop leaves no expert of"),
        ({"drop": ["plain"], "experts_per_token": 2}, "top_k is 2, and there is 1 expert; it must be 1"),
        ({"experts": [{"adapter": "dora", "name": "plain"}]}, "has an expert 'plain' already"),
        ({"experts": [{"source_model": "base"}]}, "is a mixture of adapters; write adapter:"),
        ({"drop": [0], "router": {"per": "model"}}, "per is model, and this mixture has a router"),
        ({"drop": [0], "router": {"mode": "random"}}, "mode is for routers of added experts"),
        ({"drop": [0], "router": {"seed": 3}}, "seed is for routers of added experts"),
        ({"drop": [0], "router": {"weights": [1]}}, "weights are of a mixture that was made with them"),
        ({"experts": [{"adapter": "dora"}], "router": {"mode": "random"}}, "it must be arrow"),
        ({"experts": [{"adapter": "foreign"}]}, "foreign"),
    ],
)  # fmt: skip
def test_a_change_that_cannot_be_is_one_line(
    made: Made, adapters: dict[str, Path], keys: dict[str, Any], told: str, tmp_path: Path
) -> None:
    if told == "foreign":
        other = plain_adapter(
            base("qwen2", tmp_path / "other"), tmp_path / "foreign", bias="lora_only"
        )
        assert other.is_dir()
    for name in ("dora", "base"):
        (tmp_path / name).symlink_to(adapters[name])
    file = written(tmp_path, mixture=str(made(*PAIR)), **keys)
    with pytest.raises(RequestError, match=re.escape(told)) as caught:
        plan_recipe(file, offline=True)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"drop": ["a"]}, "drop names experts of a mixture"),
        ({"mixture": "m"}, "mixture has nothing to change"),
        ({"mixture": "m", "drop": ["a"], "dtype": "float16"}, "mixture and dtype are both given"),
        ({"mixture": "m", "drop": ["a"], "base_model": "b"}, "mixture and base_model are both given"),
        ({"mixture": "m", "drop": [1.5]}, "must be a list of names of experts, or of their numbers"),
        ({"mixture": "m", "drop": ["a"], "droop": 1}, "unknown key 'droop'"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_meant_is_one_line(
    keys: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)):
        plan_recipe(written(tmp_path, **keys))


def test_a_damaged_table_of_a_mixture_is_one_line(made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(made(*PAIR), tmp_path / "m")
    whole = config(folder)
    for damage in ({"mixture": []}, {"mixture": whole["mixture"] | {"experts": ["one"]}}):
        (folder / "config.json").write_text(json.dumps(whole | damage))
        with pytest.raises(RequestError, match="damaged table"):
            plan_recipe(written(tmp_path, mixture=str(folder), drop=[0]))


# -- stock mixtures --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the dense models base, a, b, c of a kind, and `out`, the mixture of a, b and c."""
    known: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in known:
            folder = dense(tmp_path_factory.mktemp(kind), kind, "base", "a", "b", "c")
            keys = {"architecture": "deepseek"} if kind == "wide-mistral" else {}
            router = {"top_k": 2, "normalise": kind != "deepseek_v2"}
            mixed(folder, ["a", "b", "c"], router=router, **keys)
            known[kind] = folder
        return known[kind]

    return make


def of_expert(folder: Path, number: int) -> dict[str, Any]:
    """The tensors of an expert by their names without its number."""
    place = f".experts.{number}."
    return {n.replace(place, ".experts."): v for n, v in tensors(folder).items() if place in n}


def gates(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors").items()
    return {name: t for name, t in found if name.endswith(".gate.weight")}


@pytest.mark.parametrize(
    "kind", ["mistral", "phi3", "qwen2", "qwen3", "wide-mistral", "deepseek_v2", "deepseek_v3"]
)
def test_a_stock_mixture_loses_an_expert_and_gets_it_back(
    kind: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = stock(kind)
    whole = folder / "out"
    less = change(tmp_path / "less", whole, drop=["b"])
    assert of_expert(less, 0) == of_expert(whole, 0)
    assert of_expert(less, 1) == of_expert(whole, 2)
    assert not of_expert(less, 2)
    for name, gate in gates(whole).items():
        assert torch.equal(gates(less)[name], gate[[0, 2]])
    rest = [n for n in tensors(whole) if ".experts." not in n and ".gate." not in n]
    assert all(tensors(less)[n] == tensors(whole)[n] for n in rest)
    entry = {"source_model": str(folder / "b"), "name": "b"}
    more = change(tmp_path / "more", less, experts=[entry], router={"mode": "random", "seed": 3})
    assert of_expert(more, 2) == of_expert(whole, 1)
    assert of_expert(more, 1) == of_expert(whole, 2)
    for name, gate in gates(less).items():
        assert torch.equal(gates(more)[name][:2], gate)
        assert torch.allclose(gates(more)[name][2].norm(), torch.tensor(1.0), atol=1e-5)
    assert config(more)["expert_names"] == ["a", "c", "b"]
    assert check_loads_here(more)["forward"]
    again = change(tmp_path / "again", more, drop=["b"])
    assert tensors(again) == tensors(less)
    assert config(again) == config(less)


@pytest.mark.parametrize("kind", ["wide-mistral", "deepseek_v3"])
def test_an_added_expert_is_as_likely_to_be_chosen_as_a_middling_one(
    kind: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a training has added to scores for choosing alone goes on to count for nothing but differences."""
    folder = stock(kind)
    whole = shutil.copytree(folder / "out", tmp_path / "whole")
    held = dict(load_file(whole / "model.safetensors"))
    for name in held:
        if name.endswith("e_score_correction_bias"):
            held[name] = torch.tensor([4.0, 5.5, 7.0])
    save_file(held, whole / "model.safetensors", {"format": "pt"})
    entry = {"source_model": str(folder / "base"), "name": "new"}
    more = change(tmp_path / "more", whole, drop=["a"], experts=[entry], router={"mode": "random"})
    biases = [t for n, t in load_file(more / "model.safetensors").items() if "correction" in n]
    assert [bias.tolist() for bias in biases] == [[5.5, 7.0, 6.25]] * len(biases)
    assert biases


def test_without_an_expert_the_others_share_as_if_it_had_never_been(
    stock: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = stock("qwen3") / "out"
    less, model = loaded(change(tmp_path / "less", whole, drop=[1])), loaded(whole)

    def without(module: Any, inputs: Any, output: Any) -> Any:
        scores = output[0].clone()
        scores[:, 1] = -torch.inf
        top, chosen = scores.softmax(-1).topk(2)
        return scores, top / top.sum(-1, keepdim=True), chosen

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(without)
    assert apart(logits(less), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"drop": ["d"]}, "has no expert 'd'; it has 0 (0), 1 (1), 2 (2)"),
        ({"experts": [{"adapter": "a"}]}, "adapter"),
        ({"experts": [{"source_model": "a", "name": "new"}]}, "router.mode is missing"),
        ({"drop": [0], "router": {"normalise": False}}, "normalise cannot be chosen in mixtral"),
        ({"drop": [0], "router": {"temperature": 2}}, "temperature is for routers of added experts"),
        ({"drop": [0], "router": {"seed": 2}}, "seed is for routers of added experts"),
        (
            {"experts": [{"source_model": "other", "name": "o"}], "gate_mode": "random"},
            "has shape [24, 16], but [32, 16]",
        ),
    ],
)  # fmt: skip
def test_a_change_of_a_stock_mixture_that_cannot_be_is_one_line(
    stock: Callable[[str], Path], keys: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = stock("mistral")
    (tmp_path / "a").symlink_to(folder / "a")
    if "shape" in told:
        saved(tmp_path / "other", MistralConfig(**LAYERS | {"intermediate_size": 24}))
    whole = shutil.copytree(folder / "out", tmp_path / "whole")
    (whole / "mergetool.json").unlink()  # which tells how its routers were made
    file = written(tmp_path, mixture=str(whole), **keys)
    with pytest.raises(RequestError, match=re.escape(told)) as caught:
        plan_recipe(file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_dense_model_is_no_mixture(stock: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is no mixture"):
        plan_recipe(written(tmp_path, mixture=str(stock("mistral") / "a"), drop=[0]))
