"""Rows of an embedding or head, put together row by row from tensors of models and from what is computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from merge.numerics import STORAGE, Array, Raw, grain_rows, to_float32, whole_grains
from merge.sources import Source, TensorInfo

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Stored:
    """A tensor of a model, whose rows can be read by their numbers."""

    source: Source
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.source.tensors[self.name]

    def rows(self, numbers: Numbers) -> Raw:
        """Rows [n, cols] as stored, in any order; raises ReadError."""
        assert not len(numbers) or (numbers.min() >= 0 and numbers.max() < self.info.rows)
        found = np.empty((len(numbers), self.info.cols), STORAGE[self.info.dtype])
        for at, first, end in _runs(numbers):
            found[at : at + end - first] = self._between(first, end)
        return found

    def float_rows(self, numbers: Numbers) -> Array:
        return to_float32(self.rows(numbers), self.info.dtype)

    def scratch(self, rows: int) -> int:
        """Bytes that reading so many rows takes beside the rows themselves."""
        info = self.info
        if info.file:
            return rows * info.row_bytes
        whole = rows + 2 * grain_rows(info.shape)
        return whole * info.row_bytes + self.source.scratch(self.name, whole)

    def _between(self, first: int, end: int) -> Raw:
        """What is computed as it is read is read by whole grains: so it has the bits of a merge."""
        info = self.info
        a, b = (first, end) if info.file else whole_grains(info.shape, first, end)
        rows = np.empty((b - a, info.cols), STORAGE[info.dtype])
        self.source.read(self.name, a, b, rows.reshape(-1).view(np.uint8).data)
        return rows[first - a : end - a]


@dataclass(frozen=True)
class Computed:
    """Rows that no model has: `rows(numbers)` -> float32 [n, cols]. `scratch`, `held`: as of a Source."""

    rows: Callable[[Numbers], Array]
    scratch: Callable[[int], int] = lambda rows: 0
    held: int = 0


@dataclass(frozen=True)
class View:
    """A tensor whose row r is row `number[r]` of `parts[part[r]]`."""

    parts: tuple[Stored | Computed, ...]
    part: NDArray[np.int16]
    number: Numbers
    info: TensorInfo

    @classmethod
    def of(
        cls,
        parts: Sequence[Stored | Computed],
        part: NDArray[np.int16],
        number: Numbers,
        like: TensorInfo,
    ) -> "View":
        """With columns and dtype of `like`; in float32 where some rows are computed, or stored otherwise."""
        used = [parts[i] for i in np.unique(part)]
        dtypes = {p.info.dtype if isinstance(p, Stored) else "F32" for p in used} or {like.dtype}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        shape = (len(part), *like.shape[1:])
        return cls(tuple(parts), part, number, TensorInfo(dtype, shape, stored=like.written))

    def read(self, first: int, end: int, out: memoryview) -> None:
        dtype = self.info.dtype
        rows = np.frombuffer(out, STORAGE[dtype]).reshape(end - first, self.info.cols)
        chosen = self.part[first:end]
        for i in np.unique(chosen):
            at = np.flatnonzero(chosen == i)
            part, numbers = self.parts[i], self.number[first:end][at]
            if isinstance(part, Stored) and part.info.dtype == dtype:
                rows[at] = part.rows(numbers)
            else:
                rows[at] = (
                    part.float_rows(numbers) if isinstance(part, Stored) else part.rows(numbers)
                )

    def scratch(self, rows: int) -> int:
        inside = max((part.scratch(rows) for part in self.parts), default=0)
        return inside + 3 * rows * 4 * self.info.cols


@dataclass
class Views:
    """The views that a plan reads, under names of their own."""

    tensors: dict[str, View] = field(default_factory=dict)

    def add(self, name: str, view: View) -> TensorInfo:
        assert name not in self.tensors
        self.tensors[name] = view
        return view.info

    def source(self) -> Source:
        held = {
            id(p): p.held for v in self.tensors.values() for p in v.parts if isinstance(p, Computed)
        }
        return Source(
            {name: view.info for name, view in self.tensors.items()},
            lambda name, first, end, out: self.tensors[name].read(first, end, out),
            lambda name, rows: self.tensors[name].scratch(rows),
            sum(held.values()),
        )


def groups(owned: Mapping[int, NDArray[np.bool_]]) -> Iterator[tuple[tuple[int, ...], Numbers]]:
    """Sets of owners with the rows that all of them, and no others, own, ascending. `owned`: [rows] each."""
    owners = np.array(list(owned))
    table = np.stack([owned[owner] for owner in owned], axis=1)
    found, which = np.unique(table, axis=0, return_inverse=True)
    for i in reversed(range(len(found))):
        yield tuple(owners[found[i]].tolist()), np.flatnonzero(which.reshape(-1) == i)


def _runs(numbers: Numbers) -> Iterator[tuple[int, int, int]]:
    """(place, first, end) of every stretch of numbers that follow one another."""
    if not len(numbers):
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    starts = [0, *breaks.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
        first = int(numbers[start])
        yield start, first, first + stop - start
