"""Matrices of experts that are made as they are read: parts of others, with noise, partly drawn anew, joined.

Whatever is random is a hash of what it is for and of an element's number, so it does not matter how rows are
read. All give float32 but those that only take over what is stored.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from merge.numerics import (
    NORMAL_BYTES,
    STORAGE,
    Array,
    Counter,
    Raw,
    grain_rows,
    grains,
    normal,
    pairwise,
    row_sums,
    to_float32,
    whole_grains,
)
from merge.sources import Source, TensorInfo


class Rows(Protocol):
    """A matrix. `read(first, end)`: any rows of it, [end - first, cols] as `info.dtype` is stored, for the
    caller to change; raises ReadError. `room(rows)`: bytes that reading so many takes, with themselves.
    `sources`: where it is read from."""

    @property
    def info(self) -> TensorInfo: ...

    @property
    def sources(self) -> Sequence[Source]: ...

    def read(self, first: int, end: int) -> Raw: ...

    def room(self, rows: int) -> int: ...


@dataclass
class Making:
    """Matrices under names of their own, as a model's tensors."""

    tensors: dict[str, Rows] = field(default_factory=dict)

    def add(self, name: str, rows: Rows) -> TensorInfo:
        """What is known by a name is the same whenever it is added."""
        return self.tensors.setdefault(name, rows).info

    def source(self) -> Source:
        infos = {name: rows.info for name, rows in self.tensors.items()}
        inside = {id(s): s.held for rows in self.tensors.values() for s in rows.sources}
        return Source(infos, self._read, self._scratch, sum(inside.values()))

    def _read(self, name: str, first: int, end: int, out: memoryview) -> None:
        rows = self.tensors[name]
        filled = np.frombuffer(out, STORAGE[rows.info.dtype]).reshape(end - first, rows.info.cols)
        for a, b in grains(rows.info.shape, first, end):
            filled[a - first : b - first] = rows.read(a, b)

    def _scratch(self, name: str, rows: int) -> int:
        made = self.tensors[name]
        return made.room(min(rows, grain_rows(made.info.shape)))


@dataclass(frozen=True)
class Stretch:
    """Rows [first, end) of a tensor of a model, as they are stored."""

    source: Source
    name: str
    first: int
    end: int

    @classmethod
    def whole(cls, source: Source, name: str) -> "Stretch":
        return cls(source, name, 0, source.tensors[name].rows)

    @property
    def info(self) -> TensorInfo:
        of = self.source.tensors[self.name]
        return TensorInfo(of.dtype, (self.end - self.first, *of.shape[1:]), stored=of.written)

    @property
    def sources(self) -> Sequence[Source]:
        return (self.source,)

    def read(self, first: int, end: int) -> Raw:
        """What is computed as it is read is read by whole grains, as its source wants it."""
        of = self.source.tensors[self.name]
        first, end = self.first + first, self.first + end
        a, b = (first, end) if of.file else whole_grains(of.shape, first, end)
        rows = np.empty((b - a, of.cols), STORAGE[of.dtype])
        self.source.read(self.name, a, b, rows.reshape(-1).view(np.uint8).data)
        return rows[first - a : end - a]

    def room(self, rows: int) -> int:
        of = self.source.tensors[self.name]
        read = rows if of.file else min(rows + 2 * grain_rows(of.shape), of.rows)
        return read * of.row_bytes + self.source.scratch(self.name, read)


@dataclass(frozen=True)
class Zeros:
    """A matrix of zeros."""

    info: TensorInfo
    sources: Sequence[Source] = ()

    def read(self, first: int, end: int) -> Raw:
        return np.zeros((end - first, self.info.cols), STORAGE[self.info.dtype])

    def room(self, rows: int) -> int:
        return rows * self.info.row_bytes


@dataclass(frozen=True)
class Scaled:
    """`of` times `factor`."""

    of: Rows
    factor: float

    @property
    def info(self) -> TensorInfo:
        return _computed(self.of.info)

    @property
    def sources(self) -> Sequence[Source]:
        return self.of.sources

    def read(self, first: int, end: int) -> Array:
        return _floats(self.of, first, end) * np.float32(self.factor)

    def room(self, rows: int) -> int:
        return self.of.room(rows) + 2 * rows * self.info.row_bytes


@dataclass(frozen=True)
class Noisy:
    """`of` plus standard normal numbers, which the stream `key` draws, times `scale`."""

    of: Rows
    scale: float
    key: int

    @property
    def info(self) -> TensorInfo:
        return _computed(self.of.info)

    @property
    def sources(self) -> Sequence[Source]:
        return self.of.sources

    def read(self, first: int, end: int) -> Array:
        values = _floats(self.of, first, end)
        values += self.scale * _drawn(self.key, first, values.shape)
        return values

    def room(self, rows: int) -> int:
        return self.of.room(rows) + rows * self.info.cols * (4 + NORMAL_BYTES)


@dataclass(frozen=True)
class Columns:
    """The inner columns of an expert's MLP that are drawn anew: floor(share * width) of `width`, those
    for which the stream `key` draws the least numbers."""

    key: int
    width: int
    share: float

    @property
    def count(self) -> int:
        return int(self.share * self.width + 1e-9)  # 0.29 * 100 is a little less than 29

    def chosen(self) -> NDArray[np.bool_]:
        """[width]."""
        order = np.argsort(Counter.of(0, (1, self.width)).random(self.key)[0], kind="stable")
        found = np.zeros(self.width, np.bool_)
        found[order[: self.count]] = True
        return found


@dataclass(frozen=True)
class Redrawn:
    """`of` [rows, cols] with what belongs to some inner columns of an MLP drawn anew (Drop-Upcycling, arXiv
    2502.19261): rows of the gate and up projections (axis 0), columns of the down projection (axis 1).

    An element there becomes mean + std * z, of z standard normal from the stream `key`; mean and std (over
    all, not one less) are those of the elements that are replaced. They are found when the first rows are
    asked for, by a pass over the matrix.
    """

    of: Rows
    columns: Columns
    axis: int
    key: int
    _found: list[tuple[float, float]] = field(default_factory=list, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @property
    def info(self) -> TensorInfo:
        return _computed(self.of.info)

    @property
    def sources(self) -> Sequence[Source]:
        return self.of.sources

    def read(self, first: int, end: int) -> Array:
        mean, std = self._mean_and_std()
        values = _floats(self.of, first, end)
        where = self._where(first, end)
        if not where.any():
            return values
        drawn = _drawn(self.key, first, values.shape)
        drawn *= std
        drawn += mean
        np.copyto(values, drawn, where=where, casting="same_kind")
        return values

    def room(self, rows: int) -> int:
        """Of numbers drawn; of the pass, the elements in float64 and their sums by halves."""
        return (
            self.of.room(rows)
            + rows * self.info.cols * (4 + NORMAL_BYTES)
            + 20 * self.columns.width
        )

    def _where(self, first: int, end: int) -> NDArray[np.bool_]:
        """[rows, 1] or [1, cols]: which elements are replaced."""
        chosen = self.columns.chosen()
        return chosen[first:end, None] if self.axis == 0 else chosen[None, :]

    def _mean_and_std(self) -> tuple[float, float]:
        with self._lock:
            if not self._found:
                self._found.append(self._measured())
            return self._found[0]

    def _measured(self) -> tuple[float, float]:
        info, chosen = self.info, self.columns.chosen()
        parts = [np.zeros(2)]
        for a, b in grains(info.shape):
            picked = chosen[a:b] if self.axis == 0 else chosen
            if picked.any():
                parts.append(_sums(np.compress(picked, _floats(self.of, a, b), axis=self.axis)))
        count = self.columns.count * (info.cols if self.axis == 0 else info.rows)
        mean, square = (pairwise(parts) / max(1, count)).tolist()
        return mean, max(0.0, square - mean * mean) ** 0.5


@dataclass(frozen=True)
class Middle:
    """`count` rows that are each the mean of all rows of `of`, which are few and narrow."""

    of: Rows
    count: int

    @property
    def info(self) -> TensorInfo:
        whole = self.of.info
        return _computed(replace(whole, shape=(self.count, *whole.shape[1:])))

    @property
    def sources(self) -> Sequence[Source]:
        return self.of.sources

    def read(self, first: int, end: int) -> Array:
        whole = _floats(self.of, 0, self.of.info.rows).astype(np.float64)
        mean = (row_sums(np.ascontiguousarray(whole.T)) / len(whole)).astype(np.float32)
        return np.repeat(mean[None], end - first, axis=0)

    def room(self, rows: int) -> int:
        whole = self.of.info.rows
        return self.of.room(whole) + (24 * whole + 4 * rows) * self.info.cols


@dataclass(frozen=True)
class Stacked:
    """The rows of all `parts`, one after another."""

    parts: Sequence[Rows]

    @property
    def sources(self) -> Sequence[Source]:
        return [source for part in self.parts for source in part.sources]

    @property
    def info(self) -> TensorInfo:
        first = self.parts[0].info
        return _joined(self.parts, (sum(part.info.rows for part in self.parts), *first.shape[1:]))

    def read(self, first: int, end: int) -> Raw:
        found, start = [], 0
        for part in self.parts:
            a, b = max(first - start, 0), min(end - start, part.info.rows)
            if a < b:
                found.append(_as(part, a, b, self.info.dtype))
            start += part.info.rows
        return np.concatenate(found)

    def room(self, rows: int) -> int:
        inside = max(part.room(min(rows, part.info.rows)) for part in self.parts)
        return inside + 3 * rows * self.info.row_bytes


@dataclass(frozen=True)
class Beside:
    """The columns of all `parts`, one after another."""

    parts: Sequence[Rows]

    @property
    def sources(self) -> Sequence[Source]:
        return [source for part in self.parts for source in part.sources]

    @property
    def info(self) -> TensorInfo:
        rows = self.parts[0].info.rows
        return _joined(self.parts, (rows, sum(part.info.cols for part in self.parts)))

    def read(self, first: int, end: int) -> Raw:
        dtype = self.info.dtype
        return np.concatenate([_as(part, first, end, dtype) for part in self.parts], axis=1)

    def room(self, rows: int) -> int:
        return max(part.room(rows) for part in self.parts) + 3 * rows * self.info.row_bytes


def _computed(info: TensorInfo) -> TensorInfo:
    return TensorInfo("F32", info.shape, stored=info.written)


def _joined(parts: Sequence[Rows], shape: tuple[int, ...]) -> TensorInfo:
    """As the parts are stored where all are alike, else float32."""
    first = parts[0].info
    same = all(part.info.dtype == first.dtype for part in parts)
    info = replace(first, shape=shape, stored=first.written)
    return info if same else _computed(info)


def _floats(rows: Rows, first: int, end: int) -> Array:
    return to_float32(rows.read(first, end), rows.info.dtype)


def _as(rows: Rows, first: int, end: int, dtype: str) -> Raw:
    """As stored, or widened where others are stored otherwise."""
    return rows.read(first, end) if rows.info.dtype == dtype else _floats(rows, first, end)


def _drawn(key: int, first_row: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Standard normal numbers [rows, cols] for rows from `first_row`."""
    return normal(Counter.of(first_row * shape[1], (shape[0], shape[1])).random(key))


def _sums(values: Array) -> NDArray[np.float64]:
    """The sum of all elements and that of their squares, by halving."""
    wide = values.astype(np.float64)
    return np.array([float(row_sums(row_sums(v)[None])[0]) for v in (wide, np.square(wide))])
