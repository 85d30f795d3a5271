"""AutoMerger's choice is a plain space: two models, two ways, each as often as it draws them."""

from collections import Counter

import pytest
import yaml

from merge.errors import RecipeError
from merge.lines import load_documents
from merge.recipe import parse_recipe
from merge.search.asking import Asker
from merge.search.automerger import expanded
from merge.search.sections import StudySection
from merge.search.space import Space

POOL = [f"m{i}" for i in range(12)]


def space_of(text: str) -> Space:
    ((data, lines),) = load_documents(text, "auto.yaml")
    return Space(expanded(data, lines), lines)


def test_both_ways_are_drawn_as_often_as_they_should_and_every_model_is() -> None:
    space = space_of(f"preset: automerger\nmodels: {POOL}\n")
    asker = Asker(space, StudySection(sampler="random", seed=1))
    found = [answer[0] for answer in map(asker.ask, range(150)) if answer]
    assert len(found) == 150
    methods = Counter(recipe["merge_method"] for recipe in found)
    assert methods["slerp"] / 150 == pytest.approx(0.4, abs=0.1)
    assert {entry["model"] for recipe in found for entry in recipe["models"]} == set(POOL)
    for recipe in found:
        names = [entry["model"] for entry in recipe["models"]]
        assert len(set(names)) == 2
        assert recipe["base_model"] == names[0]
        parse_recipe(yaml.safe_dump(recipe))


def test_a_candidate_is_what_automerger_would_write() -> None:
    space = space_of("preset: automerger\nmodels: {pool: [a, b]}\nout_dtype: bfloat16\n")
    slerp, dare = (
        space.filled(lambda d, way=way: way if d.name == "variants" else 0) for way in (0, 1)
    )
    common = {"base_model": "a", "models": [{"model": "a"}, {"model": "b"}]}
    common["out_dtype"] = "bfloat16"
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    assert slerp == common | {"merge_method": "slerp", "parameters": {"t": t}}
    values = {"density": 0.53, "weight": 0.6, "seed": 0}
    assert dare == common | {"merge_method": "dare_ties", "parameters": values}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("preset: automerge\nmodels: [a, b]", "1: preset is 'automerge' .did you mean"),
        ("preset: automerger\nmodels: [a]", "2: models must be a list of two or more"),
        ("preset: automerger\nmodels: [a, a]", "2: models must be a list of two or more"),
        ("preset: automerger\nmodels: [{model: a}, b]", "2: models must be a list of two or more"),
        ("preset: automerger", "1: models must be a list of two or more"),
        ("preset: automerger\nmodels: [a, b]\nmerge_method: ties", "3: merge_method: automerger"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=f"auto.yaml:{told}"):
        space_of(text)
