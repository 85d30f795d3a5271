"""A folder of safetensors files (one or sharded) as a Source, read by position into given buffers.

Headers are parsed here because the library does not tell where a tensor's bytes lie, and data is read
with `preadv` because mapped pages would count in the memory of this process.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.disk import read_at
from merge.errors import ReadError, SourceError
from merge.numerics import STORAGE
from merge.sources import Source, TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself
NAME_LIMIT = 1000  # characters
LARGEST = 1 << 48  # bytes or elements; beyond any file
LARGEST_EMPTY = 1 << 24  # rows of no columns: they cost no bytes, but work


def open_safetensors(folder: Path) -> Source:
    """The tensors of the model in `folder`; raises SourceError when it is not whole."""
    tensors = whole_model(folder, {f: read_header(folder / f) for f in weight_files(folder)})
    return Source(tensors, PositionedReader(tensors).read)


def whole_model(
    folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of all weight files (file name -> its tensors), checked against the index."""
    tensors: dict[str, TensorInfo] = {}
    owner: dict[str, str] = {}
    for file, header in headers.items():
        for name, info in header.items():
            if name in tensors:
                raise SourceError(
                    f"{folder}: tensor {name!r} is in {owner[name]} and in {file}; "
                    "a model holds each tensor once"
                )
            tensors[name], owner[name] = info, file
    _check_index(folder, owner)
    return tensors


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that make up the model, by the index where there is one."""
    index = folder / INDEX
    if index.is_file():
        return sorted(set(read_index(index).values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    others = sorted(p.name for p in folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(others) == 1:
        return others
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    found = ", ".join(others[:3] or sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    raise SourceError(
        f"{folder}: no {SINGLE} and no {INDEX} (found {found}); "
        "a model folder holds its weights as safetensors"
    )


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name of a shard index; file names may not leave the folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SourceError(f"{index}: not a shard index ({error}); it needs a weight_map") from None
    for file in files.values():
        if Path(file).name != file or file == ".." or not file.isprintable():
            raise SourceError(
                f"{index}: file {file!r} is not in this folder; only plain names are read"
            )
    if not files:
        raise SourceError(f"{index}: names no tensors")
    return files


def _check_index(folder: Path, owner: Mapping[str, str]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    for name, file in read_index(index).items():
        if owner.get(name) != file:
            where = owner.get(name, "no file")
            raise SourceError(f"{index}: says that {name!r} is in {file}, but it is in {where}")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            text = stream.read(header_length(str(file), size, stream.read(8)))
    except FileNotFoundError:
        raise SourceError(f"{file}: missing, though the index names it") from None
    except OSError as error:
        raise SourceError(f"{file}: unreadable safetensors header ({error})") from None
    return parse_header(str(file), size, text)


def header_length(file: str, size: int, first: bytes) -> int:
    """Bytes of the header's text, by the `first` eight bytes of a file of `size` bytes."""
    try:
        (length,) = struct.unpack("<Q", first)
    except struct.error as error:
        raise SourceError(f"{file}: unreadable safetensors header ({error})") from None
    if length > min(HEADER_LIMIT, size - 8):
        raise SourceError(
            f"{file}: header of {length} bytes in a file of {size}; "
            "it is cut off or no safetensors file"
        )
    return int(length)


def parse_header(file: str, size: int, text: bytes) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file of `size` bytes whose header is `text`.

    Sizes, ranges and overlaps are checked, nothing is trusted.
    """
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: unreadable safetensors header ({error})") from None
    if not isinstance(header, dict):
        raise SourceError(f"{file}: header is a {type(header).__name__}, not a table of tensors")
    header.pop("__metadata__", None)
    start = 8 + len(text)
    tensors = {name: _tensor_info(file, name, entry, start) for name, entry in header.items()}
    _check_ranges(file, tensors, start, size)
    return tensors


def _tensor_info(file: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > NAME_LIMIT or not name.isprintable():
        raise SourceError(f"{file}: {name[:40]!r} cannot be the name of a tensor")
    try:
        dtype, shape = entry["dtype"], tuple(_count(n) for n in entry["shape"])
        start, end = (_count(n) for n in entry["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise SourceError(
            f"{file}: tensor {name!r} has no dtype, shape and data_offsets of whole numbers"
        ) from None
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise SourceError(
            f"{file}: tensor {name!r} is stored as {str(dtype)[:40]!r}; plain floats and integers are read "
            f"({', '.join(STORAGE)}): dequantise the model first"
        )
    info = TensorInfo(dtype, shape, file, data_start + start)
    if not info.cols and info.rows > LARGEST_EMPTY:
        raise SourceError(f"{file}: tensor {name!r} of shape {list(shape)} holds nothing")
    if end - start != info.nbytes:
        raise SourceError(
            f"{file}: tensor {name!r} of shape {list(shape)} {dtype} has {end - start} bytes, "
            f"not {info.nbytes}"
        )
    return info


def _count(value: Any) -> int:
    """A whole number of elements or bytes; nothing that merely can be read as one."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice")
    return table


def _check_ranges(file: str, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Tensors follow one another from `start` to the end of the file, as the format demands."""
    reached, last = start, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < reached:
            raise SourceError(f"{file}: tensors {last!r} and {name!r} overlap")
        if info.offset > reached:
            raise SourceError(
                f"{file}: {info.offset - reached} bytes before tensor {name!r} belong to none"
            )
        reached, last = info.offset + info.nbytes, name
    if reached < size:
        raise SourceError(f"{file}: {size - reached} bytes at its end belong to no tensor")
    if reached > size:
        raise SourceError(
            f"{file}: {size} bytes, but tensor {last!r} ends at {reached}; the file is cut off"
        )


class PositionedReader:
    """Reads rows of tensors by position; keeps the files that it has opened open."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._descriptors: dict[str, int] = {}

    def read(self, name: str, first_row: int, end_row: int, out: memoryview) -> None:
        info = self._tensors[name]
        position = info.offset + first_row * info.row_bytes
        wanted = (end_row - first_row) * info.row_bytes
        try:
            read_at(self._descriptor(info.file), out[:wanted], position)
        except OSError as error:
            raise ReadError(f"{info.file}: cannot read tensor {name!r}: {error.strerror}") from None
        except EOFError as error:
            raise ReadError(
                f"{info.file}: ends inside tensor {name!r} ({error}); the file was cut off: fetch it again"
            ) from None

    def _descriptor(self, file: str) -> int:
        known = self._descriptors.get(file)
        if known is None:
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            known = self._descriptors.setdefault(file, opened)
            if known != opened:  # another thread was first
                os.close(opened)
        return known

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
