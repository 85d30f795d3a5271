"""A search as its ledger and outcome.json tell it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merge.errors import RequestError
from merge.lines import Lines
from merge.report.outcome import Figures, Outcome, check_belongs, read_outcome
from merge.report.study import Entry, Search
from merge.report.varied import dimensions_of, values_among
from merge.search.front import non_dominated, objectives_of, reached, values_of
from merge.search.sections import StudySection
from merge.search.space import Dimension, Space

if TYPE_CHECKING:
    from merge.search.ledger import Candidate, Ledger

MOST_OBJECTIVES = 4  # tasks that are shown against each other where the study names no objectives


def read_search(ledger: "Ledger", name: str, folder: Path | None) -> Search:
    """The study of a ledger, with outcome.json of its folder where it has ended; raises RequestError."""
    facts = ledger.facts()
    section = _section(facts, name)
    candidates = ledger.all()
    outcome = None if folder is None else read_outcome(folder)
    if outcome and folder:
        check_belongs(outcome, candidates, name, folder)
    tasks = sorted({t for c in candidates if c.scores for t in c.scores["tasks"]})
    objectives = _objectives(section, tasks)
    later = _splits_of(outcome) if folder else _looks(ledger, section)
    dimensions, values = _varied(facts["recipe"], candidates, name)
    entries = tuple(
        _entry(c, later.get(c.number, {}), section, objectives, asked)
        for c, asked in zip(candidates, values, strict=True)
    )
    return Search(
        name,
        str(facts.get("begun_with", "")),
        section,
        facts["recipe"],
        dimensions,
        entries,
        objectives,
        bool(section.objectives),
        _front(entries, len(objectives)),
        outcome,
    )


def _section(facts: Mapping[str, Any], name: str) -> StudySection:
    from pydantic import ValidationError

    try:
        kept = dict(facts["study"])
        if kept.get("tasks"):
            kept.pop("suite", None)  # its default, which counts for nothing beside tasks
        return StudySection(**kept)
    except (KeyError, TypeError, ValidationError):
        raise _of_another_version(name) from None


def _varied(
    data: Mapping[str, Any], candidates: Sequence["Candidate"], name: str
) -> tuple[tuple[Dimension, ...], list[dict[str, float]]]:
    """What varies, and what each candidate has of it; raises RequestError."""
    space = Space(data, Lines("study", {}))
    dimensions = dimensions_of(space)
    try:
        return dimensions, [values_among(space, dimensions, c.asked) for c in candidates]
    except KeyError:
        raise _of_another_version(name) from None


def _of_another_version(study: str) -> RequestError:
    what = "was begun by another version; report with the one that it was begun with"
    return RequestError(f"study {study!r}: {what}")


def _objectives(section: StudySection, tasks: Sequence[str]) -> tuple[str, ...]:
    """What candidates are compared in: the study's objectives, or its tasks where they are few."""
    return tuple(objectives_of(section)) or (
        tuple(tasks) if 1 < len(tasks) <= MOST_OBJECTIVES else ()
    )


def _splits_of(outcome: Outcome | None) -> dict[int, dict[str, Figures]]:
    """What outcome.json tells of val and test, by number."""
    return {told.number: told.later for told in reversed(outcome.every if outcome else [])}


def _looks(ledger: "Ledger", section: StudySection) -> dict[int, dict[str, Figures]]:
    """What the ledger tells of val and test, by number."""
    found: dict[int, dict[str, Figures]] = {}
    for split in ("val", "test"):
        for number, scores in ledger.looks(split).items():
            figures = _figures(section, scores)
            found.setdefault(number, {})[split] = figures
    return found


def _figures(section: StudySection, scores: Mapping[str, Any]) -> Figures:
    """What the ledger's scores tell of a split."""
    from merge.search.outcome import errors_of

    return Figures(
        float(scores["mean"]),
        errors_of(scores),
        float(scores["truncated"]),
        float(scores["empty"]),
        float(scores["alike"]),
        reached(section, scores),
    )


def _entry(
    candidate: "Candidate",
    later: Mapping[str, Figures],
    section: StudySection,
    objectives: Sequence[str],
    asked: Mapping[str, float],
) -> Entry:
    scores = candidate.scores
    splits = dict(later)
    if scores:
        splits["dev"] = _figures(section, scores)
    return Entry(
        candidate.number,
        candidate.origin,
        candidate.state,
        candidate.ended,
        splits,
        dict(scores["tasks"]) if scores else {},
        _reached(candidate, section, objectives),
        asked,
        candidate.recipe,
        candidate.seconds,
        candidate.reason,
    )


def _reached(
    candidate: "Candidate", section: StudySection, objectives: Sequence[str]
) -> tuple[float, ...]:
    if candidate.state != "done" or candidate.scores is None:
        return ()
    if section.objectives:
        return values_of(section, candidate.scores)
    return tuple(float(candidate.scores["tasks"][task]) for task in objectives)


def _front(entries: Sequence[Entry], objectives: int) -> frozenset[int]:
    known = [entry for entry in entries if len(entry.objectives) == objectives > 1]
    if not known:
        return frozenset()
    best = non_dominated(np.array([entry.objectives for entry in known], np.float64))
    return frozenset(entry.number for entry, is_best in zip(known, best, strict=True) if is_best)
