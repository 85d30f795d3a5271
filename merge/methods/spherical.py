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


@method(
    space="delta", base="required", models=(2, 1000), passes=1, workspace=4, statistics=gram,
    paper="arXiv:2403.19522",
)  # fmt: skip
def model_stock(x: Models, stats: Any) -> Array:
    """The point between the base and the average of the models that is nearest to their centre.

    base + t * mean(x_i - base), t = n c / (1 + (n - 1) c), with c the mean cosine of the angles between
    the n task vectors of a tensor. A model that does not differ from the base has none, and counts as
    at right angles to the others.
    """
    count = len(x)
    cosines = [_cosine(stats, i, j) for i in range(count) for j in range(i)]
    mean = math.fsum(cosines) / len(cosines)
    t = count * mean / (1.0 + (count - 1) * mean) if mean > -1.0 / (count - 1) else 0.0
    return weighted_sum(x, [t / count] * count)


@method(space="weights", base="donor", models=(1, 1000), passes=1, workspace=2, statistics=gram,
        paper="Karcher 1977, doi:10.1002/cpa.3160300502")  # fmt: skip
def karcher(
    x: Models,
    stats: Any,
    *,
    max_iter: Annotated[int, Range(1, 10_000)] = 10,
    tol: Annotated[float, Range(0)] = 1e-5,
) -> Array:
    """Mean on the sphere: each tensor's direction is the point with the smallest summed squared angles.

    The length is the mean of the lengths; tensors of zeros have no direction and are left out of both.
    Found by gradient steps on the coefficients of the models alone, from their inner products.

    Parameters:
        max_iter: most steps that are taken
        tol: length of a step, in radians, at which the search ends
    """
    norms = np.sqrt(np.diagonal(stats))
    used = [i for i in range(len(x)) if norms[i] > 0]
    if not used:
        return x[0] * 1.0
    cosines = stats[np.ix_(used, used)] / np.outer(norms[used], norms[used])
    direction = _karcher_mean(cosines, max_iter, tol)
    weights = np.zeros(len(x))
    weights[used] = direction * norms[used].mean() / norms[used]
    return weighted_sum(x, weights.tolist())


def _karcher_mean(cosines: NDArray[np.float64], max_iter: int, tol: float) -> NDArray[np.float64]:
    """Coefficients of unit vectors with these inner products that give their mean on the sphere."""

    def length(coefficients: NDArray[np.float64]) -> float:
        return math.sqrt(max(0.0, float(coefficients @ cosines @ coefficients)))

    count = len(cosines)
    mean = np.full(count, 1.0 / count)
    if length(mean) == 0.0:  # they point away from one another: the first is as good as any
        mean = np.eye(count)[0]
    mean /= length(mean)
    for _ in range(max_iter):
        angles = np.arccos(np.clip(cosines @ mean, -1.0, 1.0))
        pull = np.where(np.sin(angles) > 1e-12, angles / np.maximum(np.sin(angles), 1e-12), 1.0)
        step = (pull - (pull * np.cos(angles)).sum() * mean) / count
        size = length(step)
        if size < tol or size == 0.0:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
        mean /= length(mean)
    return mean


def _cosine(stats: NDArray[np.float64], i: int, j: int) -> float:
    norms = math.sqrt(stats[i, i]) * math.sqrt(stats[j, j])
    return float(stats[i, j]) / norms if norms else 0.0
