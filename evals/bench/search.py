"""What a candidate of a search costs beyond the time that its model takes to answer."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from merge.search.opening import open_study
from merge.search.study import Study
from merge.shipped import shipped

CANDIDATES, DOCUMENTS = 60, 100
KINDS = ("whole", "whole, processor", "beyond its model", "beyond its model, processor")
RECIPE = "evolve-quickstart"


def run_search(candidates: int = CANDIDATES, json_file: Path | None = None) -> int:
    """Milliseconds of each candidate of the shipped search, 100 documents each, on a tiny model."""
    found: dict[str, list[float]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as folder, _model_time() as spent:
        changes = {"trials": candidates, "limit": DOCUMENTS // 4}
        file = shipped("recipes") / f"{RECIPE}.yaml"
        with open_study(file, Path(folder, "study"), changes=changes) as study:
            started = _clocks()

            def note(candidate: Any, study: Study) -> None:
                nonlocal started
                whole = _clocks() - started
                for name, value in zip(KINDS, (*whole, *(whole - spent())), strict=True):
                    found[name].append(1000 * float(value))
                started = _clocks()

            study.run(note)
            files = sorted(f.name for f in Path(folder).rglob("*") if f.is_file())
    count = len(found[KINDS[0]])
    print(f"{count} candidates, {DOCUMENTS} documents each; files: {', '.join(files)}")
    for name, values in found.items():
        after = values[1:]  # what the first one loads is there
        middle, most = median(after), quantiles(after, n=10)[-1]
        print(f"{name:28} {middle:6.1f} ms (median), {most:6.1f} ms (nine of ten)")
    if json_file:
        json_file.write_text(json.dumps(found) + "\n")
    return 0


def _clocks() -> Any:
    """[2] seconds: of the clock on the wall, and of all threads of this process."""
    return np.array([time.perf_counter(), time.process_time()])


@contextmanager
def _model_time() -> Iterator[Callable[[], Any]]:
    """Tells what models took since it was asked last, by both clocks."""
    from lm_eval.models.huggingface import HFLM

    spent = np.zeros(2)
    names = ("_model_call", "_model_generate")
    before = {name: getattr(HFLM, name) for name in names}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **more: Any) -> Any:
            nonlocal spent
            started = _clocks()
            try:
                return call(*arguments, **more)
            finally:
                spent += _clocks() - started

        return run

    def asked() -> Any:
        nonlocal spent
        found, spent = spent, np.zeros(2)
        return found

    for name in names:
        setattr(HFLM, name, timed(before[name]))
    try:
        yield asked
    finally:
        for name in names:
            setattr(HFLM, name, before[name])
