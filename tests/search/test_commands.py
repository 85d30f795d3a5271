"""The commands of searches, as they are typed."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ran import Ran
from tiny_suite import tiny_suite

from merge.pipeline import run_recipe
from merge.search.opening import read_space
from merge.search.space import Choice
from merge.shipped import shipped

ROOT = Path(__file__).parents[2]
SEARCHES = [
    file
    for file in sorted(shipped("recipes").glob("*.yaml"))
    if "\nstudy:" in file.read_text(encoding="utf-8")
]
Command = Callable[..., Ran]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The shipped sweep on few documents."""
    data = yaml.safe_load((shipped("recipes") / "sweep-quickstart.yaml").read_text())
    data["study"] |= {"suite": str(tiny_suite(tmp_path / "suite")), "trials": 4, "limit": 3}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


@pytest.mark.parametrize("name", ["evolve", "sweep"])
def test_help_has_an_example_of_a_shipped_recipe(command: Command, name: str) -> None:
    told = command(name, "--help").out
    (example,) = [line.split() for line in told.splitlines() if "Example:" in line]
    assert example[1:3] == ["mergetool", name]
    assert example[3] in {file.stem for file in SEARCHES}


@pytest.mark.parametrize("recipe", SEARCHES, ids=lambda file: file.stem)
def test_a_shipped_search_says_how_it_is_run_and_its_candidates_can_be_planned(
    recipe: Path, command: Command, tmp_path: Path
) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert f"#     mergetool {recipe.stem.split('-')[0]} {recipe.stem} --trials " in text
    space, _ = read_space(recipe, {}, None)
    (variants,) = [d.count for d in space.dimensions() if d.name == "variants"] or [1]
    for number in range(variants):
        filled = space.filled(
            lambda d, n=number: (
                (n if d.name == "variants" else 0) if isinstance(d, Choice) else d.low
            )
        )
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(filled))
        assert command("plan", "one.yaml").code == 0


def test_the_same_seed_writes_the_same_recipes(sweep: Path, command: Command) -> None:
    ran = [command("sweep", sweep, "-o", name, *seed) for name, seed in RUNS.items()]
    assert [each.code for each in ran] == [0, 0, 0]
    one, same, other = (
        {file.name: file.read_bytes() for file in Path(name, "recipes").iterdir()} for name in RUNS
    )
    assert len(one) == 4
    assert one == same != other
    both = [Path(name, "outcome.json").read_bytes() for name in RUNS]
    assert both[0] == both[1]
    assert ran[0].out.replace("one", "same") == ran[1].out
    methods = {yaml.safe_load(text)["merge_method"] for text in one.values()}
    assert methods == {"slerp", "dare_ties"}


RUNS: dict[str, list[object]] = {"one": [], "same": [], "other": ["--seed", 4]}


def test_the_table_has_the_best_the_parents_and_their_average(
    sweep: Path, command: Command
) -> None:
    ran = command("sweep", sweep, "-o", "study", "--trials", 2)
    lines = ran.out.splitlines()
    assert lines[0].split() == ["candidate", "dev", "val", "test"]
    first = [line.split()[0] for line in lines[1:8]]
    assert sorted(first[:2]) == ["5", "6"]
    assert first[2:] == [*4 * ["parent"], "average"]
    assert sum(" * " in line for line in lines) == 1
    assert "the best parent" in ran.out
    assert lines[-1].endswith("study/recipes")
    assert ran.err == ""


def test_json_is_one_document_and_the_best_is_written(
    sweep: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the folder is the run's alone."""

    def alone(*given: Any, **more: Any) -> Any:
        with Path("study/study.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return run_recipe(*given, **more)

    monkeypatch.setattr("merge.pipeline.run_recipe", alone)
    arguments = ("sweep", sweep, "-o", "study", "--trials", 2, "--json", "--write", 1)
    ran = command(*arguments)
    told = json.loads(ran.out)
    assert told == json.loads(Path("study/outcome.json").read_text())
    best = told["top"][0]
    assert best["dev"]["mean"] == max(candidate["dev"]["mean"] for candidate in told["top"])
    assert told["winner"]["number"] in {candidate["number"] for candidate in told["top"]}
    assert {"val", "test"} <= told["winner"].keys()
    assert [rival["origin"] for rival in told["rivals"]][-1] == "average"
    assert 0 <= told["verdict"]["p"] <= 1
    folder = f"study/models/candidate-{best['number']}"
    card = Path(folder, "README.md").read_text()
    assert f"Candidate {best['number']} of a search (random, seed 17)" in card
    figures = (100 * best["dev"][key] for key in ("mean", "stderr"))
    assert "| dev, which was searched on | {:.1f} ± {:.1f} |".format(*figures) in card
    assert command("verify", folder).code == 0
    again = command(*arguments)
    assert json.loads(again.out) == told, "the same command finds all there"


def test_a_candidate_whose_models_share_an_ancestor_is_told(sweep: Path, command: Command) -> None:
    for name, others in {"x": ["reverser", "sorter"], "y": ["sorter", "scribe"]}.items():
        models = [{"model": f"zoo:{other}"} for other in others]
        recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        assert command("run", f"{name}.yaml", "-o", name).code == 0
    study = yaml.safe_load(sweep.read_text())["study"] | {"trials": 1}
    data = {"preset": "automerger", "models": ["./x", "./y"], "study": study}
    Path("auto.yaml").write_text(yaml.safe_dump(data))
    ran = command("sweep", "auto.yaml", "-o", "study", "--write", 1)
    assert (ran.code, "both come from zoo:sorter" in ran.err) == (0, True)
    (card,) = Path("study").glob("models/*/README.md")
    assert "both come from zoo:sorter" in card.read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "merge_method: linear\nmodels: [{model: zoo:base}]\n",
            "bad.yaml:1: nothing in it may vary",
        ),
        (
            "merge_method: linear\nmodels:\n- model: 'zoo:base'\n  parameters: {weight: {search: 1}}\n",
            "bad.yaml:4: models.0.parameters.weight: search must be two numbers",
        ),
        (
            "merge_method: linear\nmodels:\n- model: 'zoo:base'\n  parameters: {weight: {serach: [0, 1]}}\n",
            "bad.yaml:1: nothing in it may vary (did you mean 'search'?)",
        ),
        (
            "merge_method: linear\nmodels:\n- {model: A, parameters: {weight: {search: [0, .inf]}}}\n",
            "bad.yaml:3: models.0.parameters.weight: search must be two numbers",
        ),
        (
            "merge_method: linear\nmodels:\n- {model: A, parameters: {weight: {search: [0, 1], int: 3}}}\n",
            "bad.yaml:3: models.0.parameters.weight.int: int must be true or false",
        ),
        ("study: {sampler: best}\nmerge_method: linear\n", "bad.yaml:1: study.sampler is 'best'"),
        ("study: 3\nmerge_method: linear\n", "bad.yaml:1: study must be a table of keys"),
        ("a: 1\n---\nb: 1\n", "bad.yaml: has several documents"),
    ],
)
def test_a_wrong_search_is_one_line_and_writes_nothing(
    command: Command, text: str, told: str
) -> None:
    Path("bad.yaml").write_text(text)
    ran = command("evolve", "bad.yaml", "-o", "study")
    assert ran.code == 2
    assert told in ran.error
    assert not Path("study").exists()
    assert "cannot be read" in command("evolve", "missing.yaml").error


def test_a_merge_of_what_may_vary_is_refused_with_its_line(command: Command, sweep: Path) -> None:
    lines = (shipped("recipes") / "evolve-quickstart.yaml").read_text().splitlines()
    study = 1 + next(i for i, line in enumerate(lines) if line.startswith("study:"))
    for name in ("run", "plan"):
        told = command(name, "evolve-quickstart").error
        assert (
            f"evolve-quickstart.yaml:{study}: study: this is a search; run it with mergetool evolve"
            in told
        )
    place = "models.0.parameters.weight"
    Path("r.yaml").write_text("\n".join(line for line in lines if not line.startswith("study:")))
    number = 1 + next(i for i, line in enumerate(lines) if "search:" in line)
    assert f"r.yaml:{number}: {place}: this is a search" in command("run", "r.yaml").error
    Path("g.yaml").write_text("genome: {models: [a]}\n")
    assert "mergetool evolve" in command("run", "g.yaml").error


def test_no_library_says_anything_between_the_lines(sweep: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "merge.cli", "sweep", str(sweep), "-o", "study", "--trials", "1"],
        cwd=sweep.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("candidate ")
