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

from merge.errors import ReadError, SourceError
from merge.numerics import STORAGE
from merge.sources import Source, TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself


def open_safetensors(folder: Path) -> Source:
    """The tensors of the model in `folder`; raises SourceError when it is not whole."""
    tensors: dict[str, TensorInfo] = {}
    owner: dict[str, str] = {}
    for file in weight_files(folder):
        for name, info in read_header(folder / file).items():
            if name in tensors:
                raise SourceError(
                    f"{folder}: tensor {name!r} is in {owner[name]} and in {file}; "
                    "a model holds each tensor once"
                )
            tensors[name], owner[name] = info, file
    _check_index(folder, owner)
    return Source(tensors, PositionedReader(tensors).read)


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
    found = ", ".join(others[:3]) or ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    raise SourceError(
        f"{folder}: no {SINGLE} and no {INDEX} (found {found}); "
        "a model folder holds its weights as safetensors"
    )


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name of a shard index; file names may not leave the folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"{index}: not a shard index ({error}); it needs a weight_map") from None
    for file in files.values():
        if Path(file).name != file:
            raise SourceError(f"{index}: file {file!r} is not in this folder; only plain names are read")
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
    """The tensors of one safetensors file; sizes, ranges and overlaps are checked, nothing is trusted."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(HEADER_LIMIT, size - 8):
                raise SourceError(f"{file}: header of {length} bytes in a file of {size}; it is cut off or no safetensors file")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise SourceError(f"{file}: missing, though the index names it") from None
    except (OSError, struct.error, ValueError) as error:
        raise SourceError(f"{file}: unreadable safetensors header ({error})") from None
    if not isinstance(header, dict):
        raise SourceError(f"{file}: header is a {type(header).__name__}, not a table of tensors")
    header.pop("__metadata__", None)
    tensors = {str(name): _tensor_info(file, str(name), entry, 8 + length) for name, entry in header.items()}
    _check_ranges(file, tensors, size)
    return tensors


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, end = (int(n) for n in entry["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise SourceError(f"{file}: tensor {name!r} has no dtype, shape and data_offsets") from None
    if dtype not in STORAGE:
        raise SourceError(
            f"{file}: tensor {name!r} is stored as {dtype}; plain floats and integers are read "
            f"({', '.join(STORAGE)}): dequantise the model first"
        )
    info = TensorInfo(dtype, shape, str(file), data_start + start)
    if start < 0 or min(shape, default=0) < 0 or end - start != info.nbytes:
        raise SourceError(
            f"{file}: tensor {name!r} of shape {list(shape)} {dtype} has {end - start} bytes, "
            f"not {info.nbytes}"
        )
    return info


def _check_ranges(file: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    reached, last = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < reached:
            raise SourceError(f"{file}: tensors {last!r} and {name!r} overlap")
        reached, last = info.offset + info.nbytes, name
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
        done = 0
        while done < wanted:
            try:
                got = os.preadv(self._descriptor(info.file), [out[done:wanted]], position + done)
            except OSError as error:
                raise ReadError(f"{info.file}: cannot read tensor {name!r}: {error.strerror}") from None
            if got == 0:
                raise ReadError(
                    f"{info.file}: ends inside tensor {name!r} (byte {position + done}); "
                    "the file was cut off: fetch it again"
                )
            done += got

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
