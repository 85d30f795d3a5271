"""A search begins with what it is told: recipes, whole or in files, and values of what varies."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_search import searched
from tiny_suite import tiny_suite

from merge.errors import RequestError
from merge.lines import load_documents
from merge.search.asking import Asker
from merge.search.opening import open_study, read_space
from merge.search.sections import StudySection
from merge.search.space import Space
from merge.search.starts import check_starts, with_values

TIES = {
    "base_model": "zoo:base",
    "merge_method": "ties",
    "models": [{"model": "zoo:reverser"}, {"model": "zoo:sorter"}],
    "parameters": {"weight": 0.9, "density": 0.4},
}
SLERP = {
    "base_model": "zoo:reverser",
    "merge_method": "slerp",
    "models": [{"model": "zoo:reverser"}, {"model": "zoo:scribe"}],
    "parameters": {"t": 0.5},
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_suite(tmp_path_factory.mktemp("suites") / "tiny")


def written(folder: Path, suite: Path, start: list[Any], trials: int = 4) -> Path:
    weight = {"weight": {"search": [0.2, 1.5]}}
    space = TIES | {"models": [{"model": m["model"], "parameters": weight} for m in TIES["models"]]}  # type: ignore[index]
    study = {"suite": str(suite), "trials": trials, "limit": 4, "top": 4, "start": start}
    folder.mkdir(exist_ok=True)
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(space | {"study": study}, sort_keys=False))
    return file


def test_recipes_come_first_then_values_then_what_is_drawn(tmp_path: Path, suite: Path) -> None:
    (tmp_path / "known.yaml").write_text(yaml.safe_dump(SLERP | {"output": "out/known"}))
    values = {"models.0.parameters.weight": 0.5, "models.1.parameters.weight": 0.75}
    file = written(tmp_path, suite, [values, TIES, "known.yaml"])
    candidates, outcome = searched(file)
    parents = [f"parent {model}" for model in ("zoo:reverser", "zoo:sorter", "zoo:scribe")]
    assert [c.origin for c in candidates[:4]] == [*parents, "average"], "of recipes they are rivals"
    assert [c.recipe["model"] for c in candidates[:3]] == [
        "zoo:reverser",
        "zoo:sorter",
        "zoo:scribe",
    ]
    assert len(candidates[3].recipe["models"]) == 2, "the average is of what may be merged"
    assert {c.number for c in outcome.rivals} == set(range(4))
    tried = candidates[4:]
    assert [c.origin for c in tried] == ["start 2", "start 3", "search", "search"]
    assert [c.recipe for c in tried[:2]] == [TIES, SLERP]
    assert [m["parameters"]["weight"] for m in tried[2].recipe["models"]] == [0.5, 0.75]
    assert {c.number for c in outcome.top} == {c.number for c in tried}, "they may win"
    outcome.save(tmp_path / "study")
    again = yaml.safe_load((tmp_path / "study/recipes/candidate-5.yaml").read_text())
    assert again == SLERP
    longer, _ = searched(written(tmp_path, suite, [values, TIES, "known.yaml"], 6))
    assert [c.recipe for c in longer[:8]] == [c.recipe for c in candidates]


SPACE = """
merge_method: {choice: [linear, ties]}
models: {pool: [a, b, c], pick: 2, parameters: {weight: {search: [0.1, 2.0], log: true}}}
parameters: {lambda: {search: [0.5, 1.5], points: 2}, normalize: {choice: [true, false]}}
"""


def test_a_recipe_that_the_space_may_give_is_placed_in_it() -> None:
    """So the optimiser learns from it; whatever it cannot give stays a recipe."""
    ((data, lines),) = load_documents(SPACE, "space.yaml")
    space = Space(data, lines)
    asker = Asker(space, StudySection(sampler="tpe", seed=3))
    for number in range(12):
        answer = asker.ask(number)
        assert answer is not None
        recipe, asked = answer
        others = [recipe | {"dtype": "float32"}, recipe | {"models": recipe["models"][:1]}]
        others.append(recipe | {"parameters": recipe["parameters"] | {"lambda": [0.5, 1.6]}})
        others.append(recipe | {"merge_method": "slerp"})
        whole = recipe["parameters"] | {"lambda": [1, 1]}  # whole numbers as people write them
        ones = with_values(StudySection(start=[recipe | {"parameters": whole}]), space).start[0]
        assert (ones["parameters.lambda.0"], ones["parameters.lambda.1"]) == (1.0, 1.0)  # type: ignore[index]
        start = [recipe | {"output": "out"}, *others, {"models.0.model": 1}]
        found = with_values(StudySection(start=start), space).start
        assert found[1:] == start[1:]
        # rounded as in a recipe, and a model that was taken is another way to say which
        assert isinstance(found[0], dict)
        assert found[0].keys() <= asked.keys()
        assert space.filled(lambda d, values=found[0]: values[d.name]) == recipe  # type: ignore[misc]


GROUPED = """
merge_method: linear
slices:
  groups:
    layers: 5
    block: 2
    models: [{model: a, parameters: {weight: {search: [0.0, 1.0]}}}, {model: b}]
    parameters:
      weight: [{filter: mlp, value: {search: [0.0, 1.0]}}, {value: {search: [0.0, 1.0]}}]
"""


def test_values_of_rules_and_of_groups_are_named_by_their_places() -> None:
    ((data, lines),) = load_documents(GROUPED, "space.yaml")
    space = Space(data, lines)
    dimensions = {dimension.name: dimension for dimension in space.dimensions()}
    values = {
        "slices.2.sources.0.parameters.weight": 0.25,
        "slices.1.parameters.weight.1.value": 0.5,
    }
    section = with_values(StudySection(start=[values], sampler="tpe"), space)
    check_starts(section, dimensions, lines)
    answer = Asker(space, section).ask(0)
    assert answer is not None
    recipe, _ = answer
    assert recipe["slices"][2]["sources"][0]["parameters"]["weight"] == 0.25
    assert recipe["slices"][1]["parameters"]["weight"][1]["value"] == 0.5


def test_a_shipped_recipe_is_found_by_its_name(tmp_path: Path, suite: Path) -> None:
    _, section = read_space(written(tmp_path, suite, ["soup"]), {}, None)
    (soup,) = section.start
    assert isinstance(soup, dict)
    assert [entry["model"] for entry in soup["models"]][::3] == ["zoo:reverser", "zoo:scribe"]


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (["absent.yaml"], "no file 'absent.yaml'"),
        (["soupe"], "no shipped one of that name .did you mean 'soup'"),
        ([SLERP | {"parameters": {"t": {"search": [0, 1]}}}], "parameters.t may vary"),
        ([SLERP | {"merge_method": "slrp"}], "slrp"),
        ([SLERP | {"models": [{"model": "./absent"}]}], "absent"),
    ],
)
def test_what_is_no_recipe_is_refused_before_anything_is_written(
    tmp_path: Path, suite: Path, start: list[Any], told: str
) -> None:
    file = written(tmp_path, suite, start)
    with pytest.raises(RequestError, match=told), open_study(file, tmp_path / "study"):
        pass
    assert not (tmp_path / "study").exists()
