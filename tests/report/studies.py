"""Studies for reports: ledgers whose scores are known, and names that nobody should trust."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge.lines import Lines
from merge.search.ledger import DONE, FAILED, Candidate, Ledger
from merge.search.opening import DATABASE, NAME
from merge.search.space import Space

PARENTS = ("hub/left", "hub/right")
Scoring = Callable[[float, float], Mapping[str, float]]  # two weights -> mean by task
DOCUMENTS = 20


def document(parents: Sequence[str] = PARENTS) -> dict[str, Any]:
    """Two weights in [0, 1] that vary."""
    weight = {"weight": {"search": [0.0, 1.0]}}
    return {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": weight} for name in parents],
    }


def plain(parents: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in zip(parents, weights, strict=True)
        ],
    }


def scores(tasks: Mapping[str, float], share: float = 0.0) -> dict[str, Any]:
    """What came of a candidate whose documents have these values, each on all of them."""
    return {
        "mean": sum(tasks.values()) / len(tasks),
        "tasks": dict(tasks),
        "values": {task: [value] * DOCUMENTS for task, value in tasks.items()},
        "truncated": share,
        "empty": 0.0,
        "alike": 0.1,
    }


def written(
    folder: Path,
    scoring: Scoring,
    count: int = 24,
    *,
    parents: Sequence[str] = PARENTS,
    section: Mapping[str, Any] | None = None,
    reason: str | None = None,
    waiting: int = 0,
) -> Ledger:
    """A study's folder with two parents and `count` candidates, drawn and scored. reason: why one more
    failed. waiting: further candidates that nobody has tried."""
    folder.mkdir(parents=True)
    facts = {
        "recipe": document(parents),
        "study": {"suite": "mine", "seed": 3, **(section or {})},
        "begun_with": "optuna 5.0.0",
    }
    ledger = Ledger.open(f"sqlite:///{folder / DATABASE}", NAME, "digest", facts)
    drawn = np.random.default_rng(0).uniform(0, 1, (count + waiting, 2)).round(4).tolist()
    weights = [[1.0, 0.0], [0.0, 1.0], *drawn]
    for number, (a, b) in enumerate(weights):
        asked = {f"models.{i}.parameters.weight": w for i, w in enumerate((a, b))}
        origin = f"parent {parents[number]}" if number < 2 else "search"
        made = plain(parents, (a, b))
        ledger.add(Candidate(number, f"d{number}", origin, made, asked if number > 1 else {}))
    for number, (a, b) in enumerate(weights[: count + 2]):
        ledger.take("test")
        ledger.end(number, "test", DONE, scores=scores(scoring(a, b)), seconds=1.5)
    if reason is not None:
        number = len(weights)
        ledger.add(Candidate(number, "failing", "search", plain(parents, (0.5, 0.5)), {}))
        while (taken := ledger.take("test")) and taken.number != number:
            pass
        ledger.end(number, "test", FAILED, reason=reason)
        ledger.release()
    return ledger


def answered(
    folder: Path, data: Mapping[str, Any], answers: Sequence[Mapping[str, float]]
) -> Ledger:
    """A study's folder with a scored candidate for each answer to everything that varies in `data`."""
    folder.mkdir(parents=True)
    facts = {"recipe": data, "study": {"suite": "mine"}, "begun_with": "optuna 5.0.0"}
    ledger = Ledger.open(f"sqlite:///{folder / DATABASE}", NAME, "digest", facts)
    space = Space(data, Lines("study", {}))
    for number, asked in enumerate(answers):
        made = space.filled(lambda dimension, asked=asked: asked[dimension.name])  # type: ignore[misc]
        ledger.add(Candidate(number, f"d{number}", "search", made, asked))
        ledger.take("test")
        ledger.end(
            number, "test", DONE, scores=scores({"suite_one": number / len(answers)}), seconds=1.5
        )
    return ledger


def ended(
    folder: Path, ledger: Ledger, words: str = "candidate 2 is better", *, top: int = 3
) -> dict[str, Any]:
    """outcome.json of a study whose candidate 2 won before `top`, as a search writes it."""
    figures = {"mean": 0.75, "stderr": 0.03, "truncated": 0.01, "empty": 0.0, "alike": 0.2}
    every = ledger.all()

    def told(number: int, *splits: str) -> dict[str, Any]:
        own = every[number]
        facts = {"number": number, "origin": own.origin, "recipe": own.recipe}
        dev = {**figures, "mean": own.scores["mean"]} if own.scores else figures
        return {**facts, "dev": dev, **dict.fromkeys(splits, figures)}

    verdict = {
        "winner": "candidate 2", "rival": "hub/left", "difference": 0.125, "low": 0.05, "high": 0.2,
        "p": 0.004, "test": "McNemar's exact test", "documents": 400, "words": words,
    }  # fmt: skip
    data = {
        "winner": told(2, "val", "test"),
        "top": [told(top, "val"), told(2, "val", "test")],
        "rivals": [told(0, "val", "test"), told(1, "val", "test")],
        "failed": {},
        "average_is_as_good": False,
        "verdict": verdict,
    }
    (folder / "outcome.json").write_text(json.dumps(data), encoding="utf-8")
    return data
