"""Whether the winner is better than the best parent: one paired test, on documents that chose nothing; and
what was as good there without a search."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merge.numerics import random_key

RESAMPLES = 10_000
LEVEL = 0.05
ALIKE = 1e-12  # means that differ by less are sums of equal values in another order
NO_RIVAL = "no parent was scored, so there is no comparison"

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """`rival`: the parent that was best on val. `difference`: of the means, with its 95 % interval. `p`:
    two-sided, of no difference."""

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
        points = f"{100 * self.difference:+.1f} points"
        parent = f"{self.rival}, the best parent on val"
        interval = f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        figures = f"{interval}, p = {self.p:.2g} by {self.test}"
        if self.significant:
            return f"{self.winner} is better than {parent}, by {points} ({figures})"
        if self.p < LEVEL and self.difference < 0:
            return f"no improvement: {self.winner} is worse than {parent} ({points}, {figures})"
        return f"no significant improvement over {parent}: {points} ({figures})"


def compared(
    winner: str,
    rival: str,
    ours: Mapping[str, Values],
    theirs: Mapping[str, Values],
    shares: Mapping[str, float],
) -> Verdict:
    """The verdict on values per document by task, [documents] each, in the same order for both.

    shares: what each task counts in the mean, of any sum; one without is left out. McNemar's exact test where
    every value is 0 or 1 and all documents count alike; else a paired bootstrap of the mean, documents drawn
    within each task.
    """
    differences = {task: ours[task] - theirs[task] for task in shares}
    drawn = _bootstrap(differences, shares)
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    mean = mean_of(differences, shares)
    count = sum(map(len, differences.values()))
    binary = all(np.isin(v[task], (0.0, 1.0)).all() for v in (ours, theirs) for task in shares)
    if binary and _count_alike(differences, shares):
        every = np.concatenate(list(differences.values()))
        p, test = _mcnemar(int((every > 0).sum()), int((every < 0).sum())), "McNemar's exact test"
    else:
        beyond = min((drawn <= 0).mean(), (drawn >= 0).mean())
        p, test = min(1.0, 2 * max(float(beyond), 1 / RESAMPLES)), "a paired bootstrap"
    if not any(map(np.any, differences.values())):
        p = 1.0
    return Verdict(winner, rival, mean, float(low), float(high), p, test, count)


def as_good(winner: float, baselines: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Those of (name, mean) whose mean is as high as the winner's or higher, the best first."""
    found = [each for each in baselines if each[1] >= winner - ALIKE]
    return sorted(found, key=lambda each: -each[1])


def words_on_baselines(winner: str, mean: float, baselines: Sequence[tuple[str, float]]) -> str:
    """A sentence on (name, mean) of the baselines that are as good on test as the winner, whose mean there is
    `mean`; empty where none is."""
    found = [f"{name} {100 * each:.1f}" for name, each in as_good(mean, baselines)]
    if not found:
        return ""
    what = f"{winner} is not better than what needed no search"
    return f"{what}: on test it has {100 * mean:.1f} points; others: {', '.join(found)}"


def mean_of(values: Mapping[str, Values], shares: Mapping[str, float]) -> float:
    """The mean of the tasks' means by their shares."""
    parts = (share * float(values[task].mean()) for task, share in shares.items())
    return math.fsum(parts) / math.fsum(shares.values())


def _count_alike(values: Mapping[str, Values], shares: Mapping[str, float]) -> bool:
    """Whether one document counts as much in the mean as any other."""
    each = [share / len(values[task]) for task, share in shares.items()]
    return math.isclose(min(each), max(each))


def _mcnemar(better: int, worse: int) -> float:
    """Two-sided probability of a split of the differing documents that is as uneven, were both as good."""
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, float(2 * tail / 2**count))


def _bootstrap(differences: Mapping[str, Values], shares: Mapping[str, float]) -> Values:
    """Means of documents drawn again, [RESAMPLES]; the same for the same documents."""
    generator = np.random.Generator(np.random.Philox(key=random_key(0, "bootstrap", 0)))
    total = np.zeros(RESAMPLES)
    for task, values in differences.items():
        # few different ones: draw how often each comes
        found, counts = np.unique(values, return_counts=True)
        odds = counts / counts.sum()
        means = generator.multinomial(len(values), odds, RESAMPLES) @ found / len(values)
        total += shares[task] * means
    return total / math.fsum(shares.values())


def error_of(values: Mapping[str, Values], shares: Mapping[str, float]) -> float:
    """Standard error of the mean."""
    parts = [share**2 * _error(values[task]) for task, share in shares.items()]
    return math.sqrt(math.fsum(parts)) / math.fsum(shares.values())


def _error(values: Values) -> float:
    """Squared standard error of the mean of one task."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else math.nan
