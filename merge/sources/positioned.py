"""Rows of stored tensors, read by position into given buffers, or mapped.

What is read once is read by `preadv`: mapped pages would count in the memory of this process. A mapping
pays where the same files are read again and again.
"""

import os
from collections.abc import Callable, Mapping

import numpy as np

from merge.disk import read_at
from merge.errors import ReadError
from merge.numerics import STORAGE, Raw
from merge.sources import Source, TensorInfo


def stored_source(tensors: Mapping[str, TensorInfo]) -> Source:
    """The tensors at the places that they name."""
    reader = PositionedReader(tensors)
    return Source(tensors, reader.read, reader.scratch, mapped=reader.mapped)


class PositionedReader:
    """Reads rows of tensors by position; keeps the files that it has opened open."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._descriptors: dict[str, int] = {}
        self._mappings: dict[str, Raw] = {}

    def read(self, name: str, first_row: int, end_row: int, out: memoryview) -> None:
        info = self._tensors[name]
        wanted = out[: (end_row - first_row) * info.row_bytes]
        try:
            if info.strides is None:
                position = info.offset + first_row * info.row_bytes
                read_at(self._descriptor(info.file), wanted, position)
            elif info.strides[1] == 1:
                self._read_each_row(info, info.strides[0], first_row, wanted)
            else:
                self._read_each_column(info, info.strides[1], first_row, wanted)
        except OSError as error:
            raise ReadError(f"{info.file}: cannot read tensor {name!r}: {error.strerror}") from None
        except EOFError as error:
            raise _cut_off(info, name, error) from None

    def mapped(self, name: str, first_row: int, end_row: int) -> Raw | None:
        """The rows as they lie in the file, read-only; None where they are apart or not aligned.

        Raises ReadError. A file that is cut off while its rows are in use ends the process.
        """
        info = self._tensors[name]
        if info.strides is not None or info.offset % info.itemsize:
            return None
        first, end = (info.offset + row * info.row_bytes for row in (first_row, end_row))
        try:
            whole = self._mapping(info.file)
            size = os.fstat(self._descriptor(info.file)).st_size
        except OSError as error:
            raise ReadError(f"{info.file}: cannot read tensor {name!r}: {error.strerror}") from None
        if size < max(end, len(whole)):
            raise _cut_off(info, name, f"byte {size}")
        return whole[first:end].view(STORAGE[info.dtype]).reshape(end_row - first_row, info.cols)

    def scratch(self, name: str, rows: int) -> int:
        """Bytes that reading so many rows takes beside the buffer that they go to."""
        info = self._tensors[name]
        by_columns = info.strides is not None and info.strides[1] != 1
        return rows * info.row_bytes if by_columns else 0

    def _read_each_row(self, info: TensorInfo, apart: int, first_row: int, out: memoryview) -> None:
        """Rows that lie `apart` elements from one another, each in one piece."""
        size = info.row_bytes
        for row in range(len(out) // size):
            position = info.offset + (first_row + row) * apart * info.itemsize
            read_at(self._descriptor(info.file), out[row * size : (row + 1) * size], position)

    def _read_each_column(
        self, info: TensorInfo, apart: int, first_row: int, out: memoryview
    ) -> None:
        """Rows of a transposed tensor: of each stored row (a column here) the wanted elements."""
        rows = len(out) // info.row_bytes
        columns = np.empty((info.cols, rows), STORAGE[info.dtype])
        for column, values in enumerate(columns):
            position = info.offset + (first_row + column * apart) * info.itemsize
            read_at(self._descriptor(info.file), memoryview(values).cast("B"), position)
        np.frombuffer(out, columns.dtype).reshape(rows, info.cols)[:] = columns.T

    def _mapping(self, file: str) -> Raw:
        """The bytes of a file."""
        known = self._mappings.get(file)
        if known is None:
            made: Raw = np.asarray(np.memmap(file, np.uint8, "r"))
            known = self._mappings.setdefault(file, made)
        return known

    def _descriptor(self, file: str) -> int:
        known = self._descriptors.get(file)
        if known is None:
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            known = self._descriptors.setdefault(file, opened)
            if known != opened:  # another thread was first
                os.close(opened)
        return known

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for descriptor in self._descriptors.values():
            close(descriptor)  # when the interpreter ends, `os` may be gone before this is


def _cut_off(info: TensorInfo, name: str, where: object) -> ReadError:
    what = "the file was cut off: fetch it again"
    return ReadError(f"{info.file}: ends inside tensor {name!r} ({where}); {what}")
