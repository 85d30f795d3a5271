"""What came of a search: the best of it, their rivals, and the comparison on documents that chose nothing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from merge.search.front import front_of, objectives_of, reached
from merge.search.ledger import Candidate
from merge.search.places import moved
from merge.search.sections import StudySection
from merge.search.starts import is_searched
from merge.search.tried import name_of
from merge.search.verdict import NO_RIVAL, Values, Verdict, as_good, error_of, words_on_baselines
from merge.write import writing


@dataclass(frozen=True)
class Outcome:
    """`top`: the best on dev, best first; `rivals`: parents and average. `val`, `test`: what came of them
    there, by number. `verdict`: None where no parent could be scored. `failed`: reasons by number. `winners`:
    how many different ones test has been looked at for, this one included.

    Of several objectives `top` is the front, and the winner has the best mean of them on val. `kin`: what is
    told of the ancestors that models of a candidate share, by number. `saved`: documents that those were not
    asked that were given up, by number. `home`: from where relative names in recipes start. `used_up`:
    whether the search ended because nothing new was left to try.
    """

    winner: Candidate
    top: tuple[Candidate, ...]
    rivals: tuple[Candidate, ...]
    val: Mapping[int, Mapping[str, Any]]
    test: Mapping[int, Mapping[str, Any]]
    verdict: Verdict | None
    failed: Mapping[int, str]
    winners: int = 1
    section: StudySection = field(default_factory=StudySection)
    kin: Mapping[int, Sequence[str]] = field(default_factory=dict)
    saved: Mapping[int, int] = field(default_factory=dict)
    home: Path = Path()
    used_up: bool = False

    @property
    def average_is_as_good(self) -> bool:
        """Whether the average, which nobody had to search for, has as high a mean on test."""
        found = as_good(self._tested(self.winner), self._baselines)
        return "average" in [name for name, _ in found]

    @property
    def words(self) -> list[str]:
        """What came out in sentences, the weightiest first: baselines as good as the winner, the verdict."""
        winner = f"candidate {self.winner.number}"
        said = words_on_baselines(winner, self._tested(self.winner), self._baselines)
        told = [*([said] if said else []), self.verdict.words if self.verdict else NO_RIVAL]
        if others := self._other_tasks:
            what = "test is not of the objectives, but of all that the suite keeps for the end"
            told.append(f"{what}: {', '.join(others)}")
        return told

    @property
    def _other_tasks(self) -> list[str]:
        """Those of test, where they are other ones than those of the objectives."""
        tested = list(self.test[self.winner.number]["tasks"])
        wanted = [task for tasks in objectives_of(self.section).values() for task in tasks]
        return [] if set(wanted) <= set(tested) else tested

    @property
    def front(self) -> tuple[list[Candidate], list[Candidate]]:
        """Candidates, and baselines, that no other one of the search beats on dev in all objectives."""
        best = front_of([*self.top, *self.rivals], self.section)
        searched = [c for c in best if is_searched(c.origin)]
        return searched, [c for c in best if not is_searched(c.origin)]

    @property
    def _baselines(self) -> list[tuple[str, float]]:
        """(name, mean on test) of parents and average."""
        return [(name_of(c.origin), self._tested(c)) for c in self.rivals]

    def _tested(self, candidate: Candidate) -> float:
        return float(self.test[candidate.number]["mean"])

    def as_json(self) -> dict[str, Any]:
        """What came out, as JSON can tell it."""
        verdict = self.verdict
        return {
            "winner": self._told(self.winner),
            "top": [self._told(candidate) for candidate in self.top],
            "rivals": [self._told(candidate) for candidate in self.rivals],
            "failed": {str(number): reason for number, reason in self.failed.items()},
            "saved": {str(number): count for number, count in self.saved.items()},
            "average_is_as_good": self.average_is_as_good,
            "winners_tested": self.winners,
            "used_up": self.used_up,
            "verdict": asdict(verdict) | {"words": verdict.words} if verdict else None,
        }

    def _told(self, candidate: Candidate) -> dict[str, Any]:
        number = candidate.number
        splits = {
            "dev": candidate.scores,
            "val": self.val.get(number),
            "test": self.test.get(number),
        }
        return {
            "number": number,
            "origin": candidate.origin,
            "recipe": candidate.recipe,
            **({"kin": list(kin)} if (kin := self.kin.get(number)) else {}),
            **{name: self._figures(scores) for name, scores in splits.items() if scores},
        }

    def _figures(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        shares = {key: scores[key] for key in ("truncated", "empty", "alike")}
        figures = {"mean": scores["mean"], "stderr": errors_of(scores), **shares}
        objectives = reached(self.section, scores)
        return figures | ({"objectives": objectives} if objectives else {})

    def save(self, folder: Path) -> None:
        """Writes outcome.json, and recipes/candidate-N.yaml of the best, which say the same from there;
        raises WriteError."""
        place = folder / "recipes"
        with writing(folder):
            place.mkdir(parents=True, exist_ok=True)
            for former in place.glob("candidate-*.yaml"):
                former.unlink()
            for candidate in self.top:
                recipe = moved(candidate.recipe, self.home, [place])
                text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
                file = place / f"candidate-{candidate.number}.yaml"
                file.write_text(text, encoding="utf-8")
            text = json.dumps(self.as_json(), indent=1, ensure_ascii=False)
            (folder / "outcome.json").write_text(text + "\n", encoding="utf-8")


def errors_of(scores: Mapping[str, Any]) -> float:
    """Standard error of a candidate's mean."""
    return error_of(arrays_of(scores), shares_in(scores))


def shares_in(scores: Mapping[str, Any]) -> dict[str, float]:
    """What each task counts in their mean; all alike where it is not told."""
    return dict(scores.get("shares") or dict.fromkeys(scores["values"], 1.0))


def arrays_of(scores: Mapping[str, Any]) -> dict[str, Values]:
    """Values per document, [documents] by task."""
    return {task: np.array(values, np.float64) for task, values in scores["values"].items()}
