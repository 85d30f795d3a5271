"""The written model against its provenance: is every byte where it should be?"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from merge.disk import AT_ONCE, digest_of, read_at
from merge.errors import RequestError, SourceError, VerifyError
from merge.numerics import (
    STORAGE,
    combined_digest,
    first_nonfinite,
    grain_digest,
    grain_rows,
    rows_and_cols,
)
from merge.sources import TensorInfo
from merge.sources.model import ADAPTER, ADAPTER_WEIGHTS, holds_adapter, read_json
from merge.sources.safetensors import INDEX, read_header
from merge.sources.weights import open_safetensors, weight_files

PROVENANCE = "mergetool.json"


class Place(NamedTuple):
    """A tensor in an open file; `offset` in bytes."""

    descriptor: int
    offset: int
    shape: tuple[int, ...]
    dtype: str


def verify_folder(
    folder: Path,
    *,
    threads: int | None = None,
    read_back: Mapping[str, int] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """What was verified, as a table; raises VerifyError at the first thing that is wrong, RequestError
    where `folder` is none.

    read_back: tensors whose bytes were compared with their digests before, and the offsets at which
    they were found; of these only the header is compared.
    """
    if holds_adapter(folder):
        return verify_adapter(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise RequestError(f"{folder}: {found}; give the folder of a model")
    try:
        source = open_safetensors(folder)
        read_json(folder / "config.json")
        provenance = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else None
    except SourceError as error:
        raise VerifyError(str(error)) from None
    _check_strays(folder)
    expected: dict[str, Any] = {}
    if provenance is not None:
        try:
            expected = provenance["outputs"]
            _check_tables(folder, source.tensors, expected)
            _check_files(folder, provenance["files"])
        except (AttributeError, KeyError, TypeError):
            raise VerifyError(
                f"{folder / PROVENANCE}: damaged; it lists outputs and files"
            ) from None

    def check(item: tuple[str, TensorInfo]) -> None:
        name, info = item
        if (read_back or {}).get(name) != info.offset:
            _check_tensor(
                folder, name, info, expected.get(name, {}).get("digest"), provenance is not None
            )
        progress(info.nbytes)

    _each(check, source.tensors.items(), threads)
    return {
        "folder": str(folder),
        "tensors": len(source.tensors),
        "bytes": sum(info.nbytes for info in source.tensors.values()),
        "digests": "all equal"
        if provenance is not None
        else f"no {PROVENANCE}: headers and finite values checked only",
    }


def _each(
    check: Callable[[tuple[str, TensorInfo]], None],
    items: Iterable[tuple[str, TensorInfo]],
    threads: int | None,
) -> None:
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(check, items))


def _check_strays(folder: Path) -> None:
    known = set(weight_files(folder))
    strays = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in known)
    if strays:
        raise VerifyError(
            f"{folder}: {strays[0]} is not in {INDEX}; a loader may take it for a part of the model"
        )


def _check_tables(folder: Path, found: Any, expected: dict[str, Any]) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        where = "is missing" if name in expected else f"is not in {PROVENANCE}"
        raise VerifyError(f"{folder}: tensor {name!r} {where}")
    for name, info in found.items():
        want = expected[name]
        if [info.dtype, list(info.shape)] != [want["dtype"], want["shape"]]:
            raise VerifyError(
                f"{folder}: tensor {name!r} is {info.dtype} {list(info.shape)}, "
                f"not {want['dtype']} {want['shape']} as {PROVENANCE} says"
            )


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    """What lies around the tensors: headers, index, config, tokenizer; byte for byte."""
    weights = set(weight_files(folder))
    found = weights | ({INDEX} if (folder / INDEX).is_file() else set())
    for file in sorted((digests.keys() ^ found) - {f for f in digests if _is_carried(f)}):
        raise VerifyError(f"{folder}: {file} is in the folder or in {PROVENANCE}, but not in both")
    for file, digest in digests.items():
        try:
            with (folder / file).open("rb") as stream:
                start = stream.read(8 if file in weights else -1)
                if file in weights:
                    start += stream.read(int.from_bytes(start, "little"))
        except OSError as error:
            raise VerifyError(f"{folder / file}: cannot be read: {error.strerror}") from None
        if combined_digest([start]) != digest:
            part = "its header" if file in weights else "it"
            raise VerifyError(f"{folder / file}: {part} changed since it was written")


def _is_carried(file: str) -> bool:
    return file != INDEX and not file.endswith(".safetensors")


def _check_tensor(
    folder: Path, name: str, info: TensorInfo, digest: str | None, known: bool
) -> None:
    try:
        descriptor = os.open(info.file, os.O_RDONLY)
        try:
            place = Place(descriptor, info.offset, info.shape, info.dtype)
            if known:
                _check_digest(folder, name, stored_digest(place), digest)
            else:
                _check_finite(folder, name, place)
        finally:
            os.close(descriptor)
    except (OSError, EOFError) as error:
        raise VerifyError(f"{folder}: tensor {name!r} cannot be read: {error}") from None


def _check_digest(folder: Path, name: str, found: str | None, digest: str | None) -> None:
    if found != digest:
        raise VerifyError(
            f"{folder}: tensor {name!r} has digest {found}, not {digest}: its bytes "
            f"changed since it was written"
        )


def _check_finite(folder: Path, name: str, place: Place) -> None:
    _, cols = rows_and_cols(place.shape)
    for first, rows in _grains(place):
        at = first_nonfinite(rows, place.dtype)
        if at is not None:
            raise VerifyError(
                f"{folder}: tensor {name!r} holds NaN or infinity in element {first * cols + at}"
            )


def verify_adapter(folder: Path) -> dict[str, Any]:
    """As verify_folder, of an adapter in PEFT's format, or of several in folders of one."""
    told = (folder / PROVENANCE).is_file()
    try:
        mixed = read_json(folder / ADAPTER).get("peft_type") == "XLORA"
        files: Any = read_json(folder / PROVENANCE).get("files") if told else {}
    except SourceError as error:
        raise VerifyError(str(error)) from None
    if told and not (isinstance(files, dict) and {ADAPTER_WEIGHTS, ADAPTER} <= files.keys()):
        raise VerifyError(f"{folder / PROVENANCE}: damaged; it lists the files of an adapter")
    tensors = _headers(folder, [f"*/*/{ADAPTER_WEIGHTS}"] if mixed else [])
    for file, digest in files.items():
        outside = Path(file).is_absolute() or ".." in Path(file).parts
        if outside or file_digest(folder / file) != digest:
            raise VerifyError(f"{folder / file}: its bytes changed since it was written")
    known = "all equal" if told else f"no {PROVENANCE}: headers checked only"
    size = sum(info.nbytes for info in tensors)
    return {"folder": str(folder), "tensors": len(tensors), "bytes": size, "digests": known}


def _headers(folder: Path, within: Sequence[str]) -> list[TensorInfo]:
    """The tensors of an adapter, and of the files in its folder that fit; raises VerifyError."""
    others = sorted(file for pattern in within for file in folder.glob(pattern))
    try:
        found = [read_header(file) for file in (folder / ADAPTER_WEIGHTS, *others)]
    except SourceError as error:
        raise VerifyError(str(error)) from None
    return [info for tensors in found for info in tensors.values()]


def file_digest(file: Path) -> str:
    """XXH3-128 of a whole file; raises VerifyError."""
    try:
        return digest_of(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is no name of a file"
        raise VerifyError(f"{file}: cannot be read: {reason}") from None


def check_stored(
    folder: Path, name: str, place: Place, first_row: int, digests: Sequence[bytes]
) -> None:
    """Raises VerifyError unless the stored grains from `first_row` on have these digests."""
    count = len(digests) * grain_rows(place.shape)
    try:
        for expected, (first, rows) in zip(
            digests, _grains(place, first_row, first_row + count), strict=True
        ):
            if grain_digest(rows) != expected:
                raise VerifyError(
                    f"{folder}: tensor {name!r} is not stored as it was merged, from row {first} on; "
                    f"check the disk and run the same command again"
                )
    except (OSError, EOFError) as error:
        raise VerifyError(f"{folder}: tensor {name!r} cannot be read back: {error}") from None


def stored_digest(place: Place) -> str | None:
    """Digest of a tensor as it lies in a file; None where the file ends before it does."""
    try:
        return combined_digest(grain_digest(rows) for _, rows in _grains(place))
    except EOFError:
        return None


def _grains(
    place: Place, first_row: int = 0, end_row: int | None = None
) -> Iterable[tuple[int, Any]]:
    """(first row, rows) of every grain of a stored tensor, in memory that is reused.

    About AT_ONCE bytes are read at once, from the disk where the system has not kept them.
    """
    descriptor, offset, shape, dtype = place
    rows, cols = rows_and_cols(shape)
    end_row = rows if end_row is None else min(end_row, rows)
    grain = grain_rows(shape)
    row_bytes = cols * STORAGE[dtype].itemsize
    block = grain * max(1, AT_ONCE // max(1, grain * row_bytes))
    memory = np.empty(min(block, max(1, end_row - first_row)) * row_bytes, np.uint8)
    for start in range(first_row, end_row, block):
        count = min(block, end_row - start)
        part = memory[: count * row_bytes]
        read_at(descriptor, part.data, offset + start * row_bytes, uncached=True)
        held = part.view(STORAGE[dtype]).reshape(count, cols)
        for first in range(0, count, grain):
            yield start + first, held[first : first + grain]


def provenance_of(folder: Path) -> dict[str, Any] | None:
    """The provenance file of a finished merge, or None where `folder` is none."""
    try:
        data = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and "plan" in data else None
