"""What a terminal shows of a search while it runs, and that nothing of it stays."""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_search import SPECIALISTS, written
from tiny_suite import tiny_suite

from merge.search.opening import open_study

Command = Callable[..., Any]


def on_a_terminal(*arguments: str) -> str:
    """What the command writes where it runs on a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "merge.cli", *arguments]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    told = b""
    try:
        while piece := os.read(ours, 1 << 16):
            told += piece
    except OSError:  # how a terminal ends whose other side has gone
        pass
    assert process.wait() == 0, told
    os.close(ours)
    return told.decode()


def test_the_time_left_ends_with_the_minutes_of_the_study(tmp_path: Path) -> None:
    weights = [{"model": m, "parameters": {"weight": {"search": [0.1, 1.0]}}} for m in SPECIALISTS]
    recipe = {"merge_method": "linear", "models": weights}
    file = written(tmp_path, tiny_suite(tmp_path / "suite"), trials=100, **recipe)
    with open_study(file, tmp_path / "study") as study:
        assert study.minutes_left(pace=4) == 25
        study.setup = replace(study.setup, until=time.time() + 60)
        assert 0 < study.minutes_left(pace=4) <= 1
        assert study.minutes_left(pace=1000) == 0.1
        study.setup = replace(study.setup, until=time.time() - 60)
        assert study.minutes_left(pace=4) == 0


def small_search(folder: Path) -> Path:
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": "zoo:reverser", "parameters": {"weight": {"search": [0.1, 1.0]}}},
            {"model": "zoo:sorter", "parameters": {"weight": 0.5}},
        ],
        "study": {"suite": str(tiny_suite(folder / "suite")), "trials": 2, "limit": 3},
    }
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_the_line_tells_best_rate_and_time_left_and_is_gone_in_the_end(tmp_path: Path) -> None:
    file = small_search(tmp_path)
    told = on_a_terminal("sweep", str(file), "--output", str(tmp_path / "out"))
    pattern = r"candidate (\d): best (-|[\d.]+), baselines [\d.]+, \d+ a minute, [\d.]+ min left"
    lines = [found for part in told.split("\r") if (found := re.match(pattern, part))]
    assert [found[1] for found in lines] == ["0", "1", "2", "3", "4"]
    assert [found[2] == "-" for found in lines] == [True, True, True, False, False]
    after = told[told.rindex("min left") :]
    assert re.search(r"\r {78}\rcandidate +dev", after)


def test_a_log_has_such_lines_too(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge.search.commands.EVERY", 0)
    result = command("sweep", str(small_search(tmp_path)), "--output", str(tmp_path / "out"))
    lines = [line for line in result.err.splitlines() if line.startswith("candidate ")]
    assert [int(line.split()[1][:-1]) for line in lines] == [0, 1, 2, 3, 4]
