"""SCE: select where models differ, calculate their weights, erase minorities."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from merge.methods import Density, Models, Passes, Range, Sums, method
from merge.methods.linear import weighted_sum
from merge.methods.ties import elected, magnitudes_at
from merge.numerics import Array


@dataclass(frozen=True)
class Selection:
    """What SCE knows of a tensor. `threshold`: least spread that is selected (None: everything is);
    `weights`: share of each model, their sum 1 (all 0 where no model differs from the base)."""

    threshold: float | None
    weights: tuple[float, ...]


def spread(x: Models) -> list[Array]:
    """One array that ranks positions as the variance over the models does, 0 where they are equal.

    n sum(e**2) - sum(e)**2 with e = x - x[0]: since x[0] is one of the models, the difference costs at
    most a factor n of precision, and values that are whole multiples of one another stay exact.
    """
    e = [model - x[0] for model in x[1:]] or [x[0] * 0.0]
    squares = [value * value for value in e]
    total = weighted_sum(e, [1.0] * len(e))
    return [weighted_sum(squares, [float(len(x))] * len(e)) - total * total]


def selection(
    size: int, *, models: int, select_topk: float, uniform_below: float, **_: object
) -> Passes:
    """A Selection: the floor(select_topk * m) largest of the m spreads that are not 0, then the energies
    of what is selected."""
    threshold = None
    if select_topk < 1.0:
        (differing,) = yield Sums(lambda x: [(spread(x)[0] > 0).astype(np.float64)])
        rank = int(select_topk * int(differing))
        found = (yield from magnitudes_at([(0, rank)], spread)) if rank else [np.inf]
        threshold = float(found[0])
    energies = yield Sums(partial(_energies, threshold=threshold))
    total = float(energies.sum())
    if total < uniform_below * size:
        return Selection(threshold, (1.0 / models,) * models)
    return Selection(threshold, tuple((energies / total if total else energies).tolist()))


def selected(x: Models, threshold: float | None) -> Models:
    """The values where the models differ most, else 0."""
    if threshold is None:
        return x
    chosen = spread(x)[0] >= np.float32(threshold)
    return [value * chosen for value in x]


def _energies(x: Models, *, threshold: float | None) -> list[NDArray[np.float64]]:
    wide = [value.astype(np.float64) for value in selected(x, threshold)]
    return [value * value for value in wide]


@method(
    space="delta", base="required", passes=4, workspace=6, statistics=selection,
    mergekit={"uniform_below": 1e-6}, paper="arXiv:2408.07990",
)  # fmt: skip
def sce(
    x: Models,
    stats: Selection,
    *,
    select_topk: Density = 1.0,
    uniform_below: Annotated[float, Range(0)] = 0.0,
    int8_mask: bool = False,
) -> Array:
    """Task vectors where they differ most, weighted by their energy, without minority signs.

    base + sum_i(w_i d_i [agree_i]) / sum_i(w_i [agree_i]): d_i keeps the positions whose variance over
    the models is among the largest `select_topk` of those above 0 (equal ones stay too), w_i is the share
    of sum(d_i**2) of the tensor, and agree_i holds where d_i has the sign of sum_i(d_i).

    When it helps: several task vectors of unequal size and no idea of their weights, which follow
    from how far each model moved, tensor by tensor. A model that moved far is not always the better
    one.

    Parameters:
        select_topk: fraction of the differing positions that are merged; the others keep the base
        uniform_below: mean energy, summed over the models, below which they weigh alike (mergekit: 1e-6,
            a common size for task vectors)
        int8_mask: accepted for mergekit's sake; without effect
    """
    kept = selected(x, stats.threshold)
    agree = elected(kept, kept)
    total = weighted_sum([v * a for v, a in zip(kept, agree, strict=True)], stats.weights)
    divisor = weighted_sum([a.astype(np.float32) for a in agree], stats.weights)
    merged: Array = total / (divisor + (divisor == 0))
    return merged
