"""How the tensors of a fine-tune differ from those of its base, read by rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from merge.blas import product
from merge.errors import NonFiniteError, PlanError
from merge.numerics import FLOATS, Array, grain_rows, rows_and_cols
from merge.sources.lora import HEAD
from merge.sources.model import Model

BLOCK_GRAINS = 8  # read at once


@dataclass(frozen=True)
class Delta:
    """One tensor of a fine-tune, of `shape` and stored as `dtype`, and what it adds to its base's.

    tuned(first, end): its rows [end - first, cols] float32, which start and end at grains. read: the same
    rows less the base's; None where the base has no such tensor or fewer rows. factors: pairs
    (b [rows, r], a [r, cols]) whose products add up to that difference, where they are known.
    """

    shape: tuple[int, ...]
    dtype: str
    tuned: Callable[[int, int], Array]
    read: Callable[[int, int], Array] | None
    factors: tuple[tuple[Array, Array], ...] = ()

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


def deltas_between(base: Model, tuned: Model) -> dict[str, Delta]:
    """What `tuned` changed, by tensor name, whether it did or not; raises PlanError where the two are not of
    one architecture."""
    before, after = base.source.tensors, tuned.source.tensors
    if missing := sorted(before.keys() - after.keys() - ({HEAD} if base.tied else set())):
        raise PlanError(
            f"{tuned.label}: lacks tensor {missing[0]!r} of {base.label}; it is no fine-tune of it"
        )
    own_head = HEAD in before or not tuned.tied
    return {name: _delta(base, tuned, name) for name in after if name != HEAD or own_head}


def delta_of(pairs: Sequence[tuple[Array, Array]]) -> Delta:
    """The change of a linear layer's weight that is the sum of b a for `pairs`, b [rows, rank] and
    a [rank, cols] float32."""
    b = np.concatenate([b for b, _ in pairs], axis=1)
    a = np.concatenate([a for _, a in pairs], axis=0).astype(np.float64)

    def difference(first: int, end: int) -> Array:
        return product(b[first:end].astype(np.float64), a).astype(np.float32)

    return Delta((len(b), a.shape[1]), "F32", difference, difference, tuple(pairs))


def _delta(base: Model, tuned: Model, name: str) -> Delta:
    info, old = tuned.source.tensors[name], base.source.tensors.get(name)

    def after(first: int, end: int) -> Array:
        return _finite(tuned, name, tuned.source.rows(name, first, end))

    def difference(first: int, end: int) -> Array:
        return _finite(base, name, after(first, end) - base.source.rows(name, first, end))

    if old is None or old.shape == info.shape:
        return Delta(info.shape, info.written, after, difference if old else None)
    if old.shape[1:] != info.shape[1:] or old.rows > info.rows or info.dtype not in FLOATS:
        raise PlanError(
            f"{tuned.label}: tensor {name!r} has shape {list(info.shape)}, but {list(old.shape)} in "
            f"{base.label}; only more rows can be new"
        )
    return Delta(info.shape, info.written, after, None)


def _finite(model: Model, name: str, rows: Array) -> Array:
    if not np.isfinite(rows).all():
        raise NonFiniteError(
            f"{model.label}: tensor {name!r} holds NaN or infinity; repair the model"
        )
    return rows
