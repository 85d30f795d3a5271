"""Whether the winner is better than the best parent: one paired test, on documents that chose nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merge.numerics import random_key

RESAMPLES = 10_000
LEVEL = 0.05

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """`difference`: of the means over tasks, with its 95 % interval. `p`: two-sided, of no difference."""

    winner: str
    rival: str
    difference: float
    low: float
    high: float
    p: float
    test: str
    documents: int

    @property
    def significant(self) -> bool:
        return self.p < LEVEL and self.difference > 0

    @property
    def words(self) -> str:
        """The verdict as a sentence."""
        points, parent = f"{100 * self.difference:+.1f} points", f"{self.rival}, the best parent"
        interval = f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        figures = f"{interval}, p = {self.p:.2g} by {self.test}"
        if self.significant:
            return f"{self.winner} is better than {parent}, by {points} ({figures})"
        return f"no significant improvement over {parent}: {points} ({figures})"


def compared(
    winner: str, rival: str, ours: Mapping[str, Values], theirs: Mapping[str, Values]
) -> Verdict:
    """The verdict on values per document by task, [documents] each, in the same order for both.

    McNemar's exact test where every value is 0 or 1 and all tasks have as many documents; else a paired
    bootstrap of the mean over tasks, documents drawn within each task.
    """
    tasks = list(ours)
    differences = [ours[task] - theirs[task] for task in tasks]
    drawn = _bootstrap(differences)
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    mean = math.fsum(float(d.mean()) for d in differences) / len(tasks)
    count = sum(map(len, differences))
    binary = all(np.isin(v, (0.0, 1.0)).all() for side in (ours, theirs) for v in side.values())
    if binary and len({len(d) for d in differences}) == 1:
        every = np.concatenate(differences)
        p, test = _mcnemar(int((every > 0).sum()), int((every < 0).sum())), "McNemar's exact test"
    else:
        beyond = min((drawn <= 0).mean(), (drawn >= 0).mean())
        p, test = min(1.0, 2 * max(float(beyond), 1 / RESAMPLES)), "a paired bootstrap"
    if not any(map(np.any, differences)):
        p = 1.0
    return Verdict(winner, rival, mean, float(low), float(high), p, test, count)


def _mcnemar(better: int, worse: int) -> float:
    """Two-sided probability of a split of the differing documents that is as uneven, were both as good."""
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, float(2 * tail / 2**count))


def _bootstrap(differences: Sequence[Values]) -> Values:
    """Means over tasks of documents drawn again, [RESAMPLES]; the same for the same documents."""
    generator = np.random.Generator(np.random.Philox(key=random_key(0, "bootstrap", 0)))
    total = np.zeros(RESAMPLES)
    for values in differences:
        # few different ones: draw how often each comes
        found, counts = np.unique(values, return_counts=True)
        shares = counts / counts.sum()
        total += generator.multinomial(len(values), shares, RESAMPLES) @ found / len(values)
    return total / len(differences)


def error_of(values: Mapping[str, Values]) -> float:
    """Standard error of the mean over tasks."""
    parts = [float(v.var(ddof=1)) / len(v) if len(v) > 1 else math.nan for v in values.values()]
    return math.sqrt(math.fsum(parts)) / len(parts)
