"""Scores by EuroEval, which lives in an environment of its own: it pins other versions than ours."""

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge.errors import RequestError, ScoreError
from merge.score.results import ModelScores, Score, Scores
from merge.score.suite import Suite, Task

RESULTS = "euroeval_benchmark_results.jsonl"
INTERVAL = 1.96  # what its "_se" is in standard errors: it writes the radius of a 95 % interval
ITERATIONS = 10  # bootstrap samples of a data set; its own default


def score_by_euroeval(
    folders: Sequence[Path],
    labels: Sequence[str],
    datasets: Sequence[str],
    *,
    program: str = "euroeval",
    device: str | None = None,
    trusted: bool = False,
) -> Scores:
    """Scores of models on EuroEval's data sets, the first metric of each, in parts of 100.

    Raises RequestError where the program is not there, ScoreError where a data set has no result.
    """
    if not datasets:
        raise RequestError("--backend euroeval needs --tasks with names of its data sets")
    found = shutil.which(program)
    if found is None:
        raise RequestError(
            f"{program}: no such program; install euroeval into an environment of its own and name its "
            "program with --euroeval or MERGETOOL_EUROEVAL"
        )
    scored = [
        _scored(folder, label, datasets, command_line(found, folder, datasets, device, trusted))
        for folder, label in zip(folders, labels, strict=True)
    ]
    names = {name: metric for _, metrics in scored for name, metric in metrics.items()}
    tasks = tuple(Task(name, names[name], True, full=100) for name in datasets)
    suite = Suite("euroeval", Path(), tasks, 1, source="https://euroeval.com")
    return Scores(suite, tuple(model for model, _ in scored))


def command_line(
    program: str, folder: Path, datasets: Sequence[str], device: str | None, trusted: bool
) -> list[str]:
    """What is run for one model."""
    own = str(Path(program).absolute())  # it is run in another folder
    line = [own, "--model", str(folder.resolve()), "--no-progress-bar", "--raise-errors"]
    line += [part for name in datasets for part in ("--dataset", name)]
    line += ["--num-iterations", str(ITERATIONS), "--evaluate-test-split"]
    if device:
        line += ["--device", device.partition(":")[0]]
    return [*line, "--trust-remote-code"] if trusted else line


def _scored(
    folder: Path, label: str, datasets: Sequence[str], line: Sequence[str]
) -> tuple[ModelScores, dict[str, str]]:
    """Scores of one model, and the metric that counts of each data set."""
    with tempfile.TemporaryDirectory(prefix="mergetool-") as place:
        done = subprocess.run(line, cwd=place, capture_output=True, text=True, errors="replace")
        file = Path(place, RESULTS)
        rows = read_results(file.read_bytes().splitlines() if file.exists() else [])
    missing = [n for n in datasets if n not in rows or not math.isfinite(rows[n][1].value)]
    if done.returncode or missing:
        last = next((x for x in reversed(done.stderr.splitlines()) if x.strip()), "it said nothing")
        what = f"{', '.join(missing)} has no result" if missing else f"exit {done.returncode}"
        raise ScoreError(f"{label}: euroeval: {what}: {last.strip()[:300]}")
    return (
        ModelScores(label, {name: rows[name][1] for name in datasets}),
        {name: rows[name][0] for name in datasets},
    )


def read_results(lines: Iterable[str | bytes]) -> dict[str, tuple[str, Score]]:
    """(metric, score) by data set, from the lines of EuroEval's file of results; without those that are
    none, as the last one of a run that was cut off."""
    found = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, AttributeError, StopIteration):
            row = json.loads(line)
            found[str(row["dataset"])] = _first(row["results"])
    return found


def _first(results: Mapping[str, Any]) -> tuple[str, Score]:
    """The first metric, which is the one that its leaderboards show."""
    total: Mapping[str, float] = results["total"]
    name = next(key for key in total if not key.endswith("_se"))
    radius = total.get(f"{name}_se")
    error = radius / INTERVAL / 100 if radius is not None else math.nan
    metrics = {key: float(value) for key, value in total.items() if value is not None}
    rounds = len(results["raw"])
    score = Score(metrics.get(name, math.nan) / 100, error, 0, iterations=rounds, metrics=metrics)
    return name.removeprefix("test_"), score
