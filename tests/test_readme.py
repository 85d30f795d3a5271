"""The README's commands and examples do what it says, in its order."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _lines(language: str) -> list[str]:
    return [line for block in blocks(language) for line in block.splitlines()]


def test_recipe_commands_and_python_run_as_written(tmp_path: Path) -> None:
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    commands = [line.split("   #")[0].strip() for line in _lines("sh")]
    comments = dict(zip(commands, _lines("sh"), strict=True))
    mine = [line for line in commands if line.startswith("mergetool")]
    assert len(mine) >= 6
    for line in mine:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        expected = 1 if "exit code 1" in comments[line] else 0
        assert done.returncode == expected, f"{line}\n{done.stdout}{done.stderr}"
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "all equal", done.stderr


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
