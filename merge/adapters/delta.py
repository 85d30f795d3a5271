"""How the tensors of a merge differ from those of its base, read by rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from merge.adapters.alone import Sum
from merge.numerics import Array, grain_rows, rows_and_cols

BLOCK_GRAINS = 8  # read at once


@dataclass(frozen=True)
class Delta:
    """One tensor of a merge, of `shape`, to be stored as `dtype`, and what it adds to its base's.

    tuned(first, end): its rows [end - first, cols] float32, which start and end at grains. read: the same
    rows less the base's; None where the base has no such tensor or fewer rows. known: the difference as
    a sum of products, where it is one.
    """

    shape: tuple[int, ...]
    dtype: str
    tuned: Callable[[int, int], Array]
    read: Callable[[int, int], Array] | None
    known: Sum | None = None

    @property
    def nbytes(self) -> int:
        """As float32."""
        rows, cols = rows_and_cols(self.shape)
        return 4 * rows * cols

    def blocks(self) -> Iterator[tuple[int, int]]:
        rows, step = rows_and_cols(self.shape)[0], BLOCK_GRAINS * grain_rows(self.shape)
        for first in range(0, rows, step):
            yield first, min(first + step, rows)

    def norm(self) -> float:
        """Of the difference; of the whole tensor where the base has none to compare with."""
        read = self.read or self.tuned
        return float(
            np.sqrt(sum(float(np.sum(np.square(read(a, b), dtype="f8"))) for a, b in self.blocks()))
        )
