"""A recipe names the same models wherever it is written."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_search import SPECIALISTS, searched
from tiny_suite import tiny_suite

from merge.errors import SourceError
from merge.pipeline import plan_recipe
from merge.search.places import moved
from merge.shipped import shipped

RECIPE: dict[str, Any] = {
    "merge_method": "linear",
    "base_model": "./m",
    "models": [{"model": "./m+ad"}, {"model": "zoo:base+ad"}, {"model": "owner/name"}],
    "slices": [{"sources": [{"model": "linear", "layer_range": [0, 1]}]}],
    "tokenizer": {
        "source": "base",
        "tokens": {"<a>": {"embed": "model:./m:<b>", "head": "model:zoo:base:<b>"}},
    },
    "chat_template": "file:t.jinja",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with folders `m`, `ad`, `base` and `linear` and a template; the current one is another."""
    for name in ("here/m", "here/ad", "here/base", "here/linear", "there", "elsewhere/far"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here/t.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "here"


def test_relative_names_are_written_from_the_other_folder(here: Path) -> None:
    found = moved(RECIPE, here, [here.parent / "there"])
    assert found == {
        "merge_method": "linear",
        "base_model": "../here/m",
        "models": [
            {"model": "../here/m+../here/ad"},
            {"model": "zoo:base+../here/ad"},
            {"model": "owner/name"},
        ],
        "slices": [{"sources": [{"model": "../here/linear", "layer_range": [0, 1]}]}],
        "tokenizer": {
            "source": "base",
            "tokens": {"<a>": {"embed": "model:../here/m:<b>", "head": "model:zoo:base:<b>"}},
        },
        "chat_template": "file:../here/t.jinja",
    }


def test_names_that_lead_there_already_stay_as_they_are(here: Path) -> None:
    assert moved(RECIPE, here, [here]) == RECIPE
    near = {"model": "far"}
    assert moved(near, here, [here.parent / "there", Path()]) == near
    assert moved(near, here, [here.parent / "there"]) == {"model": "../elsewhere/far"}


def test_a_name_of_two_folders_is_refused(here: Path) -> None:
    (here / "far").mkdir()
    with pytest.raises(SourceError, match=r"is both .* write the whole path"):
        moved({"model": "far"}, here, [here])


def test_what_a_search_reads_and_saves_runs_from_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model beside the search, a recipe to begin with in another folder, results in a third."""
    project, away = tmp_path / "project", tmp_path / "away"
    away.mkdir()
    (project / "models").mkdir(parents=True)
    (project / "models/own").symlink_to(shipped("evals/zoo") / "sorter")
    (project / "known").mkdir()
    known = {
        "merge_method": "linear",
        "models": [{"model": "../models/own"}, {"model": "zoo:base"}],
    }
    known["parameters"] = {"weight": 1.0}
    (project / "known/first.yaml").write_text(yaml.safe_dump(known))
    weight = {"weight": {"search": [0.2, 0.9]}}
    models = [{"model": m, "parameters": weight} for m in ("models/own", SPECIALISTS[0])]
    study = {"suite": str(tiny_suite(tmp_path / "suite")), "trials": 2, "limit": 2, "top": 2}
    study |= {"start": ["known/first.yaml"], "baselines": False}
    space = {"merge_method": "linear", "models": models, "study": study}
    file = project / "search.yaml"
    file.write_text(yaml.safe_dump(space))
    monkeypatch.chdir(away)
    candidates, outcome = searched(file, tmp_path / "results/study")
    outcome.save(tmp_path / "results/study")
    assert [c.origin for c in candidates] == ["start 1", "search"]
    for candidate in outcome.top:
        saved = tmp_path / f"results/study/recipes/candidate-{candidate.number}.yaml"
        folders = {model.folder.name for model in plan_recipe(saved).models}
        assert "sorter" in folders
