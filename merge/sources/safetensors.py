"""The tensors of a safetensors file and where they lie, from its header, of which nothing is trusted.

Headers are parsed here because the library does not tell where a tensor's bytes lie.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.errors import SourceError
from merge.sources import TensorInfo
from merge.sources.checked import check_dtype, check_extent, check_name, checked_count
from merge.sources.foreign import refuse_magic

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself


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
    refuse_magic(file, first)
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
    check_name(file, name)
    try:
        dtype, shape = entry["dtype"], tuple(checked_count(n) for n in entry["shape"])
        start, end = (checked_count(n) for n in entry["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise SourceError(
            f"{file}: tensor {name!r} has no dtype, shape and data_offsets of whole numbers"
        ) from None
    check_dtype(file, name, dtype)
    info = TensorInfo(dtype, shape, file, data_start + start)
    check_extent(file, name, info)
    if end - start != info.nbytes:
        raise SourceError(
            f"{file}: tensor {name!r} of shape {list(shape)} {dtype} has {end - start} bytes, "
            f"not {info.nbytes}"
        )
    return info


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
