"""Several recipes in one file: what lies between is never written, and it does not show."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from families import contents, family, typed, write_model, write_recipe
from methods.cases import read_values

from merge.budget import make_budget
from merge.errors import NonFiniteError, PlanError, RecipeError
from merge.pipeline import plan_recipe, run_recipe
from merge.recipe import load_recipe

SHAPES = {
    "model.embed_tokens.weight": (37, 100),
    "model.layers.0.mlp.up_proj.weight": (700, 900),
    "model.layers.1.mlp.up_proj.weight": (700, 900),
    "model.norm.weight": (9,),
}
OWN = {"weight": 0.7, "density": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"models": {"a": {"weight": [0.2, 0.9]}, "b": {"weight": 0.4}}},
    "slerp": {"models": {"a": {}, "b": {}}, "base_model": "a", "parameters": {"t": 0.3}},
    "ties": {"models": {"a": OWN, "b": OWN}, "base_model": "base"},
    "dare_ties": {"models": {"a": OWN, "b": OWN}, "base_model": "base", "parameters": {"seed": 3}},
    "model_stock": {"models": {"a": {}, "b": {}}, "base_model": "base"},
    "arcee_fusion": {"models": {"a": {}, "b": {}}, "base_model": "a"},
    "passthrough": {"models": {"a": {"scale": 0.5}}},
}


def documents(file: Path, *recipes: dict[str, Any]) -> Path:
    parts = [write_recipe(file, **keys).read_text() for keys in recipes]
    file.write_text("---\n".join(parts))
    return file


def stage(method: str, **keys: Any) -> dict[str, Any]:
    return METHODS[method] | {"merge_method": method} | keys


def final(method: str, inner: str, **keys: Any) -> dict[str, Any]:
    """The method's recipe with `inner` in the place of model a."""
    recipe = stage(method, **keys)
    models = {inner if name == "a" else name: own for name, own in recipe["models"].items()}
    base = recipe.get("base_model")
    return recipe | {"models": models} | ({"base_model": inner} if base == "a" else {})


@pytest.fixture
def models(tmp_path: Path) -> Path:
    family(tmp_path, "a", "b", like=SHAPES, dtype="BF16")
    return tmp_path


@pytest.mark.parametrize("inner", METHODS)
@pytest.mark.parametrize("outer", ["linear", "ties", "slerp", "passthrough"])
def test_equal_to_the_bit_to_writing_what_lies_between(
    models: Path, inner: str, outer: str
) -> None:
    first = run_recipe(write_recipe(models / "1.yaml", **stage(inner)), models / "between").folder
    apart = run_recipe(
        write_recipe(models / "2.yaml", **final(outer, first.name)), models / "apart"
    )
    file = documents(
        models / "r.yaml", stage(inner, name="between one"), final(outer, "between one")
    )
    for threads, fuse in ((1, False), (3, True)):
        at_once = run_recipe(file, models / f"out{threads}", threads=threads, fuse=fuse)
        found, wanted = contents(at_once.folder), contents(apart.folder)
        assert found["model.safetensors"] == wanted["model.safetensors"]
    assert not (models / "between one").exists()


def test_three_merges_deep_with_one_result_used_twice(models: Path) -> None:
    middle = {"models": {"x": {"weight": 1.0}, "b": {"weight": 1.0}}, "merge_method": "linear"}
    last = {"models": {"x": {"weight": 1.0}, "y": {"weight": 3.0}}, "merge_method": "linear"}
    file = documents(models / "r.yaml", last, middle | {"name": "y"}, stage("slerp", name="x"))
    result = run_recipe(file, models / "out")
    x = read_values(
        run_recipe(write_recipe(models / "x.yaml", **stage("slerp")), models / "xx").folder
    )
    b, found = read_values(models / "b"), read_values(result.folder)
    for name, values in found.items():
        y = (x[name] + b[name]) / 2
        # rounded to bfloat16 twice: half a unit in the last place each time
        assert np.abs(values - (x[name] + 3 * y) / 4).max() <= 2 * 2.0**-8 * np.abs(values).max()


def test_what_lies_between_is_rounded_to_its_own_dtype(models: Path) -> None:
    between = stage("slerp", name="x", out_dtype="float32")
    file = documents(
        models / "r.yaml", between, {"models": {"x": {}}, "merge_method": "passthrough"}
    )
    plan = plan_recipe(file)
    assert {step.dtype for step in plan.steps} == {"F32"}


def test_making_what_lies_between_is_charged_for(models: Path) -> None:
    file = documents(models / "r.yaml", stage("ties", name="x"), final("ties", "x"))
    plain = make_budget(plan_recipe(write_recipe(models / "1.yaml", **stage("ties"))), "4GiB").peak
    assert make_budget(plan_recipe(file), "4GiB").peak > plain


def test_resolved_recipe_and_inputs_are_told(models: Path) -> None:
    file = documents(models / "r.yaml", stage("ties", name="x"), final("linear", "x"))
    told = json.loads((run_recipe(file, models / "out").folder / "mergetool.json").read_text())
    assert [recipe.get("name") for recipe in told["recipe"]] == ["x", None]
    assert {entry["model"] for entry in told["inputs"]} == {"x", "a", "b", "base"}
    assert set(told["input_sizes"]) == {"a", "b", "base"}
    again = documents(models / "again.yaml", *told["recipe"])
    assert plan_recipe(again).digest == told["plan"]


def test_the_same_command_finds_its_merge_done(models: Path) -> None:
    file = documents(models / "r.yaml", stage("ties", name="x"), final("linear", "x"))
    assert not run_recipe(file, models / "out").existed
    assert run_recipe(file, models / "out").existed


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([{"name": "x"}, {"name": "x"}, {"models": ["x"]}], "two documents are called 'x'"),
        (
            [{"name": "x", "models": ["y"]}, {"name": "y", "models": ["x"]}, {"models": ["x"]}],
            "from itself",
        ),
        ([{"name": "x", "models": ["x"]}, {"models": ["x"]}], "from itself"),
        ([{"name": "x"}, {"models": ["a"]}], "no other document merges its result"),
        ([{"name": "x"}, {"models": ["x"]}, {"models": ["x"]}], "a second document without name"),
    ],
)
def test_documents_that_make_no_sense_together(models: Path, recipes: Any, message: str) -> None:
    texts = []
    for keys in recipes:
        entries = [{"model": name} for name in keys.pop("models", ["a"])]
        texts.append(yaml.safe_dump({"models": entries, "merge_method": "passthrough"} | keys))
    (models / "r.yaml").write_text("---\n".join(texts))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(models / "r.yaml")
    assert f"{models / 'r.yaml'}:" in str(caught.value)


def test_models_that_do_not_fit_are_named_in_any_document(models: Path) -> None:
    family(models / "other", "z", like={"model.norm.weight": (4,)})
    between = {
        "models": {"a": {"weight": 1.0}, "other/z": {"weight": 1.0}},
        "merge_method": "linear",
    }
    file = documents(models / "r.yaml", between | {"name": "x"}, final("linear", "x"))
    with pytest.raises(PlanError, match="z: lacks tensor"):
        run_recipe(file, models / "out")
    assert not (models / "out.partial").exists()


def test_a_document_is_called_by_its_output_too(models: Path) -> None:
    between = stage("slerp") | {"out_path": "./models/between"}
    last = final("ties", "./models/between") | {"output": str(models / "out")}
    plan = plan_recipe(documents(models / "r.yaml", between, last))
    assert [model.label for model in plan.models if model.computed] == ["./models/between"]


@pytest.mark.parametrize("method", ["ties", "linear", "slerp"])
def test_nan_in_a_model_of_an_earlier_document_is_named(models: Path, method: str) -> None:
    name = "model.norm.weight"
    values = {key: value.astype("f4") for key, value in read_values(models / "b").items()}
    values[name][4] = np.nan
    write_model(models / "b", typed(values))
    own = {"weight": 1.0} if method != "slerp" else {}
    inner = METHODS[method] | {"models": {"a": own, "b": own}, "merge_method": method, "name": "x"}
    file = documents(models / "r.yaml", inner, {"models": {"x": {}}, "merge_method": "passthrough"})
    with pytest.raises(NonFiniteError, match=rf"^b: tensor '{name}' holds nan at \[4\]"):
        run_recipe(file, models / "out")


@pytest.mark.parametrize("key", ["shard_size: 1GB", "allow_nonfinite: true", "score: {}"])
def test_what_only_the_last_merge_can_say_is_refused_in_others(models: Path, key: str) -> None:
    file = documents(models / "r.yaml", stage("ties", name="x"), final("linear", "x"))
    file.write_text(key + "\n" + file.read_text())
    with pytest.raises(
        RecipeError, match=r"r\.yaml:1: \w+ is of no effect in a merge that is merged"
    ):
        plan_recipe(file)


def test_merges_that_would_be_made_over_and_over_are_refused(models: Path) -> None:
    """Each merges the two before it: the first would be made thousands of times."""
    names = ["a", "b", *(f"x{i}" for i in range(20))]
    recipes = [
        {
            "models": {one: {"weight": 1.0}, two: {"weight": 1.0}},
            "merge_method": "linear",
            "name": name,
        }
        for one, two, name in zip(names, names[1:], names[2:], strict=False)
    ]
    with pytest.raises(PlanError, match=r"each would be made \d+ times; write one of those"):
        plan_recipe(documents(models / "r.yaml", *recipes))
