"""Layers put together anew: which tensors become which, with which values, and that the result loads."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from families import contents, drawn, family, shapes, typed, write_model
from methods.cases import read_values
from real import SMALL, generated, loaded, saved

from merge.errors import PlanError, RecipeError
from merge.pipeline import plan_recipe, run_recipe
from merge.plan import Plan

UP = "model.layers.{}.mlp.up_proj.weight"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def written(folder: Path, **keys: Any) -> Path:
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    return file


def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": model, "layer_range": [first, end]}
    return entry | ({"parameters": parameters} if parameters else {})


def passthrough(folder: Path, *sources: dict[str, Any], **keys: Any) -> Path:
    slices = [{"sources": [each]} for each in sources]
    return written(folder, slices=slices, merge_method="passthrough", **keys)


def origins(plan: Plan, template: str = UP) -> list[tuple[str, int]]:
    """(model, layer) of every output layer."""
    steps = {step.name: step for step in plan.steps}
    found = []
    for layer in range(len(steps)):
        if template.format(layer) in steps:
            operand = steps[template.format(layer)].operands[0]
            number = re.search(r"\d+", operand.tensor)
            assert number is not None
            found.append((plan.models[operand.model].label, int(number[0])))
    return found


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """a and b of 4 layers, c of 6."""
    for seed, (name, layers) in enumerate({"a": 4, "b": 4, "c": 6}.items()):
        values = typed(drawn(seed, shapes(layers)))
        write_model(tmp_path / name, values, config={"num_hidden_layers": layers})
    return tmp_path


def test_layers_follow_one_another_and_ends_come_from_first_and_last_slice(models: Path) -> None:
    recipe = passthrough(models, source("a", 0, 3), source("b", 1, 4), source("c", 4, 6))
    result = run_recipe(recipe, models / "out")
    wanted = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("c", 4), ("c", 5)]
    assert origins(result.plan) == wanted
    found = read_values(result.folder)
    of = {name: read_values(models / name) for name in "abc"}
    for place, (model, layer) in enumerate(wanted):
        assert np.array_equal(found[UP.format(place)], of[model][UP.format(layer)])
    assert np.array_equal(found[EMBEDDING], of["a"][EMBEDDING])
    assert np.array_equal(found[NORM], of["c"][NORM])
    assert np.array_equal(found[HEAD], of["c"][HEAD])
    assert json.loads((result.folder / "config.json").read_text())["num_hidden_layers"] == 8


def test_slices_of_whole_models_are_the_merge_of_whole_models(models: Path) -> None:
    weights = {"a": [0.1, 0.9], "b": 0.4}
    slices = [{"sources": [source(name, 0, 4, weight=w) for name, w in weights.items()]}]
    sliced = run_recipe(written(models, slices=slices, merge_method="linear"), models / "sliced")
    whole = [{"model": name, "parameters": {"weight": w}} for name, w in weights.items()]
    plain = run_recipe(written(models, models=whole, merge_method="linear"), models / "plain")
    weights_of = [contents(each.folder)["model.safetensors"] for each in (sliced, plain)]
    assert weights_of[0] == weights_of[1]


def test_a_gradient_runs_over_the_layers_of_its_slice(models: Path) -> None:
    slices = [
        {"sources": [source("a", 0, 3, scale=[0.0, 1.0])]},
        {"sources": [source("c", 1, 6, scale=[0.0, 2.0])]},
        {"sources": [source("b", 0, 1, scale=[0.0, 3.0])]},
    ]
    plan = plan_recipe(written(models, slices=slices, merge_method="passthrough"))
    steps = {step.name: step.parameters["scale"][0] for step in plan.steps}
    found = [steps[UP.format(layer)] for layer in range(9)]
    assert found == [0, 0.5, 1, 0, 0.5, 1, 1.5, 2, 3]
    assert [steps[name] for name in (EMBEDDING, NORM, HEAD)] == [0.0, 3.0, 3.0]


def test_values_of_source_slice_and_recipe_go_in_this_order(models: Path) -> None:
    own = source("a", 0, 4, weight=[{"filter": "mlp", "value": 1.0}])
    slices = [
        {
            "sources": [own, source("b", 0, 4)],
            "parameters": {"weight": [{"filter": "norm", "value": 2.0}]},
        }
    ]
    recipe = written(models, slices=slices, merge_method="linear", parameters={"weight": 3.0})
    steps = {step.name: step.parameters["weight"] for step in plan_recipe(recipe).steps}
    assert steps[UP.format(1)] == [1.0, 3.0]
    assert steps["model.layers.1.input_layernorm.weight"] == [2.0, 2.0]
    assert steps["model.layers.1.self_attn.q_proj.weight"] == [3.0, 3.0]


@pytest.mark.parametrize("compat", [False, True])
def test_what_follows_the_layers_is_merged_from_all_sources_of_the_last_slice(
    models: Path, compat: bool
) -> None:
    """mergekit takes as many as the first slice has, and drops the others."""
    slices = [
        {"sources": [source("a", 0, 2, weight=1.0)]},
        {"sources": [source("b", 0, 2, weight=1.0), source("c", 2, 4, weight=1.0)]},
    ]
    keys = {"compat": "mergekit"} if compat else {}
    result = run_recipe(
        written(models, slices=slices, merge_method="linear", **keys), models / "out"
    )
    b, c, found = (read_values(models / name) for name in ("b", "c", "out"))
    both = (b[UP.format(0)] + c[UP.format(2)]) / 2
    head = b[HEAD] if compat else (b[HEAD] + c[HEAD]) / 2
    # a float32 sum of two values below 4, rounded once more when halved
    assert np.abs(found[HEAD] - head).max() <= 4 * 2.0**-24
    assert np.abs(found[UP.format(2)] - both).max() <= 4 * 2.0**-24
    assert result.verified["tensors"] == len(found)


def test_a_slice_has_a_base_of_its_own_and_of_its_own_layers(models: Path) -> None:
    slices = [
        {"sources": [source("a", 0, 4), source("b", 0, 4)]},
        {"base_model": "c", "sources": [source("c", 2, 4), source("b", 0, 2), source("a", 1, 3)]},
    ]
    recipe = written(
        models, slices=slices, merge_method="task_arithmetic", base_model="a",
        parameters={"weight": 1.0},
    )  # fmt: skip
    result = run_recipe(recipe, models / "out")
    steps = {step.name: step for step in result.plan.steps}
    base = steps[UP.format(4)].base
    assert base is not None
    assert (result.plan.models[base.model].label, base.tensor) == ("c", UP.format(2))
    found = read_values(result.folder)
    of = {name: read_values(models / name) for name in "abc"}
    expected = of["b"][UP.format(0)] + of["a"][UP.format(1)] - of["c"][UP.format(2)]
    # three float32 values of size up to 5, added in another order
    assert np.abs(found[UP.format(4)] - expected).max() <= 4 * 2.0**-24 * 5
    assert np.allclose(found[UP.format(1)], of["b"][UP.format(1)], rtol=0, atol=2.0**-22)


def test_a_base_that_is_no_source_lends_the_layers_of_the_sources(models: Path) -> None:
    one = [{"sources": [source("b", 1, 3), source("c", 1, 3)]}]
    keys = {"merge_method": "task_arithmetic", "base_model": "a", "parameters": {"weight": 0.5}}
    plan = plan_recipe(written(models, slices=one, **keys))
    base = next(step.base for step in plan.steps if step.name == UP.format(1))
    assert base is not None
    assert base.tensor == UP.format(2)
    two = [{"sources": [source("b", 1, 3), source("c", 2, 4)]}]
    with pytest.raises(
        PlanError, match=r"r\.yaml:\d+: the sources give different layers, and the base a"
    ):
        plan_recipe(written(models, slices=two, **keys))


def test_layers_that_a_model_lacks_are_refused_with_the_line_of_the_range(models: Path) -> None:
    recipe = passthrough(models, source("a", 0, 4), source("b", 2, 5))
    line = next(i for i, text in enumerate(recipe.read_text().splitlines(), 1) if "- 5" in text) - 2
    with pytest.raises(
        PlanError, match=rf"r\.yaml:{line}: b has no layer 4; it has 4 layers"
    ) as caught:
        run_recipe(recipe, models / "out")
    assert "layer_range can be [0, 4] at most" in str(caught.value)
    assert not (models / "out.partial").exists()


@pytest.mark.parametrize(
    "span", [["0", "4"], [2, 2], [3, 1], [-1, 2], [0], [0, 1, 2], ["a", "b"], "0-4", [0.5, 2]]
)
def test_a_range_that_is_none_is_refused(models: Path, span: Any) -> None:
    slices = [{"sources": [{"model": "a", "layer_range": span}]}]
    with pytest.raises(RecipeError, match=r"layer_range(\.\d)? is "):
        plan_recipe(written(models, slices=slices, merge_method="passthrough"))


def test_sources_of_a_slice_have_as_many_layers(models: Path) -> None:
    slices = [{"sources": [source("a", 0, 4), source("c", 0, 6)]}]
    with pytest.raises(RecipeError, match="this source has 6 layers, the first has 4"):
        plan_recipe(written(models, slices=slices, merge_method="linear"))


def test_models_and_slices_are_one_too_many(models: Path) -> None:
    keys = {"models": [{"model": "a"}], "slices": [{"sources": [source("a", 0, 4)]}]}
    with pytest.raises(RecipeError, match="models and slices are both given; keep one"):
        plan_recipe(written(models, merge_method="passthrough", **keys))


def test_kept_tensors_of_a_slice_are_the_leads(models: Path) -> None:
    slices = [{"sources": [source("a", 0, 4), source("b", 0, 4)]}]
    keys = {"slices": slices, "merge_method": "slerp", "base_model": "b", "parameters": {"t": 0.5}}
    plan = plan_recipe(written(models, exclude=["self_attn", "re:^lm_head"], **keys))
    copied = {step.name for step in plan.steps if step.copy}
    assert {name for name in copied if "self_attn" in name} | {HEAD} == copied
    assert {plan.models[step.operands[0].model].label for step in plan.steps if step.copy} == {"b"}
    only = plan_recipe(written(models, include=["model.layers.*.mlp.*"], **keys))
    assert {step.name for step in only.steps if not step.copy} == {UP.format(i) for i in range(4)}


def test_the_plan_of_slices_tells_their_layers_apart(models: Path) -> None:
    digests = {
        plan_recipe(passthrough(models, source("a", 0, 2), source(name, first, first + 2))).digest
        for name, first in (("b", 0), ("b", 1), ("c", 0))
    }
    assert len(digests) == 3


def test_the_written_recipe_gives_the_same_merge(models: Path) -> None:
    slices = [
        {"sources": [source("a", 0, 3), source("b", 1, 4)], "parameters": {"weight": [0.2, 0.4]}}
    ]
    first = run_recipe(written(models, slices=slices, merge_method="linear"), models / "first")
    again = json.loads((first.folder / "mergetool.json").read_text())["recipe"]
    second = run_recipe(written(models, **again[0]), models / "second")
    assert second.plan.digest == first.plan.digest


def qwen3(layers: int) -> Any:
    from transformers import Qwen3Config

    kinds = ["sliding_attention" if layer % 3 else "full_attention" for layer in range(layers)]
    return Qwen3Config(
        num_hidden_layers=layers, layer_types=kinds, use_sliding_window=True, sliding_window=8,
        max_window_layers=0, **SMALL,
    )  # fmt: skip


def gemma3(layers: int) -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(num_hidden_layers=layers, sliding_window=8, **SMALL)


def llama(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=layers, **SMALL)


@pytest.mark.parametrize("config", [llama, qwen3, gemma3])
def test_a_frankenmerge_of_forty_layers_loads_and_generates(tmp_path: Path, config: Any) -> None:
    for seed, name in enumerate(("a", "b")):
        saved(tmp_path / name, config(24), seed=seed)
    spans = [("a", 0, 12), ("b", 6, 18), ("a", 10, 22), ("b", 20, 24)]
    result = run_recipe(passthrough(tmp_path, *(source(*span) for span in spans)), tmp_path / "out")
    model = loaded(result.folder)
    assert len(model.model.layers) == model.config.num_hidden_layers == 40
    wanted = [(name, layer) for name, first, end in spans for layer in range(first, end)]
    assert origins(result.plan) == wanted
    kinds = getattr(config(24), "layer_types", None)
    if kinds:
        assert model.config.layer_types == [kinds[layer] for _, layer in wanted]
    parents = {name: loaded(tmp_path / name).state_dict() for name in "ab"}
    state = model.state_dict()
    for place, (name, layer) in enumerate(wanted):
        assert state[UP.format(place)].equal(parents[name][UP.format(layer)])
    assert len(generated(model)) == 12


def test_a_stack_of_all_layers_says_what_its_model_says(tmp_path: Path) -> None:
    saved(tmp_path / "a", qwen3(6))
    result = run_recipe(
        passthrough(tmp_path, source("a", 0, 3), source("a", 3, 6)), tmp_path / "out"
    )
    assert contents(result.folder)["config.json"] == contents(tmp_path / "a")["config.json"]
    assert generated(loaded(result.folder)) == generated(loaded(tmp_path / "a"))


def test_family_of_two_layers_is_left_alone(tmp_path: Path) -> None:
    """Whole models with `models` need no key for the number of layers."""
    family(tmp_path, "x")
    recipe = written(tmp_path, models=[{"model": "x"}], merge_method="passthrough")
    assert len(plan_recipe(recipe).steps) == len(shapes())


def test_layers_that_predict_further_tokens_are_numbered_on(tmp_path: Path) -> None:
    """config.json counts 2 of the 3 layers that are stored; the third follows whatever is stacked."""
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, typed(drawn(seed, shapes(3))), config=config)
    recipe = passthrough(tmp_path, source("a", 0, 2), source("b", 0, 2))
    result = run_recipe(recipe, tmp_path / "out")
    found, b = read_values(result.folder), read_values(tmp_path / "b")
    assert origins(result.plan) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)]
    assert np.array_equal(found[UP.format(4)], b[UP.format(2)])
    assert json.loads((result.folder / "config.json").read_text())["num_hidden_layers"] == 4
