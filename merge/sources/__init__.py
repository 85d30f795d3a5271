"""Where tensors come from. A source knows what tensors there are and reads any rows of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from merge.numerics import STORAGE, Array, Raw, rows_and_cols, to_float32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: safetensors dtype name, shape, and where its bytes lie.

    `strides`: elements from row to row and from column to column where rows do not follow one another;
    one of the two is 1.
    Of a tensor that is computed as it is read, `file` is empty and `stored` is the dtype of the tensor
    that it stands for, in which a merge writes it unless the recipe says otherwise.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    stored: str = ""
    strides: tuple[int, int] | None = None

    @property
    def written(self) -> str:
        """The dtype in which a merge writes the tensor where the recipe names none."""
        return self.stored or self.dtype

    @property
    def rows(self) -> int:
        return rows_and_cols(self.shape)[0]

    @property
    def cols(self) -> int:
        return rows_and_cols(self.shape)[1]

    @property
    def itemsize(self) -> int:
        return STORAGE[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        return self.cols * self.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Source:
    """`tensors`: name -> TensorInfo. `read(name, first_row, end_row, out)` fills `out`, a writable
    buffer of exactly those rows' bytes, with the tensor as stored; raises ReadError. Rows that are
    read start and end at grains (see numerics.grain_rows). `scratch(name, rows)`: bytes that reading
    so many rows at once takes beside `out`; `held`: bytes that the source keeps in memory for all threads.
    `mapped(name, first_row, end_row)`: the same rows where the system maps them into memory, [rows, cols];
    None where they do not lie in a file like that."""

    tensors: Mapping[str, TensorInfo]
    read: Callable[[str, int, int, memoryview], None]
    scratch: Callable[[str, int], int] = lambda name, rows: 0
    held: int = 0
    mapped: Callable[[str, int, int], Raw | None] = lambda name, first, end: None

    def rows(self, name: str, first_row: int, end_row: int) -> Array:
        """Rows [end_row - first_row, cols] of a tensor, widened to float32; raises ReadError."""
        info = self.tensors[name]
        raw = np.empty((end_row - first_row, info.cols), STORAGE[info.dtype])
        self.read(name, first_row, end_row, raw.reshape(-1).view(np.uint8).data)
        return to_float32(raw, info.dtype)
