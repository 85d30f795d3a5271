"""Arcee Fusion: the other model's values where they matter most, the base's elsewhere."""

import math

import numpy as np
from numpy.typing import NDArray

from merge.methods import Models, Passes, method
from merge.methods.ties import magnitudes_at
from merge.numerics import Array, exp, row_sums

QUARTERS = (0.25, 0.5, 0.75)
FLATTEST = -800.0  # exp of less is 0


def importance(x: Models) -> list[Array]:
    """One array: |x[1] - x[0]| times the divergence of its row, float32.

    In a single column (so the engine sees a vector), whose divergence is one factor for all, without it.
    """
    base, model = x
    difference = np.abs(model - base)
    if base.shape[1] == 1:
        return [difference]
    return [difference * divergence(model, base).astype(np.float32)[:, None]]


def divergence(model: Array, base: Array) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of softmax(row of the model) from softmax(row of the base), [rows]."""
    wide = model.astype(np.float64)
    chance, logarithm = _softmax(wide)
    wide -= base
    chance *= wide
    difference = row_sums(chance) - (logarithm - _softmax(base.astype(np.float64))[1])
    return np.maximum(difference, 0.0)  # what rounding left below


def _softmax(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """exp(x) / sum(exp(x)) of each row, and the logarithm of that sum, [rows]."""
    top = x.max(axis=1)
    chance = exp(np.maximum(x - top[:, None], FLATTEST))
    total = row_sums(chance)
    chance /= total[:, None]
    return chance, top + np.array([math.log(value) for value in total.tolist()])


def fusion_threshold(size: int, **_: object) -> Passes:
    """Median plus 1.5 times the distance of the quartiles of the importance; exact.

    A quantile q is the value at position floor(q (n - 1)) in ascending order.
    """
    ranks = [(0, size - int(q * (size - 1))) for q in QUARTERS]
    low, median, high = yield from magnitudes_at(ranks, importance)
    return median + np.float32(1.5) * (high - low)


@method(
    space="weights", base="first", models=(2, 2), passes=2, workspace=9,
    statistics=fusion_threshold, paper="mergekit's arcee_fusion, https://arcee.ai",
)  # fmt: skip
def arcee_fusion(x: Models, stats: np.float32) -> Array:
    """The other model's value where its importance stands out, else the base's.

    Importance is |x_1 - x_0| KL(softmax(row of x_1) || softmax(row of x_0)); it stands out from
    median + 1.5 (third - first quartile) of the tensor on. mergekit estimates the quartiles of large
    tensors from a random sample and computes the divergence in the input's precision, where that of a
    fine-tune is mostly rounding; here both are exact up to float64.

    When it helps: a base is to take over only the outstanding changes of one fine-tune. No paper or
    comparison is known to us.
    """
    base, model = x
    return np.where(importance(x)[0] >= stats, model, base)
