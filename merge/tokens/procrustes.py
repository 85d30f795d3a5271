"""Procrustes: the rotation and scale that bring a donor's rows nearest to the model's, from shared ones.

With A the donor's and B the model's rows of the shared tokens, each around their mean, and A^T B = U S V^T:
R = U V^T is the rotation with the largest tr(R^T A^T B), so the least ||A R - B|| (Schoenemann 1966), and
s = tr(S) / ||A R||^2 is the best scale then. Between widths R has orthonormal rows, or columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from merge.blas import Matrix, one_thread_each
from merge.errors import PlanError
from merge.numerics import Array, grain_rows
from merge.tokens.fill import Ids, Rows, Shared, mean_row

PIECE = 128  # wanted rows that are mapped in one product


@dataclass(frozen=True)
class LinearMap:
    """own_mean + (row - donor_mean) @ matrix; matrix [donor cols, own cols] float64."""

    matrix: Matrix
    donor_mean: Array
    own_mean: Array


@one_thread_each()
def procrustes(
    donor: Rows, own: Rows, shared: Shared, donor_cols: int, own_cols: int, *, memory: int
) -> LinearMap:
    """The rotation with scale that fits best. memory: bytes, at least what fitting_memory says (else
    PlanError). Sums are float64 over pieces that the shapes alone decide."""
    if memory < (least := fitting_memory(donor_cols, own_cols)):
        raise PlanError(
            f"fitting rows of {donor_cols} to rows of {own_cols} takes {least >> 20} MiB, "
            f"{memory >> 20} MiB are left for it: allow more memory, or fill missing rows by subword"
        )
    means = mean_row(donor, shared.donor, donor_cols), mean_row(own, shared.own, own_cols)
    u, values, v = np.linalg.svd(_across(donor, own, shared, means), full_matrices=False)
    rotation = u @ v
    energy = sum(float(np.square(a @ rotation).sum()) for a, _ in _pairs(donor, own, shared, means))
    return LinearMap(rotation * (values.sum() / energy if energy else 0.0), *means)


def fitting_memory(donor_cols: int, own_cols: int) -> int:
    """Bytes that `procrustes` takes: the matrix, its decomposition, and pieces of the rows."""
    small = min(donor_cols, own_cols)
    matrices = 3 * donor_cols * own_cols + 2 * small * (donor_cols + own_cols) + 12 * small * small
    return 8 * matrices + (64 << 20)


def mapped(donor: Rows, fitted: LinearMap, wanted: Ids) -> Rows:
    """The donor's rows `wanted`, brought to the model's space, by positions in `wanted`.

    They are computed PIECE at a time whichever of them are asked for, so that the bits are the same.
    """
    mean, shift = fitted.donor_mean.astype(np.float64), fitted.own_mean.astype(np.float64)

    @one_thread_each()
    def read(positions: Ids) -> Array:
        out = np.empty((len(positions), len(shift)), np.float32)
        pieces = positions // PIECE
        for piece in np.unique(pieces):
            asked = pieces == piece
            rows = shift + (donor(wanted[PIECE * piece :][:PIECE]) - mean) @ fitted.matrix
            out[asked] = rows[positions[asked] % PIECE]
        return out

    return read


def _across(donor: Rows, own: Rows, shared: Shared, means: tuple[Array, Array]) -> Matrix:
    """A^T B."""
    total = np.zeros((len(means[0]), len(means[1])))
    for a, b in _pairs(donor, own, shared, means):
        total += a.T @ b
    return total


def _pairs(
    donor: Rows, own: Rows, shared: Shared, means: tuple[Array, Array]
) -> Iterator[tuple[Matrix, Matrix]]:
    """Both models' rows around their means, piece by piece."""
    step = grain_rows((len(shared), max(map(len, means))))
    for first in range(0, len(shared), step):
        few = slice(first, first + step)
        yield (
            donor(shared.donor[few]) - means[0].astype(float),
            own(shared.own[few]) - means[1].astype(float),
        )
