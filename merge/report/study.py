"""What a report tells of a search: candidates, what varied, what came out; from ledger and outcome.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merge.errors import RequestError
from merge.lines import Lines
from merge.report.outcome import Figures, Outcome, check_belongs, read_outcome
from merge.report.varied import dimensions_of, values_among
from merge.search.front import non_dominated, objectives_of, values_of
from merge.search.sections import StudySection
from merge.search.space import Dimension, Space
from merge.search.starts import is_searched

if TYPE_CHECKING:
    from merge.search.ledger import Candidate, Ledger

SPLITS = ("dev", "val", "test")
MOST_OBJECTIVES = 4  # tasks that are shown against each other where the study names no objectives
BEST = 5  # that are shown of a study that has not ended


@dataclass(frozen=True)
class Entry:
    """A candidate. `place`: which one it was to come to an end, None where it has not. `tasks`: means on dev.
    `objectives`: what it reached there in each, none where it was not scored. `asked`: what it has in each
    dimension that it was asked for; of a choice its number."""

    number: int
    origin: str
    state: str
    place: int | None
    splits: Mapping[str, Figures]
    tasks: Mapping[str, float]
    objectives: tuple[float, ...]
    asked: Mapping[str, float]
    recipe: Mapping[str, Any]
    seconds: float | None
    reason: str

    @property
    def name(self) -> str:
        """The number of one that was asked for, the name of a parent, or `average`."""
        return str(self.number) if is_searched(self.origin) else self.origin.removeprefix("parent ")

    @property
    def dev(self) -> Figures | None:
        return self.splits.get("dev")

    @property
    def scored(self) -> bool:
        """Whether it was scored on all of dev."""
        return self.state == "done" and self.dev is not None


@dataclass(frozen=True)
class Search:
    """A study so far. `objectives`: what candidates are compared in; `own`: whether the study names them, or
    they are its tasks. `front`: numbers of candidates that no other one beats in all of them. `outcome`: what
    outcome.json tells, None where the study has not ended yet."""

    name: str
    begun_with: str
    section: StudySection
    data: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]
    entries: tuple[Entry, ...]
    objectives: tuple[str, ...]
    own: bool
    front: frozenset[int]
    outcome: Outcome | None

    @property
    def searched(self) -> list[Entry]:
        """Those that were asked for and scored, the best mean on dev first."""
        found = [e for e in self.entries if is_searched(e.origin) and e.scored]
        return sorted(found, key=lambda e: (-e.splits["dev"].mean, e.number))

    @property
    def rivals(self) -> list[Entry]:
        """Parents and average, as far as they were scored."""
        return [e for e in self.entries if not is_searched(e.origin) and e.scored]

    @property
    def winner(self) -> int | None:
        """The number of the winner."""
        return None if self.outcome is None else self.outcome.winner.number

    @property
    def top(self) -> list[Entry]:
        """What was looked at again in the end, the winner first; before the end the best on dev."""
        if self.outcome is None:
            return self.searched[:BEST]
        known = {entry.number: entry for entry in self.entries}
        numbers = [told.number for told in (self.outcome.winner, *self.outcome.top)]
        return [known[n] for n in dict.fromkeys(numbers) if n in known]

    @property
    def settings(self) -> dict[str, Any]:
        """What the study keeps to; how long a run of it goes on is not among it."""
        return self.section.model_dump(mode="json", exclude_unset=True)

    @property
    def given_up(self) -> list[Entry]:
        """Those that were hopeless before all of dev was put to them."""
        return [entry for entry in self.entries if entry.state == "pruned"]

    @property
    def failed(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.state == "failed"]

    @property
    def open(self) -> list[Entry]:
        """Those that wait or are being tried."""
        return [entry for entry in self.entries if entry.state in ("waiting", "running")]

    @property
    def status(self) -> str:
        """How far the study is, as a sentence."""
        tried = sum(is_searched(e.origin) and e.place is not None for e in self.entries)
        count = f"{tried} candidates were tried beside {len(self.rivals)} baselines"
        if self.given_up:
            count += f", {len(self.given_up)} of them given up early"
        if self.outcome is None and not self.open and any("test" in e.splits for e in self.entries):
            return f"This search has ended, and the folder of a run of it tells how: {count}."
        if self.outcome is None:
            return f"This search is running or was cut off: {count}, {len(self.open)} are open."
        if self.open:
            return (
                f"This search goes on after it had ended once: {count}, {len(self.open)} are open."
            )
        return f"This search has ended: {count}."

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can tell it."""
        return {
            "study": self.name,
            "status": self.status,
            "begun_with": self.begun_with,
            "section": self.settings,
            "recipe": self.data,
            "objectives": list(self.objectives),
            "front": sorted(self.front),
            "outcome": self.outcome.told if self.outcome else None,
            "candidates": [self._told(entry) for entry in self.entries],
        }

    def _told(self, entry: Entry) -> dict[str, Any]:
        splits = {name: vars(figures) for name, figures in entry.splits.items()}
        rest = {key: value for key, value in vars(entry).items() if key != "splits"}
        reached = dict(zip(self.objectives, entry.objectives, strict=False))
        return {**rest, "name": entry.name, "objectives": reached, **splits}


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
    later = _splits_of(outcome) if folder else _looks(ledger)
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


def _looks(ledger: "Ledger") -> dict[int, dict[str, Figures]]:
    """What the ledger tells of val and test, by number."""
    from merge.search.outcome import errors_of

    found: dict[int, dict[str, Figures]] = {}
    for split in ("val", "test"):
        for number, scores in ledger.looks(split).items():
            figures = _figures({**scores, "stderr": errors_of(scores)})
            found.setdefault(number, {})[split] = figures
    return found


def _figures(told: Mapping[str, Any]) -> Figures:
    return Figures(
        float(told["mean"]),
        float(told["stderr"]),
        *(float(told[share]) for share in ("truncated", "empty", "alike")),
    )


def _entry(
    candidate: "Candidate",
    later: Mapping[str, Figures],
    section: StudySection,
    objectives: Sequence[str],
    asked: Mapping[str, float],
) -> Entry:
    from merge.search.outcome import errors_of

    scores = candidate.scores
    splits = dict(later)
    if scores:
        splits["dev"] = _figures({**scores, "stderr": errors_of(scores)})
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
