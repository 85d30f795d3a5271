"""Orthogonal matching pursuit: a donor's row as a short sum of the donor's rows of shared tokens.

The same sum of the model's own rows of those tokens is the row that the model lacks (arXiv 2506.06607).
Of a wanted row x: pick the row a, of length 1, with the largest |a . r|, where r is what the best sum of the
rows picked so far leaves of x; and again. Where we differ: rows are taken around their mean, which all have
in common and which says nothing about a token; they are compared by direction; only the `candidates` rows
nearest to x are looked at; and the weights are those of ridge regression, at the scale that fits x best: a
sum that only just comes to x cancels rows that do not cancel in the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from merge.blas import Matrix, one_thread_each
from merge.errors import PlanError
from merge.numerics import Array
from merge.tokens.fill import Combination, Ids, Rows, Shared, mean_row

LEAST = 1e-12  # share of the energy of x below which nothing is left to explain
DEPENDENT = 1e-10  # energy outside the span of the rows picked below which a row is in it
WANTED_GRAIN = 128  # wanted rows that are compared with shared rows at once
SHARED_GRAIN = 1 << 20  # values of shared rows that are compared at once
MOST_ROWS = 2048  # of a grain of shared rows: it has as many scores for each wanted row


@dataclass(frozen=True)
class Pursuit:
    """terms: of a sum, at most. candidates: rows looked at. ridge: in squares of row lengths.

    Bits per byte of a 260 K Llama with a donor's tokenizer (evals/tokens, stories for choosing), 64 terms:
    ridge 0 5.45, 0.3 2.46, 1 2.29, 2 2.29; 16 terms with ridge 1 2.34; at ridge 0.3 unscaled 2.40. With
    128 of 236 rows looked at: 2.30. A wanted row of 4096 columns takes 0.010 s of one processor among 256
    candidates, 0.032 s among 512.
    """

    terms: int = 64
    candidates: int = 256
    ridge: float = 1.0


@dataclass(frozen=True)
class _Space:
    """The donor's `rows` around the `mean` [cols] of those that are shared, which are told by position."""

    rows: Rows
    shared: Rows
    count: int
    mean: Matrix

    def centred(self, positions: Ids) -> Matrix:
        """Shared rows around the mean, [positions, cols] float64."""
        around: Matrix = self.shared(positions) - self.mean
        return around


@one_thread_each()
def omp(
    donor: Rows,
    shared: Shared,
    wanted: Ids,
    cols: int,
    *,
    how: Pursuit = Pursuit(),
    memory: int,
) -> Combination:
    """The donor's rows `wanted` as sums of its shared rows, told by the model's own row numbers.

    donor: rows of `cols` values. memory: bytes, at least least_memory; with more the shared rows are read
    less often. The same bits for any memory. Raises PlanError for too little memory.
    """
    spare = memory - least_memory(len(shared), cols, how)
    if spare < 0:
        raise PlanError(
            f"matching pursuit in rows of {cols} takes {(memory - spare) >> 20} MiB, {memory >> 20} MiB are "
            "left for it: allow more memory, or fill missing rows by subword"
        )
    space, spare = _space(donor, shared, cols, spare)
    rows = np.full((len(wanted), how.terms), -1, np.int64)
    weights = np.zeros((len(wanted), how.terms), np.float32)
    for first, near in _candidates(space, wanted, how.candidates, spare):
        for at, candidates in enumerate(near, first):
            picked, weight = _pursue(space, how, int(wanted[at]), candidates)
            rows[at, : len(picked)] = shared.own[picked]
            weights[at, : len(picked)] = weight
    return Combination(rows, weights)


def least_memory(shared: int, cols: int, how: Pursuit) -> int:
    """Bytes that `omp` takes at least beside its result: a grain of wanted and one of shared rows and their
    scores; the candidates' rows, their Gram matrix and what is known of each term."""
    near = min(shared, how.candidates)
    rows = _grain(cols)
    compared = 28 * rows * cols + WANTED_GRAIN * (24 * cols + 40 * (near + rows))
    pursued = 24 * near * cols + 8 * near * (near + how.terms + 8)
    return compared + pursued


def _grain(cols: int) -> int:
    """Shared rows that are compared at once."""
    return max(1, min(MOST_ROWS, SHARED_GRAIN // cols))


def _space(donor: Rows, shared: Shared, cols: int, spare: int) -> tuple[_Space, int]:
    """The shared rows, held in memory where `spare` bytes allow it, and what is left of these bytes."""
    mean = mean_row(donor, shared.donor, cols).astype(np.float64)
    size = 4 * cols * len(shared)
    if size > spare:
        return _Space(donor, lambda at: donor(shared.donor[at]), len(shared), mean), spare
    held = np.empty((len(shared), cols), np.float32)
    for first in range(0, len(shared), _grain(cols)):
        held[first : first + _grain(cols)] = donor(shared.donor[first : first + _grain(cols)])
    return _Space(donor, lambda at: held[at], len(shared), mean), spare - size


def _candidates(space: _Space, wanted: Ids, count: int, spare: int) -> Iterator[tuple[int, Ids]]:
    """(position of its first row, [rows, count] positions of the nearest shared rows) of each grain of wanted
    rows; in a pass over the shared rows as many grains are compared as `spare` bytes allow."""
    count = min(count, space.count)
    most = 1 + spare // (WANTED_GRAIN * (4 * len(space.mean) + 12 * count))
    firsts = range(0, len(wanted), WANTED_GRAIN)
    for at in range(0, len(firsts), most):
        few = firsts[at : at + most]
        grains = [wanted[first : first + WANTED_GRAIN] for first in few]
        yield from zip(few, _nearest(space, grains, count), strict=True)


def _nearest(space: _Space, grains: Sequence[Ids], count: int) -> list[Ids]:
    """For each wanted row of each grain the `count` shared rows with the largest |cosine|, rising."""
    if count == space.count:
        return [np.tile(np.arange(count), (len(grain), 1)) for grain in grains]
    targets = [(space.rows(grain) - space.mean).astype(np.float32) for grain in grains]
    best = [(np.empty((len(g), 0), np.int64), np.empty((len(g), 0), np.float32)) for g in grains]
    for first in range(0, space.count, _grain(len(space.mean))):
        at = np.arange(first, min(first + _grain(len(space.mean)), space.count))
        rows = space.centred(at)
        lengths = np.sqrt(np.square(rows).sum(axis=1))
        rows /= _nonzero(lengths)[:, None]
        directions = rows.astype(np.float32).T
        for number, target in enumerate(targets):
            best[number] = _largest(*best[number], at, np.abs(target @ directions), count)
    return [positions for positions, _ in best]


def _largest(positions: Ids, scores: Array, at: Ids, more: Array, count: int) -> tuple[Ids, Array]:
    """The `count` largest of `scores` [rows, any] of `positions` and `more` [rows, at] of `at`; of equals
    the first. In the order of positions, which all of `at` follow."""
    positions = np.hstack([positions, np.broadcast_to(at, more.shape)])
    scores = np.hstack([scores, more])
    surplus = scores.shape[1] - count
    if surplus <= 0:
        return positions, scores
    least = np.partition(scores, surplus, axis=1)[:, surplus, None]
    kept, equal = scores > least, scores == least
    kept |= equal & (np.cumsum(equal, axis=1) <= count - kept.sum(axis=1, keepdims=True))
    return positions[kept].reshape(-1, count), scores[kept].reshape(-1, count)


def _pursue(space: _Space, how: Pursuit, wanted: int, near: Ids) -> tuple[Ids, Matrix]:
    """Positions of the shared rows that are picked for one wanted row, and their weights."""
    target = space.rows(np.array([wanted]))[0] - space.mean
    rows = space.centred(near)
    gram = rows @ rows.T
    lengths = np.sqrt(np.diagonal(gram))
    gram /= _nonzero(lengths)
    gram /= _nonzero(lengths)[:, None]
    products = rows @ target / _nonzero(lengths)
    picked = _picked(gram, products, float(target @ target), how.terms)
    weights = _weights(gram[np.ix_(picked, picked)], products[picked], how.ridge)
    return near[picked], weights / lengths[picked]


def _weights(gram: Matrix, products: Matrix, ridge: float) -> Matrix:
    """Of ridge regression on rows with that Gram matrix, then scaled so that their sum is nearest to x."""
    weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), products).astype(np.float64)
    square = weights @ gram @ weights
    return weights * (weights @ products / square) if square > 0 else weights


def _nonzero(lengths: Matrix) -> Matrix:
    return np.where(lengths > 0, lengths, 1.0)


def _picked(gram: Matrix, products: Matrix, energy: float, terms: int) -> list[int]:
    """Which rows of length 1 are picked, by number; given their `gram` and their products with x, whose
    square is `energy`.

    `against[j]`: the products of all rows with the j-th of the orthonormal directions that those picked
    span; so neither x nor a row is looked at again."""
    free = np.diagonal(gram) > 0
    left, rest, picked = products.copy(), energy, list[int]()
    against = np.empty((terms, len(gram)))
    while len(picked) < terms and rest > LEAST * energy and free.any():
        row = int(np.argmax(np.where(free, np.abs(left), -1.0)))
        free[row] = False
        known = against[: len(picked)]
        outside = gram[row, row] - known[:, row] @ known[:, row]
        if outside < DEPENDENT:
            continue
        direction = (gram[row] - known[:, row] @ known) / np.sqrt(outside)
        step = left[row] / np.sqrt(outside)
        left -= step * direction
        rest -= step * step
        against[len(picked)] = direction
        picked.append(row)
    return picked
