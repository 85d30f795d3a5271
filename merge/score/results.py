"""Scores of models, as numbers, as JSON and as a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from merge.printing import counted
from merge.score.suite import Suite, Task, shares_by_part

# shares of the answers of a task above which a note is given
MOST = {"cut_prompts": 0.01, "truncated": 0.1, "empty": 0.05, "looping": 0.05, "alike": 0.5}
WORDS = {
    "cut_prompts": "of the prompts do not fit into the model's window and lost their beginning",
    "truncated": "of the answers were cut off at the limit of tokens",
    "empty": "of the answers say nothing",
    "looping": "of the answers end in a loop",
    "alike": "of the answers are the same",
}
ENOUGH = 20  # answers from which on it says something that they are alike


@dataclass(frozen=True)
class Answers:
    """Shares of a task's prompts and answers that show that something is wrong; zero where no text is
    generated, but for `cut_prompts`."""

    count: int
    cut_prompts: float = 0.0
    truncated: float = 0.0
    empty: float = 0.0
    looping: float = 0.0
    alike: float = 0.0

    def doubts(self) -> list[str]:
        found = {key: getattr(self, key) for key in MOST}
        if self.count < ENOUGH:
            found.pop("alike")
        return [f"{100 * v:.0f} % {WORDS[key]}" for key, v in found.items() if v > MOST[key]]


@dataclass(frozen=True)
class Score:
    """A metric's value and its standard error, in parts of full marks; documents scored, or 0 and how many
    `iterations` over documents that were drawn anew for each. `metrics`: all that the harness counted, in its
    own units."""

    value: float
    stderr: float
    documents: int
    higher_is_better: bool = True
    part: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    iterations: int = 0

    @property
    def signed(self) -> float:
        """The value, or less it where less is better."""
        return self.value if self.higher_is_better else -self.value


@dataclass(frozen=True)
class ModelScores:
    label: str
    tasks: Mapping[str, Score]
    answers: Mapping[str, Answers] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Over parts, each the mean of its tasks; what is better when it is less counts against it."""
        return math.fsum(w * s.signed for w, s in self._weighed())

    @property
    def mean_stderr(self) -> float:
        """Standard error of the mean over tasks, which are independent."""
        return math.sqrt(math.fsum((w * s.stderr) ** 2 for w, s in self._weighed()))

    def _weighed(self) -> list[tuple[float, Score]]:
        """Each score with its weight in the mean."""
        shares = shares_by_part({name: score.part for name, score in self.tasks.items()})
        total = math.fsum(shares.values())
        return [(shares[name] / total, score) for name, score in self.tasks.items()]

    def notes(self) -> list[str]:
        """What is doubtful about its answers, a line each."""
        return [
            f"{self.label}: {task}: {doubt}"
            for task, answers in self.answers.items()
            for doubt in answers.doubts()
        ]


@dataclass(frozen=True)
class Scores:
    suite: Suite
    models: tuple[ModelScores, ...]

    def notes(self) -> list[str]:
        return [note for model in self.models for note in model.notes()]

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = without_nan(self._facts())
        return told

    def _facts(self) -> dict[str, Any]:
        return {
            "suite": self.suite.name,
            "tasks": [asdict(task) for task in self.suite.tasks],
            "models": [
                {
                    "model": m.label,
                    "mean": m.mean,
                    "mean_stderr": m.mean_stderr,
                    "tasks": {name: asdict(score) for name, score in m.tasks.items()},
                    "answers": {task: asdict(answers) for task, answers in m.answers.items()},
                }
                for m in self.models
            ],
            "notes": self.notes(),
        }


def without_nan(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    return [without_nan(each) for each in value] if isinstance(value, list | tuple) else value


def table(scores: Scores) -> str:
    """Models as rows, tasks as columns, per cent with standard errors; the best mean is marked."""
    suite, prefix = scores.suite, f"{scores.suite.name}_"
    share = {task.name: _is_share(scores, task) for task in suite.tasks}
    shares = all(share.values())
    heads = [
        "model",
        *(t.name.removeprefix(prefix) + " (less is better)" * (not t.higher_is_better) for t in suite.tasks),
        "mean",
    ]  # fmt: skip
    best = max(m.mean for m in scores.models)
    rows = [
        [m.label, *(_cell(m.tasks[t.name].value, m.tasks[t.name].stderr, share[t.name]) for t in suite.tasks),
         _cell(m.mean, m.mean_stderr, shares) + (" *" if m.mean == best and len(scores.models) > 1 else "")]
        for m in scores.models
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [_aligned(heads, widths), _aligned(["-" * w for w in widths], widths)]
    lines += [_aligned(row, widths) for row in rows]
    return "\n".join([*lines, _told(scores, shares)])


def _is_share(scores: Scores, task: Task) -> bool:
    """No fraction is above 1, whatever its name."""
    return task.is_share and all(abs(model.tasks[task.name].value) <= 1 for model in scores.models)


def _told(scores: Scores, shares: bool) -> str:
    """The last line: units and documents."""
    every = [score for model in scores.models for score in model.tasks.values()]
    counts = [score.documents or score.iterations for score in every]
    what = "document" if any(score.documents for score in every) else "iteration"
    least = f"{min(counts)} to " if min(counts) < max(counts) else ""
    unit = "per cent" if shares else "per cent (values of metrics that are no shares)"
    count = f"{least}{counted(max(counts), what)}"
    return f"suite {scores.suite.name}: {unit} and standard error, {count} a task"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(w) if i == 0 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def _cell(value: float, stderr: float, share: bool = True) -> str:
    if not share:
        return f"{value:.3f} ± {stderr:.3f}" if math.isfinite(stderr) else f"{value:.3f}"
    return (
        f"{100 * value:.1f} ± {100 * stderr:.1f}" if math.isfinite(stderr) else f"{100 * value:.1f}"
    )
