"""NuSLERP: an arc between two models, or two task vectors; one for the whole tensor or one for each row
or column."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.methods import Models, Passes, PerModel, Sums, Weight, method
from merge.methods.linear import weighted_sum
from merge.methods.spherical import by_rows, cosine_between, gram, no_direction, of_each, on_arc
from merge.numerics import Array

COLLINEAR = 1e-7  # sine below which no arc is drawn; float64 tells smaller angles no more
PART, PARTS = 36, 3  # bits, and how many of them: sums of 2**27 integers of 36 bits fit 63
COLUMNS = 1 << 15  # whose sums are taken in one pass: 9 integers each are 2.3 MiB


def arc_products(
    size: int, *, models: int, cols: int, nuslerp_flatten: bool, nuslerp_row_wise: bool, **_: Any
) -> Passes | None:
    """Inner products of the two models, [2, 2], or in each column, [cols, 2, 2]; none where each row of a
    grain has its own."""
    if nuslerp_flatten or cols == 1:
        return gram(size, models=models)
    return _column_products(cols) if nuslerp_row_wise else None


def arc_weights(
    products: NDArray[np.float64], *, weight: Sequence[float], **_: Any
) -> list[float] | Array:
    """Coefficients of the two models, or for each column, float32 [2, cols]."""
    if products.ndim == 2:
        return _arc_weights(weight, products)
    return np.ascontiguousarray(of_each(products, partial(_arc_weights, weight)).T)


@method(
    space="delta", base="optional", models=(2, 2), passes=2, workspace=7, statistics=arc_products,
    settled=arc_weights, check=no_direction, paper="Shoemake 1985, doi:10.1145/325334.325242",
)  # fmt: skip
def nuslerp(
    x: Models,
    stats: Any,
    *,
    weight: PerModel[Weight],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:
    """Point on the arc between two models, or between two task vectors where there is a base.

    As slerp with t = w_1 / (w_0 + w_1), but only what is truly parallel is taken as such. Rows and
    columns are those of the stored matrix (all axes but the last are rows), on which nuslerp_row_wise
    has mergekit's meaning in spite of its name. A vector always has one arc.

    When it helps: as slerp; with a base, where two task vectors at a large angle are to be blended
    without shrinking.

    Parameters:
        weight: share of this model
        nuslerp_flatten: one arc for the whole tensor; false: one for each row
        nuslerp_row_wise: without nuslerp_flatten, one arc for each column instead; with it, no effect
    """
    if stats is None:
        return by_rows(x, partial(_arc_weights, weight))
    return weighted_sum(x, stats)


def _column_products(cols: int) -> Passes:
    """So many columns in a pass that their sums stay small."""
    energy = (yield from gram(0, models=2)).max()
    bound = 2.0 ** math.frexp(energy)[1]
    out = np.empty((cols, 2, 2))
    for first in range(0, cols, COLUMNS):
        columns = slice(first, first + COLUMNS)
        out[columns] = yield from _column_grams(2, columns, bound)
    return out


def _column_grams(models: int, columns: slice, bound: float) -> Passes:
    """Inner products of all pairs of models in each of `columns`, [columns, models, models] float64.

    Products of float32 are exact in float64; cut into PARTS integers of PART bits below `bound`, which
    none exceeds, they are summed exactly, for up to 2**27 rows.
    """
    pairs = [(i, j) for i in range(models) for j in range(i + 1)]
    sums = yield Sums(lambda x: _parts([m[:, columns] for m in x], pairs, bound), by_column=True)
    sums = sums.reshape(len(pairs), PARTS, -1)
    out = np.empty((sums.shape[2], models, models))
    for (i, j), parts in zip(pairs, sums, strict=True):
        total = sum(part * 2.0 ** (-PART * k) for k, part in enumerate(parts, start=1))
        out[:, i, j] = out[:, j, i] = total * bound
    return out


def _parts(
    x: Models, pairs: Sequence[tuple[int, int]], bound: float
) -> Iterator[NDArray[np.int64]]:
    """Of each product the highest PART bits, the next, and so on, as integers."""
    for i, j in pairs:
        rest = x[i].astype(np.float64) * x[j]
        rest *= 1.0 / bound
        for _ in range(PARTS):
            rest *= 2.0**PART
            whole = np.trunc(rest)
            yield whole.astype(np.int64)
            rest -= whole


def _arc_weights(weight: Sequence[float], products: NDArray[np.float64]) -> list[float]:
    """Coefficients of two models on their arc, from their inner products [2, 2]."""
    cosine = min(1.0, max(-1.0, cosine_between(products, 0, 1, without=1.0)))
    straight = math.sin(math.acos(cosine)) < COLLINEAR
    return on_arc(weight[1] / math.fsum(weight), cosine, straight=straight)
