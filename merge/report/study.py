"""What a report tells of a search: candidates, what varied, what came out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.printing import counted
from merge.report.outcome import Figures, Outcome
from merge.search.sections import StudySection
from merge.search.space import Dimension
from merge.search.starts import is_searched
from merge.search.tried import name_of
from merge.search.verdict import NO_RIVAL, words_on_baselines

SPLITS = ("dev", "val", "test")
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
        return str(self.number) if is_searched(self.origin) else name_of(self.origin)

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
    they are its tasks. `front`: numbers of candidates and baselines that no other one beats in all of them on
    dev. `outcome`: what outcome.json tells, None where the study has not ended yet."""

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
    def best_parent(self) -> tuple[Entry, str] | None:
        """The parent that is best on val, with which the winner is compared, or on dev before the end; and
        the split."""
        parents = [entry for entry in self.rivals if entry.origin != "average"]
        if not parents:
            return None
        split = "val" if all("val" in entry.splits for entry in parents) else "dev"
        return max(parents, key=lambda e: (e.splits[split].mean, -e.number)), split

    @property
    def words(self) -> list[str]:
        """What came out in sentences, as the search told it: baselines as good as the winner, the verdict."""
        if self.outcome is None:
            return []
        test = {e.number: e.splits["test"].mean for e in self.entries if "test" in e.splits}
        baselines = [(e.name, test[e.number]) for e in self.rivals if e.number in test]
        won, verdict = self.outcome.winner.number, self.outcome.verdict
        said = words_on_baselines(f"candidate {won}", test[won], baselines) if won in test else ""
        told = verdict.words if verdict else NO_RIVAL
        return [*([said] if said else []), told]

    @property
    def on_front(self) -> tuple[list[Entry], list[Entry]]:
        """Candidates, and baselines, that no other one beats in all objectives, on dev."""
        best = sorted(
            (e for e in self.entries if e.number in self.front), key=lambda e: e.objectives
        )
        searched = [e for e in best if is_searched(e.origin)]
        return searched, [e for e in best if not is_searched(e.origin)]

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
        tried = [e for e in self.entries if is_searched(e.origin) and e.place is not None]
        failed = sum(entry.state == "failed" for entry in tried)
        apart = [f"{len(self.given_up)} given up early"] * bool(self.given_up)
        apart += [f"{failed} not scored"] * bool(failed)
        count = f"{counted(len(tried), 'candidate')} tried"
        count += f" ({', '.join(apart)})" if apart else ""
        count += f" beside {counted(len(self.rivals), 'baseline')}"
        if self.outcome is None and not self.open and any("test" in e.splits for e in self.entries):
            return f"This search has ended, and the folder of a run of it tells how: {count}."
        if self.outcome is None:
            return f"This search is running or was cut off: {count}, {len(self.open)} open."
        if self.open:
            return f"This search goes on after it had ended once: {count}, {len(self.open)} open."
        why = ", as nothing new was left to try" * self.outcome.used_up
        return f"This search has ended{why}: {count}."

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
