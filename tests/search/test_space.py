"""What may vary in a recipe, and the plain recipe that values of it give."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.errors import RecipeError
from merge.lines import load_documents
from merge.recipe import parse_recipe
from merge.search.space import Choice, Dimension, Real, Space, varying

SPACE = """
base_model: base
variants:
  - merge_method: ties
    parameters: {lambda: {search: [0.5, 2.0], log: true}}
  - merge_method: linear
    parameters: {normalize: {choice: [true, false]}}
models:
  - model: {choice: [a, b]}
    parameters: {weight: {search: [0.0, 1.0], points: 3}}
  - model: c
    parameters:
      weight:
        - {filter: mlp, value: {search: [0.0, 1.0]}}
        - {value: {search: [0, 3], int: true}}
"""


def space_of(text: str) -> Space:
    ((data, lines),) = load_documents(text, "space.yaml")
    return Space(data, lines)


def low(dimension: Dimension) -> float:
    return 0 if isinstance(dimension, Choice) else dimension.low


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_what_is_filled_in_is_a_plain_recipe_that_values_stay_in_range(data: st.DataObject) -> None:
    asked: dict[str, float] = {}

    def answer(dimension: Dimension) -> float:
        assert dimension.name not in asked, "asked twice"
        if isinstance(dimension, Choice):
            asked[dimension.name] = data.draw(st.integers(0, dimension.count - 1))
        elif isinstance(dimension, Real):
            asked[dimension.name] = data.draw(st.floats(dimension.low, dimension.high))
        else:
            asked[dimension.name] = data.draw(st.integers(dimension.low, dimension.high))
        return asked[dimension.name]

    space = space_of(SPACE)
    filled = space.filled(answer)
    assert varying(filled) is None
    assert "variants" not in filled
    parse_recipe(yaml.safe_dump(filled))
    weights = filled["models"][0]["parameters"]["weight"]
    assert len(weights) == 3
    assert all(0 <= w <= 1 for w in weights)
    assert asked.keys() <= {dimension.name for dimension in space.dimensions()}


def test_dimensions_of_every_option_are_known() -> None:
    names = [dimension.name for dimension in space_of(SPACE).dimensions()]
    assert sorted(names) == sorted(
        [
            *(f"models.0.parameters.weight.{i}" for i in range(3)),
            *(
                "models.0.model",
                "models.1.parameters.weight.0.value",
                "models.1.parameters.weight.1.value",
            ),
            *("variants", "variants.0.parameters.lambda", "variants.1.parameters.normalize"),
        ]
    )


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_models_of_a_pool_are_different_ones(picks: list[int]) -> None:
    space = space_of("models: {pool: [a, b, c, d], pick: 3, parameters: {weight: 1.0}}")
    order = iter(picks)
    found = [entry["model"] for entry in space.filled(lambda _: next(order))["models"]]
    assert len(set(found)) == 3
    assert found[0] == "abcd"[picks[0]]


def test_the_first_of_a_pool_is_the_base_where_no_other_is_given() -> None:
    pool = "models: {pool: [a, b], pick: 2, base: first}\nvariants: [{}, {base_model: other}]"
    for number, base in enumerate(["b", "other"]):
        filled = space_of(pool).filled(lambda d, n=number: n if d.name == "variants" else 1)
        assert filled["base_model"] == base


def test_names_of_tokens_and_modules_do_not_vary() -> None:
    text = "tokenizer: {tokens: {search: {embed: mean}, choice: {head: mean}}}\nmodules: {path: {}}"
    ((data, _),) = load_documents(text, "recipe.yaml")
    assert varying(data) is None


def test_a_path_is_layers_that_follow_one_another() -> None:
    space = space_of("slices: {path: {models: [a, b], layers: 4}}")
    without = {"slices.path.0.a.3", "slices.path.0.b.0", "slices.path.0.b.2"}
    filled = space.filled(lambda dimension: dimension.name not in without)
    assert [source for piece in filled["slices"] for source in piece["sources"]] == [
        {"model": "a", "layer_range": [0, 3]},
        {"model": "b", "layer_range": [1, 2]},
        {"model": "b", "layer_range": [3, 4]},
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: {search: [1, 0]}", "a is|must be less"),
        ("a: {search: [1]}", r"two numbers"),
        ("a: {search: [0, 1], log: true}", "above 0"),
        ("a: {search: [0, 1], points: 1}", "whole number from 2"),
        ("a: {search: [0, 1], pints: 3}", "unknown key 'pints'"),
        ("a: {choice: []}", "a list of what to choose from"),
        ("models: {pool: [a], pick: 2}", "from 1 to 1"),
        ("models: {pool: [a, b], base: last}", "base must be first"),
        ("slices: {path: {models: [a], layers: 0}}", "whole number from 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(text: str, what: str) -> None:
    with pytest.raises(RecipeError, match=f"space.yaml:2: .*({what})"):
        space_of(f"merge_method: linear\n{text}").filled(low)
