"""Candidates that are given up: documents come in blocks, and who is clearly worse than the best sees no more
of them.

After each block the candidate's values are compared with those of the best on the same documents, by
Wilcoxon's signed-rank test, one-sided. What it reached so far is what the optimiser is told: leaving such
candidates out would hide from it where not to look.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.search.front import values_of
from merge.search.ledger import DONE, Candidate, told
from merge.search.panel import Marks, Panel
from merge.search.sections import StudySection
from merge.search.verdict import Values, mean_of

BLOCKS = 8
LEVEL = 0.01
EXACT = 50  # differing documents up to which the test counts all signs; beyond, the normal law is as good

Bar = Mapping[str, Sequence[float]]  # values of the best, by task, for all documents of the panel


def bar_for(candidate: Candidate, every: Sequence[Candidate], section: StudySection) -> Bar | None:
    """What a candidate is measured against: the best of those that had ended when it was asked for, so that
    whoever tries it measures the same. None for what is not searched, and where nothing had."""
    if not section.prune or candidate.origin != "search":
        return None
    before = [c for c in told(every)[: candidate.after] if c.state == DONE and c.scores]
    if not before:
        return None
    best = max(before, key=lambda c: (values_of(section, c.scores or {}), -c.number))
    values: Bar = (best.scores or {})["values"]
    return values


def marks_until(panel: Panel, blocks: Sequence[Panel], lm: Any, bar: Bar | None) -> Marks:
    """What comes of the model's answers, to all documents or until it is hopeless."""
    ours: dict[str, list[float]] = {task: [] for task in panel.tasks}
    theirs: dict[str, list[float]] = {task: [] for task in panel.tasks}
    seen: dict[str, list[int]] = {task: [] for task in panel.tasks}
    for block in blocks:
        block.ask(lm)
        for task, numbers in block.split.documents.items():
            seen[task] += numbers
        if bar is None or block is blocks[-1]:
            continue
        for task, values in block.values().items():
            places = np.searchsorted(panel.split.documents[task], block.split.documents[task])
            ours[task] += values.tolist()
            theirs[task] += [bar[task][place] for place in places]
        if is_hopeless(ours, theirs, panel.shares):
            break
    return panel.of({task: sorted(numbers) for task, numbers in seen.items()}).judged(lm)


def blocks_of(panel: Panel) -> list[Panel]:
    """The documents of a panel in up to BLOCKS parts, each with some of every task, from all over it."""
    count = min(BLOCKS, *map(len, panel.split.documents.values()))
    return [
        panel.of({task: numbers[k::count] for task, numbers in panel.split.documents.items()})
        for k in range(count)
    ]


def is_hopeless(
    ours: Mapping[str, Sequence[float]],
    theirs: Mapping[str, Sequence[float]],
    shares: Mapping[str, float],
) -> bool:
    """Whether values by task are worse than others for the same documents, beyond chance: in their mean, to
    which each task has its share, and by the ranks of all differences."""
    differences = {task: np.subtract(ours[task], theirs[task]) for task in ours}
    lower = mean_of(differences, shares) < 0
    return lower and chance_of_less(np.concatenate([*differences.values()])) < LEVEL


def chance_of_less(differences: Values) -> float:
    """How likely it is, were each difference as likely to be the other way round, that the ranks of those
    above 0 sum up to so little: Wilcoxon's signed-rank test, equal magnitudes with their mean rank."""
    found = differences[differences != 0]
    if not len(found):
        return 1.0
    ranks = _doubled_ranks(np.abs(found))
    above = int(ranks[found > 0].sum())
    if len(found) > EXACT:
        spread = math.sqrt(float((ranks.astype(np.float64) ** 2).sum()) / 4)
        return NormalDist().cdf((above - float(ranks.sum()) / 2) / spread)
    chances = np.zeros(int(ranks.sum()) + 1)
    chances[0] = 1.0
    for rank in ranks.tolist():
        chances[rank:] = chances[rank:] / 2 + chances[:-rank] / 2
        chances[:rank] /= 2
    return min(1.0, float(chances[: above + 1].sum()))


def _doubled_ranks(magnitudes: Values) -> NDArray[np.int64]:
    """Twice the mean rank of each, from 2: whole numbers also where several are equal."""
    _, place, counts = np.unique(magnitudes, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (2 * ends - counts + 1)[place].astype(np.int64)
