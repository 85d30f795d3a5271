"""A search begins with what it is told: recipes, whole or in files, and values of what varies."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_search import searched
from tiny_suite import tiny_suite

from merge.errors import RequestError
from merge.search.opening import open_study

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
    tried = candidates[3:]
    assert [c.origin for c in tried] == ["start 2", "start 3", "search", "search"]
    assert [c.recipe for c in tried[:2]] == [TIES, SLERP]
    assert [m["parameters"]["weight"] for m in tried[2].recipe["models"]] == [0.5, 0.75]
    assert {c.number for c in outcome.top} == {c.number for c in tried}, "they may win"
    outcome.save(tmp_path / "study")
    again = yaml.safe_load((tmp_path / "study/recipes/candidate-4.yaml").read_text())
    assert again == SLERP
    longer, _ = searched(written(tmp_path, suite, [values, TIES, "known.yaml"], 6))
    assert [c.recipe for c in longer[:7]] == [c.recipe for c in candidates]


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (["absent.yaml"], "no file 'absent.yaml'"),
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
