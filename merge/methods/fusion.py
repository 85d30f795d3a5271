"""Arcee Fusion: the other model's values where they matter most, the base's elsewhere."""

import math

import numpy as np
from numpy.typing import NDArray

from merge.methods import Models, OfRows, Passes, Sums, method
from merge.methods.ties import magnitudes_at
from merge.numerics import Array, exp

QUARTERS = (0.25, 0.5, 0.75)
FARTHEST = 350.0  # float64 holds exp of twice as much and of minus that: ratios of any two sums


def importance(x: Models, divergences: Array | None = None) -> list[Array]:
    """One array: |x[1] - x[0]| times the divergence of its row, float32; without it where it is one
    factor for all."""
    base, model = x
    difference = np.abs(model - base)
    return [difference if divergences is None else difference * divergences]


def softmax_terms(x: Models) -> list[NDArray[np.float64]]:
    """e**x[1], e**x[0] and e**x[1] (x[1] - x[0]), whose sums over a row make its divergence; float64."""
    base, model = (_within(values).astype(np.float64) for values in x)
    chance = exp(model)
    return [chance, exp(base), chance * (model - base)]


def _within(values: Array) -> Array:
    """At most FARTHEST from 0, so that no row needs its maximum first."""
    return np.where(values < FARTHEST, np.where(values > -FARTHEST, values, -FARTHEST), FARTHEST)


def divergence(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of softmax(row of x[1]) from softmax(row of x[0]), [rows], from the
    sums of softmax_terms, [3, rows]."""
    model, base, gained = sums
    found: NDArray[np.float64] = gained / model
    found -= np.fromiter(map(math.log, model / base), np.float64, model.size)
    found[found < 0.0] = 0.0  # what rounding left below
    return found


def fusion_threshold(size: int, *, cols: int, **_: object) -> Passes:
    """The divergence of each row, and median plus 1.5 times the distance of the quartiles of the
    importance; exact. A vector is one row, whose divergence changes nothing.

    A quantile q is the value at position floor(q (n - 1)) in ascending order.
    """
    divergences = None
    if cols > 1:
        divergences = divergence((yield Sums(softmax_terms, by_row=True))).astype(np.float32)
    ranks = [(0, size - int(q * (size - 1))) for q in QUARTERS]
    low, median, high = yield from magnitudes_at(ranks, importance, divergences)
    return OfRows(divergences, median + np.float32(1.5) * (high - low))


@method(
    space="weights", base="first", models=(2, 2), passes=3, workspace=6,
    statistics=fusion_threshold, paper="mergekit's arcee_fusion, https://arcee.ai",
)  # fmt: skip
def arcee_fusion(x: Models, of_rows: Array | None, stats: np.float32) -> Array:
    """The other model's value where its importance stands out, else the base's.

    Importance is |x_1 - x_0| KL(softmax(row of x_1) || softmax(row of x_0)); it stands out from
    median + 1.5 (third - first quartile) of the tensor on. mergekit estimates the quartiles of large
    tensors from a random sample and computes the divergence in the input's precision, where that of a
    fine-tune is mostly rounding; here both are exact up to float64. In the softmax, values beyond 350
    or -350 count as that much.

    When it helps: a base is to take over only the outstanding changes of one fine-tune. No paper or
    comparison is known to us.
    """
    base, model = x
    return np.where(importance(x, of_rows)[0] >= stats, model, base)
