"""Interpolation on the sphere: linear combinations whose coefficients follow from inner products."""

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from merge.methods import Models, Passes, PerModel, Range, Sums, Weight, method
from merge.methods.linear import weighted_sum
from merge.numerics import Array, row_sums

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

    When it helps: two models of one base are to be blended without the loss of length that a linear
    average of vectors at an angle has. For models that nearly agree it hardly differs from linear.

    Parameters:
        t: 0 gives the base, 1 the other model
    """
    cosine = cosine_between(stats, 0, 1, without=1.0)
    return weighted_sum(x, on_arc(t, cosine, straight=abs(cosine) > PARALLEL))


def on_arc(t: float, cosine: float, *, straight: bool) -> list[float]:
    """Coefficients of two models at t between them: on the arc of that cosine, or on the line."""
    if straight:
        return [1.0 - t, t]
    angle = math.acos(cosine)
    return [math.sin(part * angle) / math.sin(angle) for part in (1.0 - t, t)]


def row_grams(x: Models) -> NDArray[np.float64]:
    """Inner products of all pairs of models in each row of a grain, [rows, models, models]."""
    out = np.empty((x[0].shape[0], len(x), len(x)))
    for i, model in enumerate(x):
        wide = model.astype(np.float64)
        for j in range(i + 1):
            out[:, i, j] = out[:, j, i] = row_sums(wide * x[j])
    return out


def of_each(
    products: NDArray[np.float64], coefficients: Callable[[NDArray[np.float64]], list[float]]
) -> Array:
    """The coefficients of the models for each of n inner products [n, models, models], [n, models]."""
    out = np.empty(products.shape[:2], np.float32)
    for i, of_one in enumerate(products):
        out[i] = coefficients(of_one)
    return out


def by_rows(x: Models, coefficients: Callable[[NDArray[np.float64]], list[float]]) -> Array:
    """Weighted sum of the models, with the coefficients of each row from its inner products."""
    weights = of_each(row_grams(x), coefficients)
    return weighted_sum(x, [weights[:, i : i + 1] for i in range(len(x))])


def whole_or_rows(
    size: int, *, models: int, cols: int, filter_wise: bool, **_: Any
) -> Passes | None:
    """Inner products over the whole tensor; none where each row of a grain has its own."""
    return None if filter_wise and cols > 1 else gram(size, models=models)


@method(
    space="delta", base="required", models=(2, 1000), passes=1, workspace=6,
    statistics=whole_or_rows, paper="arXiv:2403.19522",
)  # fmt: skip
def model_stock(x: Models, stats: Any, *, filter_wise: bool = False) -> Array:
    """The point between the base and the average of the models that is nearest to their centre.

    base + t * mean(x_i - base), t = n c / (1 + (n - 1) c), with c the mean cosine of the angles between
    the n task vectors of a tensor. A model that does not differ from the base has none, and counts as
    at right angles to the others.

    When it helps: two or more fine-tunes of one base on the same task; the paper reports that two
    of them come near an average of many. Models of different tasks have task vectors nearly at
    right angles, and the result stays near the base.

    Parameters:
        filter_wise: an angle and a t for every row of a matrix (a vector has one) instead of one for all
    """
    if stats is None:
        return by_rows(x, _nearest_to_the_centre)
    return weighted_sum(x, _nearest_to_the_centre(stats))


def _nearest_to_the_centre(products: NDArray[np.float64]) -> list[float]:
    """t / n for each task vector, from their inner products [models, models]."""
    count = len(products)
    cosines = [cosine_between(products, i, j) for i in range(count) for j in range(i)]
    mean = math.fsum(cosines) / len(cosines)
    t = count * mean / (1.0 + (count - 1) * mean) if mean > -1.0 / (count - 1) else 0.0
    return [t / count] * count


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

    When it helps: more than two models are to be averaged in direction, all with the same say.

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


def no_direction(*, weight: list[float], **_: Any) -> str | None:
    if abs(math.fsum(weight)) < 1e-6 * max(map(abs, weight)) or not any(weight):
        return "the weights sum to 0, which gives no point between the models; change them"
    return None


def _no_mean(*, weight: list[float], normalize_weights: bool, **_: Any) -> str | None:
    return no_direction(weight=weight) if normalize_weights else None


@method(
    space="delta", base="optional", models=(1, 1000), passes=1, workspace=2, statistics=gram,
    check=_no_mean,
    paper="Buss and Fillmore 2001, doi:10.1145/502122.502124",
)  # fmt: skip
def multislerp(
    x: Models,
    stats: Any,
    *,
    weight: PerModel[Weight],
    normalize_weights: bool = True,
    eps: Annotated[float, Range(0)] = 1e-8,
) -> Array:
    """Weighted mean direction, with the weighted mean length; of task vectors where there is a base.

    The first step towards the mean on the sphere: sum(w_i x_i / |x_i|) scaled to length
    sum(w_i |x_i|). Where the directions cancel, the weighted sum of the models.

    When it helps: more than two models, or task vectors, are to be averaged in direction without
    losing length.

    Parameters:
        weight: share of this model
        normalize_weights: divide the weights by their sum
        eps: a shorter sum of directions counts as none
    """
    total = math.fsum(weight) if normalize_weights else 1.0
    shares = np.array(weight) / total
    norms = np.sqrt(np.diagonal(stats))
    directions = np.divide(shares, norms, out=np.zeros(len(x)), where=norms > 0)
    length = math.sqrt(max(0.0, float(directions @ stats @ directions)))
    if length <= eps:
        return weighted_sum(x, shares.tolist())
    return weighted_sum(x, (directions * float(shares @ norms) / length).tolist())


def cosine_between(stats: NDArray[np.float64], i: int, j: int, *, without: float = 0.0) -> float:
    """Of the angle between two models; `without`: where one of them is zero."""
    norms = math.sqrt(stats[i, i]) * math.sqrt(stats[j, j])
    return float(stats[i, j]) / norms if norms else without
