"""A merge of merges is seen: who comes from whom, as the provenance of the models tells."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ran import Ran

from merge.pipeline import plan_recipe, run_recipe
from merge.shipped import shipped
from merge.verify import PROVENANCE

Command = Callable[..., Ran]


def merged(folder: Path, *models: str, **recipe: object) -> Path:
    file = folder.with_suffix(".yaml")
    data = {"merge_method": "linear", "models": [{"model": m} for m in models], **recipe}
    data["parameters"] = {"weight": 1.0}
    file.write_text(yaml.safe_dump(data))
    return run_recipe(file, folder).folder


def told(folder: Path, *models: object, **recipe: object) -> list[str]:
    file = folder / "told.yaml"
    data = {"merge_method": "linear", "models": [{"model": str(m)} for m in models]}
    file.write_text(yaml.safe_dump(data | {"parameters": {"weight": 1.0}} | recipe))
    notes = plan_recipe(file).notes
    return [note.removeprefix("a merge of merges: ") for note in notes if "of merges" in note]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x and y share a parent, z shares none with them; xz is a merge of x and z."""
    folder = tmp_path_factory.mktemp("family")
    merged(folder / "x", "zoo:reverser", "zoo:sorter")
    merged(folder / "y", "zoo:sorter", "zoo:chemist")
    merged(folder / "z", "zoo:scribe", "zoo:base")
    merged(folder / "xz", str(folder / "x"), str(folder / "z"))
    return folder


def test_two_merges_of_one_model_are_noted(family: Path) -> None:
    x, y, z = family / "x", family / "y", family / "z"
    assert told(family, x, y) == ["x and y both come from zoo:sorter"]
    assert told(family, x, z) == []
    assert told(family, x, y, z) == ["x and y both come from zoo:sorter"]


def test_a_merge_with_one_of_its_ancestors_is_noted(family: Path) -> None:
    x, xz = family / "x", family / "xz"
    assert told(family, "zoo:sorter", x) == ["x comes from zoo:sorter"]
    assert told(family, xz, x) == ["xz comes from x"]
    assert told(family, "zoo:reverser", xz) == ["xz comes from zoo:reverser"], "two merges ago"
    assert told(family, "zoo:chemist", xz) == []


def test_what_all_come_from_anyway_is_no_news(family: Path, tmp_path: Path) -> None:
    one, two = (
        merged(tmp_path / name, f"zoo:{name}", base_model="zoo:base", merge_method="task_arithmetic")
        for name in ("scribe", "chemist")
    )  # fmt: skip
    based = {"merge_method": "task_arithmetic", "base_model": "zoo:base"}
    assert told(tmp_path, one, two, **based) == []
    assert told(tmp_path, one, two) == ["scribe and chemist both come from zoo:base"]


def test_a_model_is_known_by_its_tensors_and_not_by_the_name_of_its_folder(
    family: Path, tmp_path: Path
) -> None:
    shutil.copytree(family / "x", tmp_path / "renamed")
    assert told(family, family / "xz", tmp_path / "renamed") == ["xz comes from renamed"]
    shutil.copytree(family / "y", tmp_path / "x")
    assert told(family, family / "xz", tmp_path / "x") == [
        "xz and x both come from zoo:sorter",
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", '{"inputs": 3}', '{"inputs": [3, {"model": 4}], "ancestry": [1]}', "[" * 9999),
        json.dumps({"ancestry": {"a": {"inputs": None}}, "outputs": {"w": 3}, "inputs": [{}]}),
        json.dumps({"inputs": [{"model": "\ud800"}], "ancestry": {"\ud800": {}}}),
        json.dumps({"outputs": {"\ud800": {"digest": "\ud800"}}}),
    ],
)
def test_a_damaged_provenance_tells_nothing(tmp_path: Path, family: Path, text: str) -> None:
    shutil.copytree(shipped("evals/zoo/sorter"), tmp_path / "odd")
    (tmp_path / "odd" / PROVENANCE).write_text(text)
    assert told(tmp_path, tmp_path / "odd", family / "x") == []


def test_names_that_others_wrote_do_not_move_the_cursor(tmp_path: Path) -> None:
    text = json.dumps({"inputs": [{"model": "\x1b[2Jhidden\n"}]})
    for name in "ab":
        shutil.copytree(shipped("evals/zoo/sorter"), tmp_path / name)
        (tmp_path / name / PROVENANCE).write_text(text)
    assert told(tmp_path, tmp_path / "a", tmp_path / "b") == [
        "a and b both come from ?[2Jhidden? (same name)"
    ]


def read(name: str, digest: str = "", tensors: int = 5) -> str:
    """A provenance that tells of one model that was read."""
    return json.dumps({"inputs": [{"model": name, "digest": digest, "tensors": tensors}]})


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (read("m"), read("m"), ["a and b both come from m (same name)"]),
        (read("m", "d", 4), read("m", "e"), ["a and b both come from m (same name)"]),
        (read("m", "d"), read("m", "e"), []),
        (read("m", "d"), read("n", "d"), ["a and b both come from m"]),
        (read("m", "d", 0), read("n", "d", 0), []),
        (read("zoo:clerk"), read("zoo:clerk"), ["a and b both come from zoo:clerk"]),
    ],
)
def test_tensors_say_more_than_the_name_of_a_folder(
    one: str, other: str, found: list[str], tmp_path: Path
) -> None:
    for name, text in (("a", one), ("b", other)):
        shutil.copytree(shipped("evals/zoo/sorter"), tmp_path / name)
        (tmp_path / name / PROVENANCE).write_text(text)
    assert told(tmp_path, tmp_path / "a", tmp_path / "b") == found


def test_where_only_the_name_says_who_it_comes_from_that_is_said(tmp_path: Path) -> None:
    for name in ("m", "merged"):
        shutil.copytree(shipped("evals/zoo/sorter"), tmp_path / name)
    (tmp_path / "merged" / PROVENANCE).write_text(read("m", "d"))
    pair = tmp_path / "m", tmp_path / "merged"
    assert told(tmp_path, *pair) == ["merged comes from m (same name)"]


def test_the_plan_says_it_and_what_is_written_can_be_verified(
    family: Path, command: Command
) -> None:
    models = [{"model": str(family / name)} for name in "xy"]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    ran = command("plan", "r.yaml")
    assert "note: a merge of merges: x and y both come from zoo:sorter" in ran.err
    assert command("run", "r.yaml", "-o", "out").code == 0
    assert command("verify", "out").code == 0
    earlier = json.loads(Path("out", PROVENANCE).read_text())["ancestry"]
    assert [entry["model"] for entry in earlier["x"]["inputs"]] == ["zoo:reverser", "zoo:sorter"]
