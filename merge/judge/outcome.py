"""What a judge's grades and verdicts come to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merge.judge.grading import HIGHEST
from merge.judge.questions import Question
from merge.printing import counted


@dataclass(frozen=True)
class Reading:
    """What was read from a judge's reply: a grade, A, B or tie, or None; whether it was asked once more, and
    whether its last reply was cut off."""

    value: float | str | None
    again: bool
    cut: bool = False


@dataclass(frozen=True)
class Share:
    """A mean and its standard error over questions; NaN where there are too few."""

    mean: float
    stderr: float
    count: int


def mean_of(sums: Sequence[float], sizes: Sequence[int] = ()) -> Share:
    """Of values, one for each question, or of several for each: their sums and how many they are. Those of
    one question depend on each other, so that the error is over questions; `count` is of all values."""
    sizes = sizes or [1] * len(sums)
    count, questions = sum(sizes), len(sums)
    if not count:
        return Share(math.nan, math.nan, 0)
    mean = math.fsum(sums) / count
    if questions == 1:
        return Share(mean, math.nan, count)
    off = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, sizes, strict=True))
    return Share(mean, math.sqrt(off * questions / (questions - 1)) / count, count)


@dataclass(frozen=True)
class Talks:
    """Numbers of a model's answers: all, those cut off at the limit of tokens, those that say nothing."""

    answers: int
    cut: int
    empty: int

    @classmethod
    def of(cls, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Talks":
        found = [answer for turns in answers.values() for answer in turns]
        cut = sum(bool(answer["cut"]) for answer in found)
        return cls(len(found), cut, sum(not answer["text"].strip() for answer in found))

    def doubts(self) -> list[str]:
        """What is doubtful about them, a line each: there are so few that one counts."""
        cut = f"{'was' if self.cut == 1 else 'were'} cut off at --max-tokens"
        empty = f"{'says' if self.empty == 1 else 'say'} nothing"
        every = counted(self.answers, "answer")
        return [f"{n} of {every} {what}" for n, what in ((self.cut, cut), (self.empty, empty)) if n]


@dataclass(frozen=True)
class Grades:
    """One model's. `readings`: by question, of each turn."""

    label: str
    questions: Sequence[Question]
    readings: Mapping[str, Sequence[Reading]]
    talks: Talks

    def share(self, language: str = "") -> Share:
        """Of the grades that could be read, each question the mean of its turns."""
        asked = [q.id for q in self.questions if language in ("", q.language)]
        grades = [[r.value for r in self.readings[i] if isinstance(r.value, float)] for i in asked]
        return mean_of([math.fsum(g) / len(g) for g in grades if g])

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.label,
            "grade": _shown(self.share()),
            "languages": {one: _shown(self.share(one)) for one in _languages(self.questions)},
            "grades": {i: [r.value for r in turns] for i, turns in self.readings.items()},
            **counts_of([self]),
            "answers": asdict(self.talks),
        }


@dataclass(frozen=True)
class Comparison:
    """Two models'. `readings`: by question, in both orders: `first` was A in the one, B in the other."""

    first: str
    second: str
    questions: Sequence[Question]
    readings: Mapping[str, Sequence[Reading]]
    talks: tuple[Talks, Talks]

    def points(self, language: str = "") -> list[float]:
        """Of `first`, by question: 1 where both orders say so, 0 where both say the other, else 0.5. Without
        the questions of which one order could not be read."""
        asked = [q.id for q in self.questions if language in ("", q.language)]
        found = [_point(*(r.value for r in self.readings[i])) for i in asked]
        return [point for point in found if point is not None]

    @property
    def wins(self) -> tuple[int, int, int]:
        """Of first, ties, of second."""
        points = self.points()
        return points.count(1), points.count(0.5), points.count(0)

    @property
    def inconsistent(self) -> int:
        """Questions in which the orders contradict each other."""
        pairs = ([r.value for r in both] for both in self.readings.values())
        return sum(None not in pair and pair in (["A", "A"], ["B", "B"]) for pair in pairs)

    @property
    def first_place(self) -> Share:
        """How often the one that came first was preferred, of verdicts that are no tie; 0.5 is no bias."""
        pairs = [[r.value for r in both] for both in self.readings.values()]
        decided = [(p.count("A"), n) for p in pairs if (n := p.count("A") + p.count("B"))]
        return mean_of([first for first, _ in decided], [n for _, n in decided])

    def as_json(self) -> dict[str, Any]:
        won, tied, lost = self.wins
        return {
            "models": [self.first, self.second],
            "wins": won,
            "ties": tied,
            "losses": lost,
            "win_rate": _shown(mean_of(self.points())),
            "languages": {
                one: _shown(mean_of(self.points(one))) for one in _languages(self.questions)
            },
            "first_place": _shown(self.first_place),
            "inconsistent": self.inconsistent,
            "verdicts": {i: [r.value for r in both] for i, both in self.readings.items()},
            **counts_of([self]),
            "answers": [asdict(talks) for talks in self.talks],
        }


def _point(as_a: float | str | None, as_b: float | str | None) -> float | None:
    if as_a is None or as_b is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((str(as_a), str(as_b)), 0.5)


def _languages(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(q.language for q in questions if q.language))


def counts_of(found: Sequence[Grades | Comparison]) -> dict[str, int]:
    """How much the judge was asked for, and how much was asked for once more, could not be read in the end,
    and could not because it was cut off or filtered."""
    every = [r for each in found for several in each.readings.values() for r in several]
    return {
        "asked": len(every),
        "asked_again": sum(r.again for r in every),
        "unreadable": sum(r.value is None for r in every),
        "cut": sum(r.cut for r in every),
    }


def _shown(share: Share) -> dict[str, Any]:
    """Without NaN, which JSON lacks."""
    return {k: None if math.isnan(v) else v for k, v in asdict(share).items()}


def told_grades(found: Sequence[Grades]) -> str:
    """A line for each model: the mean grade, by language, and what could not be read."""
    return "\n".join(_line(grades) for grades in found)


def _line(grades: Grades) -> str:
    languages = [f"{one} {_grade(grades.share(one))}" for one in _languages(grades.questions)]
    parts = f" ({', '.join(languages)})" if len(languages) > 1 else ""
    share = grades.share()
    on = counted(share.count, "question")
    told = f"{grades.label}: {_grade(share)} of {HIGHEST} on {on}{parts}"
    return told + _unread(grades)


def told_comparison(found: Comparison) -> str:
    """Who won how often, what order did, and what could not be read."""
    won, tied, lost = found.wins
    rate = mean_of(found.points())
    lines = [
        f"{found.first} against {found.second}: {won} won, {tied} tied, {lost} lost, "
        f"win rate {_percent(rate)}{_unread(found)}",
        f"order: the first place was preferred in {_percent(found.first_place)} of "
        f"{counted(found.first_place.count, 'decided verdict')} (50 is no bias); in {found.inconsistent} of "
        f"{counted(len(found.readings), 'question')} the two orders contradict each other, which counts as a "
        "tie",
    ]
    return "\n".join(lines)


def _unread(found: Grades | Comparison) -> str:
    counts = counts_of([found])
    if not counts["unreadable"]:
        return ""
    return (
        f"; {counts['unreadable']} of {replies(counts['asked'])} could not be read{cut_of(counts)}"
    )


def replies(count: int) -> str:
    """`1 reply`, `2 replies`."""
    return f"{count} {'reply' if count == 1 else 'replies'}"


def cut_of(counts: Mapping[str, int]) -> str:
    """How many of what could not be read were cut off, if any."""
    return f" ({counts['cut']} cut off at --max-tokens or filtered)" if counts["cut"] else ""


def _grade(share: Share) -> str:
    if math.isnan(share.mean):
        return "no grade"
    return f"{share.mean:.2f}" + ("" if math.isnan(share.stderr) else f" ± {share.stderr:.2f}")


def _percent(share: Share) -> str:
    if math.isnan(share.mean):
        return "none"
    error = "" if math.isnan(share.stderr) else f" ± {100 * share.stderr:.1f}"
    return f"{100 * share.mean:.1f}{error} %"
