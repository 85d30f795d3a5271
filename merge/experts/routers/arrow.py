"""Arrow: the input direction that an adapter answers to most, read off its factors (arXiv:2405.11157).

An expert's row is the top right singular vector v of its product B A: of all unit vectors x the one with the
largest ||B A x||. Its sign means nothing, so a router counts |v x|.

The product is never formed: with B = Q R and A^T = P S, B A = Q (R S^T) P^T has the singular values of the
small R S^T, and v = P w, w the top right singular vector of that. float64, one thread of BLAS. PEFT finds v
by 15 rounds of power iteration in float32, which is as near as the second singular value is far from the
first.

A DoRA layer is c (W + B A) by rows, c near 1. Here, too, v is of B A alone: the rest of the difference,
(c - 1) W, tells where the base's own values are large, not what the expert has learnt.

A router before a whole layer (per: layer, per: model) takes v of what the experts add to the queries, keys
and values, one below the other. These read what a norm makes of the router's vector; the norm's weights are
left out.
"""

import numpy as np

from merge.blas import Matrix, one_thread_each
from merge.numerics import Array


@one_thread_each()
def input_direction(b: Array, a: Array) -> Matrix:
    """v of b [out, rank] a [rank, in], [in] float64 of unit length, its largest component positive; zeros
    where the product is zero."""
    left = np.linalg.qr(b.astype(np.float64), mode="r")
    right, small = np.linalg.qr(a.T.astype(np.float64))
    _, values, vectors = np.linalg.svd(left @ small.T, full_matrices=False)
    if not values[0]:
        return np.zeros(a.shape[1])
    found: Matrix = right @ vectors[0]
    return found if found[np.argmax(np.abs(found))] > 0 else -found


def direction_bytes(rows: int, cols: int, rank: int) -> int:
    """Memory of input_direction: the factors and their decompositions in float64."""
    return 8 * (4 * (rows + cols) * rank + 6 * rank * rank)
