"""The command: one line per error, one document per --json, nothing heavy before it is needed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from families import contents, family, ties_recipe, typed, write_model, write_recipe
from ran import Ran

from merge.cli import main
from merge.errors import PlanError
from merge.methods import all_methods
from merge.score.models import candidate

Command = Callable[..., Ran]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return ties_recipe(tmp_path / "r.yaml", family(tmp_path, "a", "b"))


def modules_after(code: str, folder: Path, *heavy: str) -> set[str]:
    """Which of `heavy` a fresh interpreter has imported after `code`."""
    told = f"\nimport sys, json\nprint(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    ran = subprocess.run(
        [sys.executable, "-c", code + told],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_the_command_alone_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = (
        "torch",
        "transformers",
        "numpy",
        "pydantic",
        "yaml",
        "huggingface_hub",
        "safetensors",
        "merge.pipeline",
    )
    assert modules_after("import merge, merge.cli", tmp_path, *heavy) == set()


def test_a_plain_merge_imports_no_framework(recipe: Path) -> None:
    code = "from merge.cli import main\nmain(['run', 'r.yaml', '-o', 'out'], standalone_mode=False)"
    heavy = (
        "torch",
        "transformers",
        "peft",
        "lm_eval",
        "optuna",
        "matplotlib",
        "huggingface_hub",
        "datasets",
    )
    assert modules_after(code, recipe.parent, *heavy) == set()
    assert (recipe.parent / "out" / "model.safetensors").is_file()


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *main.commands])
def test_every_help_shows_an_example(command: Command, name: str) -> None:
    for option in ("--help", "-h"):
        ran = command(*([name] if name else []), option)
        assert ran.code == 0
        assert f"Example: mergetool {name}" in ran.out


def test_the_command_without_arguments_shows_its_help(command: Command) -> None:
    ran = command()
    assert "Example: mergetool run" in ran.out + ran.err
    assert len((ran.out + ran.err).splitlines()) > 5


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_method_is_documented_from_its_signature(command: Command, name: str) -> None:
    told = command("methods", name).out
    listed = json.loads(command("methods", name, "--json").out)[0]["parameters"]
    known = all_methods()[name].parameters
    assert all_methods()[name].when.split()[0] in told
    assert [p["name"] for p in listed] == list(known)
    for parameter in known.values():
        assert parameter.name in told
        assert parameter.text
        assert parameter.text in told


def test_all_methods_are_listed(command: Command) -> None:
    lines = command("methods").out.splitlines()
    assert [line.split()[0] for line in lines] == list(all_methods())
    assert "there are arcee_fusion" in command("methods", "tis").error


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "missing.yaml", "-o", "out"], "missing.yaml: cannot be read"),
        (["run", "no-such-recipe", "-o", "out"], "no such file, and no shipped recipe"),
        (["run", "r.yaml"], "r.yaml:1: no output"),
        (["run", "r.yaml", "-o", "out", "--memory", "lots"], "'lots' is not a size such as 512MiB"),
        (["run", "r.yaml", "-o", "out", "--memory", "5iB"], "not a size"),
        (["run", "r.yaml", "-o", "out", "--memory", "1MiB"], "is the least that would do"),
        (["run", "r.yaml", "-o", "out", "--threads", "0"], "--threads"),
        (["run", "r.yaml", "-o", "out", "--nonsense"], "--nonsense"),
        (["run"], "RECIPE"),
        (["--nonsense"], "--nonsense"),
        (["walk"], "walk"),
        (["plan", "r.yaml", "--tensor", "nothing"], "no tensor's name contains 'nothing'"),
        (["plan", "wrong.yaml"], "wrong.yaml:"),
        (["plan", "absent.yaml"], "./absent"),
        (["plan", "hub.yaml"], "no such folder"),
        (["verify", "missing"], "missing"),
        (["verify", "r.yaml"], "r.yaml"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    recipe: Path, command: Command, arguments: list[str], part: str
) -> None:
    write_recipe(recipe.with_name("wrong.yaml"), models={"a": {"wieght": 1}}, merge_method="linear")
    write_recipe(
        recipe.with_name("absent.yaml"), models={"./absent": {"weight": 1}}, merge_method="linear"
    )
    write_recipe(
        recipe.with_name("hub.yaml"), models={"not a model": {"weight": 1}}, merge_method="linear"
    )
    before = contents(recipe.parent)
    ran = command(*arguments)
    assert part in ran.error
    assert ran.code == 2
    assert contents(recipe.parent) == before


def test_debug_shows_the_traceback(recipe: Path, command: Command) -> None:
    with pytest.raises(PlanError):
        command("--debug", "run", recipe)


def test_a_mistake_of_ours_is_one_line_too(
    recipe: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops\nand more")

    monkeypatch.setattr("merge.pipeline.run_recipe", broken)
    ran = command("run", recipe, "-o", "out")
    assert ran.code == 1
    assert "unexpected KeyError" in ran.error
    assert "--debug" in ran.error


@pytest.mark.parametrize(("value", "part"), [(7e4, "overflows F16"), (float("nan"), "holds nan")])
def test_an_error_of_the_arithmetic_is_one_line_without_warnings(
    tmp_path: Path, value: float, part: str
) -> None:
    write_model(tmp_path / "m", typed({"w": np.array([[1.0, value]], dtype="<f4")}))
    write_recipe(
        tmp_path / "r.yaml",
        models={"m": {"weight": 1.0}},
        merge_method="linear",
        out_dtype="float16",
    )
    ran = subprocess.run(
        [sys.executable, "-m", "merge.cli", "run", "r.yaml", "-o", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1, ran.stderr
    assert part in ran.stderr


def test_errors_go_to_stderr_as_one_line_in_a_real_process(recipe: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "merge.cli", "run", "r.yaml", "-o", "a"],
        cwd=recipe.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines() == [
        "mergetool: a: is or lies in the folder of a; choose another output"
    ]


# -- what is printed -------------------------------------------------------------------------------


def test_a_plan_shows_the_resolved_parameters_and_writes_nothing(
    recipe: Path, command: Command
) -> None:
    before = contents(recipe.parent)
    ran = command("plan", recipe, "--tensor", "layers.1.mlp", "-o", "out")
    assert ran.code == 0
    assert "ties of 2 models on a base, 9 tensors" in ran.out
    line = next(line for line in ran.out.splitlines() if line.startswith("model.layers.1.mlp"))
    assert "weight=[0.5, 0.5]" in line
    assert "density=[0.6, 0.6]" in line
    assert "normalize=True" in line
    assert "projected peak" in ran.out
    assert contents(recipe.parent) == before


@pytest.mark.parametrize(
    ("section", "told"),
    [("{energy: 0.5}", "an adapter to out"), ("{rank: 4}", "an adapter of rank 4 at most")],
)
def test_a_plan_of_an_adapter_does_not_promise_a_model(
    tmp_path: Path, command: Command, section: str, told: str
) -> None:
    (tmp_path / "r.yaml").write_text(
        f"merge_method: passthrough\nbase_model: zoo:base\nadapter: {section}\n"
        "models: [{model: 'zoo:scribe'}]\n"
    )
    assert f"writes         {told}" in command("plan", "r.yaml", "-o", "out").out
    assert json.loads(command("plan", "r.yaml", "--json").out)["write_bytes"] is None


def test_json_is_one_document(recipe: Path, command: Command) -> None:
    planned = json.loads(command("plan", recipe, "--json", "--tensor", "lm_head").out)
    assert planned["tensors"]["lm_head.weight"]["parameters"]["density"] == [0.6, 0.6]
    assert planned["read_bytes"] == 3 * planned["write_bytes"]
    run = json.loads(command("run", recipe, "-o", "out", "--json").out)
    assert (run["existed"], run["plan"]) == (False, planned["plan"])
    assert json.loads(command("run", recipe, "-o", "out", "--json").out)["existed"]
    verified = json.loads(command("verify", "out", "--json").out)
    assert verified["digests"] == "all equal"
    assert len(json.loads(command("methods", "--json").out)) == len(all_methods())


def test_a_run_says_what_it_wrote_and_a_second_one_that_it_is_there(
    recipe: Path, command: Command
) -> None:
    first, second = command("run", recipe, "-o", "out"), command("run", recipe, "-o", "out")
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("out: written and verified: 9 tensors")
    assert second.out.startswith("out: is this merge already; verified: 9 tensors")
    assert command("verify", "out").out.startswith("out: 9 tensors")


def test_notes_go_to_stderr(recipe: Path, command: Command) -> None:
    config = recipe.parent / "a" / "config.json"
    base = recipe.parent / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5.0}))
    base.write_text(json.dumps(json.loads(base.read_text()) | {"rope_theta": 6.0}))
    ran = command("run", recipe, "-o", "out")
    assert ran.code == 0
    assert ran.err.startswith("note: a: rope_theta is 5.0")


def test_relative_models_are_found_beside_the_recipe(
    recipe: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = recipe.parent / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    assert command("run", recipe, "-o", "out").code == 0
    assert (place / "out" / "config.json").is_file()


def test_a_folder_is_opened_for_scoring_by_its_name(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert candidate("a", offline=True) == (recipe.parent / "a").resolve()
