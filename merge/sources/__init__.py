"""Where tensors come from. A source knows what tensors there are and reads any rows of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from merge.numerics import STORAGE, rows_and_cols


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: safetensors dtype name, shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def rows(self) -> int:
        return rows_and_cols(self.shape)[0]

    @property
    def cols(self) -> int:
        return rows_and_cols(self.shape)[1]

    @property
    def row_bytes(self) -> int:
        return self.cols * STORAGE[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Source:
    """`tensors`: name -> TensorInfo. `read(name, first_row, end_row, out)` fills `out`, a writable
    buffer of exactly those rows' bytes, with the tensor as stored; raises ReadError."""

    tensors: Mapping[str, TensorInfo]
    read: Callable[[str, int, int, memoryview], None]
