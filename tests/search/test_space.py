"""What may vary in a recipe, and the plain recipe that values of it give."""

from itertools import product
from typing import Any

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


@given(st.data())
def test_models_of_a_pool_are_different_ones(data: st.DataObject) -> None:
    space = space_of("models: {pool: [a, b, c, d], pick: 3, parameters: {weight: 1.0}}")
    asked: dict[str, int] = {}

    def answer(dimension: Dimension) -> float:
        assert isinstance(dimension, Choice)
        asked[dimension.name] = data.draw(st.integers(0, dimension.count - 1))
        return asked[dimension.name]

    found = [entry["model"] for entry in space.filled(answer)["models"]]
    assert len(set(found)) == 3
    assert found[0] == "abcd"[asked["models.0.model"]]
    assert list(space.models_picked(asked).values()) == found
    assert asked.keys() <= {dimension.name for dimension in space.dimensions()}


def test_every_pair_of_a_pool_is_as_likely() -> None:
    """Counted over all answers, each weighed by how likely it is."""
    space, pairs = space_of("models: {pool: [a, b, c, d], pick: 2}"), dict[str, float]()
    for first, second, other in product(range(4), range(4), range(3)):
        answers = {"models.0.model": first, "models.1.model": second, "models.1.other": other}
        filled = space.filled(lambda d, answers=answers: answers.get(d.name, 0))  # type: ignore[misc]
        pair = "".join(entry["model"] for entry in filled["models"])
        pairs[pair] = pairs.get(pair, 0) + 1 / (4 * 4 * 3)
    assert len(pairs) == 12
    assert list(pairs.values()) == pytest.approx([1 / 12] * 12)


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=6), st.data())
def test_a_place_between_0_and_1_is_a_thing_by_its_share(
    shares: list[float], data: st.DataObject
) -> None:
    choice = Choice("a", tuple(map(str, shares)), tuple(shares))
    number = data.draw(st.integers(0, len(shares) - 1))
    assert choice.at(choice.middle(number)) == number
    assert choice.at(0.0) == 0
    assert choice.at(1.0) == len(shares) - 1


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
        ("a: {search: [0.5, 3], int: true}", r"with int both must be whole"),
        ("a: {search: [0, 1], points: 1}", "whole number from 2"),
        ("a: {search: [0, 1], pints: 3}", "unknown key 'pints'"),
        ("a: {choice: []}", "a list of what to choose from"),
        ("a: {choice: [x, y], probabilities: [1]}", "2 numbers above 0"),
        ("a: {choice: [x, y], probabilities: [1, 0]}", "2 numbers above 0"),
        ("variants: [{probability: 1}, {}]", "above 0, in each or in none"),
        ("variants: [3]", "a list of parts of a recipe"),
        ("models: {pool: [a], pick: 2}", "from 1 to 1"),
        ("models: {pool: [a, b], base: last}", "base must be first"),
        ("slices: {path: {models: [a], layers: 0}}", "whole number from 1"),
        ("slices: {path: {models: [a], layers: [3, 4]}}", "one number, or 1"),
        ("slices: {path: {models: [a], layers: 3, places: 2, repeats: 2}}", "keep one"),
        ("slices: {path: 3}", "a table of models, layers"),
        ("slices: {groups: {models: [a], layers: [3]}}", "layers must be one number"),
        ("slices: {groups: {models: [a], layers: 3, places: 3}}", "unknown key 'places'"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(text: str, what: str) -> None:
    with pytest.raises(RecipeError, match=f"space.yaml:2: .*({what})"):
        space_of(f"merge_method: linear\n{text}").filled(low)


def sources(filled: dict[str, Any]) -> list[tuple[str, list[int]]]:
    pieces = [source for piece in filled["slices"] for source in piece["sources"]]
    return [(source["model"], source["layer_range"]) for source in pieces]


@given(st.data())
def test_at_each_place_is_any_layer_of_any_model_or_none(data: st.DataObject) -> None:
    space = space_of("slices: {path: {models: [a, b], layers: [4, 6], places: 5}}")
    chosen: list[str] = []

    def answer(dimension: Dimension) -> float:
        assert isinstance(dimension, Choice)
        assert dimension.count == 4 + 6 + 1
        number = data.draw(st.integers(0, dimension.count - 1))
        chosen.append(dimension.labels[number])
        return number

    found = sources(space.filled(answer))
    layers = [f"{model} {n}" for model, (first, end) in found for n in range(first, end)]
    assert layers == [label for label in chosen if label != "no layer"]
    assert len(found) <= len(layers)


def test_blocks_of_layers_are_taken_together() -> None:
    path = "slices: {path: {models: [a], layers: 5, block: 2, repeats: 2}}"
    assert len(space_of(path).dimensions()) == 2 * 3
    without = {"slices.path.0.a.2", "slices.path.1.a.0"}
    filled = space_of(path).filled(lambda dimension: dimension.name not in without)
    assert sources(filled) == [("a", [0, 2]), ("a", [4, 5]), ("a", [2, 5])]


GROUPS = """
merge_method: ties
base_model: base
slices:
  groups:
    layers: 5
    block: 2
    models: [{model: a, parameters: {weight: {search: [0.0, 1.0]}}}, {model: b}]
    parameters:
      weight: [{filter: mlp, value: {search: [0.0, 1.0]}}, {value: 0.5}]
"""


def test_groups_of_layers_have_values_of_their_own() -> None:
    space = space_of(GROUPS)
    names = [dimension.name for dimension in space.dimensions()]
    own, shared = "sources.0.parameters.weight", "parameters.weight.0.value"
    assert names == [f"slices.{i}.{name}" for i in range(3) for name in (own, shared)]
    filled = space.filled(lambda dimension: 0.1 * (1 + names.index(dimension.name)))
    assert sources(filled)[::2] == [("a", [0, 2]), ("a", [2, 4]), ("a", [4, 5])]
    pieces = filled["slices"]
    assert [p["sources"][0]["parameters"]["weight"] for p in pieces] == pytest.approx(
        [0.1, 0.3, 0.5]
    )
    assert [p["parameters"]["weight"][0]["value"] for p in pieces] == pytest.approx([0.2, 0.4, 0.6])
    parse_recipe(yaml.safe_dump(filled))


def test_tables_to_choose_from_are_shown_by_what_they_name() -> None:
    space = space_of(
        "variants: [{merge_method: ties, parameters: {density: 0.5}}, {dtype: float32}]"
    )
    (choice,) = space.dimensions()
    assert isinstance(choice, Choice)
    assert choice.labels == ("ties", "{'dtype': 'float32'}")
