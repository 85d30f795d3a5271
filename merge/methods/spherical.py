"""Interpolation on the sphere: linear combinations whose coefficients follow from inner products."""

import math
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from merge.methods import Models, Passes, Range, Sums, method
from merge.methods.linear import weighted_sum
from merge.numerics import Array

PARALLEL = 0.9995  # |cosine| above which sin(angle) is too small to divide by; mergekit's value


def gram(size: int, *, models: int, **_: Any) -> Passes:
    """Inner products of all pairs of models over the whole tensor, [models, models] float64."""
    pairs = [(i, j) for i in range(models) for j in range(i + 1)]

    def products(x: Models) -> list[NDArray[np.float64]]:
        wide = [model.astype(np.float64) for model in x]
        return [wide[i] * wide[j] for i, j in pairs]

    sums = yield Sums(products)
    out = np.empty((models, models))
    for (i, j), value in zip(pairs, sums, strict=True):
        out[i, j] = out[j, i] = value
    return out


@method(
    space="weights", base="first", models=(2, 2), passes=1, workspace=7, statistics=gram,
    paper="Shoemake 1985, doi:10.1145/325334.325242",
)  # fmt: skip
def slerp(x: Models, stats: Any, *, t: Annotated[float, Range(0, 1)]) -> Array:
    """Point at t on the arc from the base to the other model, each tensor taken as one vector.

    sin((1-t)a)/sin(a) x_0 + sin(t a)/sin(a) x_1 with a the angle between x_0 and x_1. Where they are
    parallel (|cos a| > 0.9995) or one of them is zero: (1-t) x_0 + t x_1.

    Parameters:
        t: 0 gives the base, 1 the other model
    """
    norms = math.sqrt(stats[0, 0]) * math.sqrt(stats[1, 1])
    cosine = float(stats[0, 1]) / norms if norms else 1.0
    if abs(cosine) > PARALLEL:
        return weighted_sum(x, [1.0 - t, t])
    angle = math.acos(cosine)
    return weighted_sum(x, [math.sin(part * angle) / math.sin(angle) for part in (1.0 - t, t)])
