"""The README's commands and examples do what it says, in its order."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ran import Ran

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _lines(language: str) -> list[str]:
    return [line for block in blocks(language) for line in block.splitlines()]


def test_recipe_commands_and_python_run_as_written(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    """In this process, which has the libraries loaded; the first command and Python as a shell runs them."""
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    lines = [line for line in _lines("sh") if line.startswith("mergetool")]
    assert len(lines) >= 6
    _in_shell(lines[0].split("   #")[0], tmp_path)
    for line in lines:
        told = command(*shlex.split(line, comments=True)[1:])
        expected = 1 if "exit code 1" in line else 0
        assert told.code == expected, f"{line}\n{told.out}{told.err}"
    (example,) = blocks("python")
    told = _in_shell(shlex.join([sys.executable, "-c", example]), tmp_path)
    assert told.splitlines()[-1] == "all equal"


def _in_shell(line: str, folder: Path) -> str:
    """What it prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": path}
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    targets = [
        line.split()[1]
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("make")
    ]
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
