"""TIES: trim, elect signs, merge what agrees."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.methods import Counts, Density, Models, Passes, PerModel, Weight, each, method
from merge.methods.linear import weighted_sum
from merge.numerics import Array

LARGEST = 0x7F800000  # bits of infinity: no finite magnitude lies above
NOTHING = 1e-8  # a smaller divisor means that no model agrees


def magnitude_thresholds(size: int, *, density: Sequence[float], **_: Any) -> Passes | None:
    """Per model the k-th largest |x|, k = floor(density * size) but at least 1; exact."""
    if all(d == 1.0 for d in density):
        return None
    return magnitudes_at([(i, max(1, int(d * size))) for i, d in enumerate(density)])


def magnitudes_at(
    wanted: Sequence[tuple[int, int]],
    of: Callable[..., Models] = lambda x: x,
    of_rows: Array | None = None,
) -> Passes:
    """For each (i, rank) the rank-th largest |of(x)[i]| over the tensor, float32 [wanted]; exact.
    With `of_rows` it is |of(x, of_rows)[i]|, as Counts say.

    float32 magnitudes sort like their bits, so each pass counts bits in BINS bins of a bracket that
    holds the answer and the next pass takes the one bin that it fell in: two passes from 31 bits.
    """
    arrays = [i for i, _ in wanted]
    remaining = [rank for _, rank in wanted]  # counted from the top of the bracket
    low, high = [0] * len(wanted), [LARGEST] * len(wanted)
    while any(a < b for a, b in zip(low, high, strict=True)):
        shift = [max(0, (b - a).bit_length() - 16) for a, b in zip(low, high, strict=True)]
        brackets = list(zip(arrays, low, shift, strict=True))
        distinct = sorted(set(brackets))
        counts = yield Counts(partial(_bins, of=of, brackets=distinct), of_rows)
        for i, bracket in enumerate(brackets):
            top = (high[i] - low[i]) >> shift[i]
            from_top = np.cumsum(counts[distinct.index(bracket)][top::-1])
            step = int(np.searchsorted(from_top, remaining[i]))
            if step > top:  # fewer numbers than that, the others being NaN: all of them stay
                low[i] = high[i] = 0
                continue
            remaining[i] -= int(from_top[step - 1]) if step else 0
            low[i] += (top - step) << shift[i]
            high[i] = min(high[i], low[i] + (1 << shift[i]) - 1)
    return np.array(low, dtype=np.uint32).view(np.float32)


def _bins(
    *x: Any, of: Callable[..., Models], brackets: Sequence[tuple[int, int, int]]
) -> list[NDArray[np.uint32]]:
    """(bits of |of(*x)[i]| - low) >> shift for each bracket (i, low, shift); what lies below `low` wraps
    around to large numbers."""
    values = of(*x)
    return [
        (np.abs(values[i]).view(np.uint32) - np.uint32(first)) >> np.uint32(by)
        for i, first, by in brackets
    ]


def elected(x: Models, votes: Models) -> list[NDArray[np.bool_]]:
    """Per model, where its value has the sign of the summed `votes`; nowhere where they cancel."""
    total = votes[0].copy()
    for vote in votes[1:]:
        total += vote
    up, down = total > 0, total < 0
    return [((value > 0) & up) | ((value < 0) & down) for value in x]


def disjoint_merge(
    x: Models,
    weight: Sequence[float],
    *,
    normalize: bool,
    lambda_: float,
    weights_in_election: bool,
    signed_divisor: bool,
) -> Array:
    """Weighted sum (normalize: mean) of the values that carry the elected sign, times lambda."""
    votes = [v * w for v, w in zip(x, weight, strict=True)] if weights_in_election else x
    agree = elected(votes, votes)
    total = weighted_sum([v * a for v, a in zip(x, agree, strict=True)], weight)
    if normalize:
        shares = [w if signed_divisor else abs(w) for w in weight]
        divisor = weighted_sum([a.astype(np.float32) for a in agree], shares)
        total /= divisor + (np.abs(divisor) < NOTHING)
    if lambda_ != 1.0:
        total *= np.float32(lambda_)
    return total


MERGEKIT = {"weights_in_election": True, "signed_divisor": True}


@method(
    space="delta", base="required", passes=2, workspace=5, statistics=magnitude_thresholds,
    mergekit=MERGEKIT, paper="arXiv:2306.01708",
)  # fmt: skip
def ties(
    x: Models,
    stats: Any,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = each(1.0),
    normalize: bool = True,
    lambda_: Weight = 1.0,
    weights_in_election: bool = False,
    signed_divisor: bool = False,
    int8_mask: bool = False,
) -> Array:
    """Trimmed task vectors, a sign elected per parameter, the mean of those that agree with it.

    base + lambda * sum_i(w_i d_i [agree_i]) / sum_i(|w_i| [agree_i]), where d_i keeps the largest
    `density` of |x_i - base| (values equal to the smallest one kept stay too) and agree_i holds where
    d_i has the sign of sum_i(d_i). Without weights this is the paper's algorithm.

    When it helps: three or more task vectors whose signs conflict; the paper reports less
    interference than plain sums. With one task vector only trimming is left of it.

    Parameters:
        weight: coefficient of this model's task vector
        density: fraction of the values that trimming keeps
        normalize: divide by the summed weights of the agreeing models (the paper's mean)
        lambda: scale of the merged task vector
        weights_in_election: let the weights count in the election (mergekit does)
        signed_divisor: divide by signed weights (mergekit does; negative weights then change sign)
        int8_mask: accepted for mergekit's sake; without effect
    """
    if stats is not None:
        x = [d * (np.abs(d) >= t) for d, t in zip(x, stats, strict=True)]
    return disjoint_merge(
        x, weight, normalize=normalize, lambda_=lambda_,
        weights_in_election=weights_in_election, signed_divisor=signed_divisor,
    )  # fmt: skip
