"""The best product of two thin matrices for a large one that is only read by rows.

D [rows, cols] ~ B [rows, rank] @ A [rank, cols], nearest in the Frobenius norm (Eckart-Young). The right
singular vectors of D are the eigenvectors of D^T D, found by subspace iteration: a pass over the rows turns
an orthonormal Q [cols, width] into D^T D Q, which is Q for the next pass once it is orthonormal again, and
Q^T (D^T D Q) tells the energies that Q holds. As wide as D has columns, Q holds all and one pass is exact.
Sums are float64 over blocks that the shape alone decides: the same bits for any number of threads.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from merge.blas import Matrix, one_thread_each
from merge.numerics import Array, Counter, grain_rows

Found = TypeVar("Found")
Rows = Callable[
    [int, int], Array
]  # first row, end row -> [end - first, cols] float32; by any thread

BLOCK_GRAINS = 8  # of one block: 16 MiB of float64
EXACT = 512  # columns up to which Q holds all of them
SPARE = 16  # directions beyond the rank: they turn towards the next ones and keep the last of the rank true
PASSES = 4  # of subspace iteration
FIRST_WIDTH = (
    64  # of Q where an energy is asked for and the rank is not known; doubled until it does
)


@dataclass(frozen=True)
class Factors:
    """b [rows, rank], a [rank, cols] float32, and ||D - b a|| / ||D|| of exactly these (0 where D is 0)."""

    b: Array
    a: Array
    error: float

    @property
    def rank(self) -> int:
        return len(self.a)


@one_thread_each()
def factors_of_product(
    pairs: Sequence[tuple[Array, Array]], *, rank: int | None = None, energy: float | None = None
) -> Factors:
    """The best factors of the sum of b_i a_i for `pairs` (b_i [rows, r_i], a_i [r_i, cols]); the pairs side
    by side, which is exact, where neither rank nor energy asks for less.

    The sum is never formed: with b = Q R and a^T = P S its singular values are those of R S^T.
    """
    b = np.concatenate([b for b, _ in pairs], axis=1)
    a = np.concatenate([a for _, a in pairs], axis=0)
    if energy is None and (rank is None or rank >= len(a)):
        return Factors(b, a, 0.0)
    wide_b, wide_a = b.astype(np.float64), a.astype(np.float64)
    q, r = np.linalg.qr(wide_b)
    p, s = np.linalg.qr(wide_a.T)
    u, values, v = np.linalg.svd(r @ s.T)
    kept = chosen_rank(values**2, float(np.sum(values**2)), rank, energy)
    thin_b = (q @ (u[:, :kept] * values[:kept])).astype(np.float32)
    thin_a = (p @ v[:kept].T).T.astype(np.float32)
    left = np.linalg.qr(np.hstack([wide_b, -thin_b.astype(np.float64)]))[1]
    right = np.linalg.qr(np.hstack([wide_a.T, thin_a.T.astype(np.float64)]))[1]
    missing = float(np.linalg.norm(left @ right.T))
    whole = float(np.linalg.norm(values))
    return Factors(thin_b, np.ascontiguousarray(thin_a), missing / whole if whole else 0.0)


@one_thread_each()
def factors_of_rows(
    read: Rows,
    shape: tuple[int, int],
    *,
    rank: int | None = None,
    energy: float | None = None,
    key: int = 0,
    threads: int = 1,
) -> Factors:
    """The best factors of D, of `shape`, of which `read` gives rows that start and end at blocks.

    rank: of the factors, at most; energy: share of ||D||^2 that they are to keep with the least rank. key:
    of the random start. Reads D PASSES + 2 times, or twice where it has few columns; with an energy again
    for every doubling. Takes what factoring_bytes says, and a block for each thread.
    """
    blocks = _Blocks(read, shape, threads)
    most = min(*shape) if rank is None else min(rank, *shape)
    width = _width(shape, most if energy is None else min(most, FIRST_WIDTH))
    q = _start(shape[1], width, key)
    while True:
        values, vectors, total = _subspace(blocks, q)
        kept = chosen_rank(values, total, most, energy)
        if kept + SPARE <= width or width >= _width(shape, most):
            return _projected(blocks, vectors[:, :kept], total)
        width = _width(shape, 2 * width)
        q = _start(shape[1], width, key)


def chosen_rank(values: Matrix, total: float, rank: int | None, energy: float | None) -> int:
    """How many of the falling `values`, squares of singular values, to keep of `total`: at least one."""
    most = len(values) if rank is None else min(rank, len(values))
    if energy is None:
        return most
    enough = np.cumsum(values) >= energy * total
    return max(1, min(most, int(np.argmax(enough)) + 1 if enough.any() else len(values)))


def factoring_bytes(shape: tuple[int, int], rank: int | None, threads: int) -> int:
    """Memory of factors_of_rows beside its blocks: Q, its products by each thread and their decomposition in
    float64, and the factors. Where no rank is given, an energy may ask for all."""
    rows, cols = shape
    most = min(rows, cols) if rank is None else min(rank, rows, cols)
    width = _width(shape, most)
    return 8 * ((4 + threads) * cols * width + 4 * width * width) + 4 * (rows + cols) * most


def joining_bytes(shape: tuple[int, int], rank: int) -> int:
    """Memory of factors_of_product for pairs of that rank together."""
    return 8 * (6 * sum(shape) * rank + 4 * rank * rank)


def _width(shape: tuple[int, int], rank: int) -> int:
    """Columns of Q: some more than the rank, or all where that is cheap."""
    rows, cols = shape
    return cols if cols <= EXACT else min(rank + max(SPARE, rank // 4), rows, cols)


def _start(cols: int, width: int, key: int) -> Matrix:
    """An orthonormal [cols, width]: random, or the identity where it holds everything."""
    if width == cols:
        return np.eye(cols)
    uniform = Counter.of(0, (cols, width)).random(key)
    return _orthonormal(uniform / 2.0**31 - 1.0)


def _orthonormal(matrix: Matrix) -> Matrix:
    return np.linalg.qr(matrix)[0]


def _subspace(blocks: "_Blocks", q: Matrix) -> tuple[Matrix, Matrix, float]:
    """The largest squares of singular values, falling, their right singular vectors [cols, width], and the
    sum of all squares."""
    whole = q.shape[0] == q.shape[1]
    for _ in range(0 if whole else PASSES):
        q = _orthonormal(blocks.gram_times(q)[0])
    gram, total = blocks.gram_times(q)
    small = q.T @ gram
    values, turn = np.linalg.eigh((small + small.T) / 2)
    return np.maximum(values[::-1], 0.0), q @ turn[:, ::-1], total


def _projected(blocks: "_Blocks", vectors: Matrix, total: float) -> Factors:
    """D on the right singular vectors [cols, rank], and what is missing then, measured."""
    a = np.ascontiguousarray(vectors.T, np.float32)
    b = np.empty((blocks.shape[0], len(a)), np.float32)
    wide = a.astype(np.float64)

    def project(first: int, rows: Matrix) -> float:
        b[first : first + len(rows)] = rows @ vectors
        rows -= b[first : first + len(rows)].astype(np.float64) @ wide
        return float(np.sum(np.square(rows)))

    missing = sum(blocks.over(project))
    return Factors(b, a, float(np.sqrt(missing / total)) if total else 0.0)


@dataclass(frozen=True)
class _Blocks:
    """D by blocks of whole grains."""

    read: Rows
    shape: tuple[int, int]
    threads: int

    def over(self, work: Callable[[int, Matrix], Found]) -> Iterator[Found]:
        """work(first row, float64 rows) of every block in order, a few at once."""
        step = BLOCK_GRAINS * grain_rows(self.shape)
        firsts = range(0, self.shape[0], step)

        def one(first: int) -> Found:
            rows = self.read(first, min(first + step, self.shape[0])).astype(np.float64)
            return work(first, rows)

        with ThreadPoolExecutor(self.threads) as pool:
            for at in range(0, len(firsts), self.threads):  # no more results alive than threads
                yield from pool.map(one, firsts[at : at + self.threads])

    def gram_times(self, q: Matrix) -> tuple[Matrix, float]:
        """D^T D q and the sum of the squares of D."""

        def part(first: int, rows: Matrix) -> tuple[Matrix, float]:
            return rows.T @ (rows @ q), float(np.sum(np.square(rows)))

        total, squares = np.zeros_like(q), 0.0
        for product, square in self.over(part):
            total += product
            squares += square
        return total, squares
