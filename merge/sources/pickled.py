"""The tensors of a PyTorch checkpoint (pytorch_model.bin, *.pt, *.pth) and where they lie.

torch.save writes a zip archive in which nothing is compressed: `data.pkl` describes the tensors and each
`data/KEY` is a storage; before torch 1.6 it wrote pickles with the storages behind them. Both are read
without torch and without running the pickle, and nothing that they say is trusted.
"""

import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from merge.errors import SourceError
from merge.numerics import STORAGE
from merge.sources import TensorInfo
from merge.sources.checked import check_dtype, check_extent, check_name, checked_count
from merge.sources.foreign import refuse_magic
from merge.sources.pickle_machine import (
    PICKLE_LIMIT,
    Called,
    Global,
    MalformedError,
    Table,
    read_pickle,
)

AXES = 64  # torch has no more
READ_LIMIT = 64 << 20  # bytes at once; an archive's list of entries takes about 80 a tensor
ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LITTLE_ENDIAN = (None, b"little")  # the entry `byteorder`, which older archives lack
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
    "complex64": "C64",
    "complex128": "C128",
}
STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.ComplexDoubleStorage": "C128",
    "torch.storage.UntypedStorage": "U8",  # its numbers count bytes
}
ITEMSIZE = {dtype: kind.itemsize for dtype, kind in STORAGE.items()} | {"C64": 8, "C128": 16}
REBUILT = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
WRAPPERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
TYPED = "torch._tensor._rebuild_from_type_v2"
TENSORS = (*REBUILT, *WRAPPERS, TYPED)  # calls that make one
PARAMETERS = ("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.Tensor")
# what trainers save beside weights; it is skipped
PLAIN = (
    *("builtins.set", "__builtin__.set", "_codecs.encode", "torch.Size", "torch.device"),
    *("argparse.Namespace", "numpy.dtype", "numpy.ndarray"),
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
)
NAMES = (*PLAIN, *PARAMETERS, *STORAGES, *(f"torch.{dtype}" for dtype in DTYPES))
KNOWN = frozenset((*TENSORS, *NAMES, "collections.OrderedDict"))


@dataclass(frozen=True)
class _Storage:
    """What a tensor is a view of: bytes [start, end) of those that are stored by the name `key`."""

    dtype: str
    key: str
    start: int
    end: int


@dataclass(frozen=True)
class _View:
    """A tensor as torch.save tells it; `start` and `stride` count elements."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        """The element behind the last."""
        reach = sum((n - 1) * apart for n, apart in zip(self.shape, self.stride, strict=True))
        return 0 if 0 in self.shape else self.start + reach + 1


@dataclass(frozen=True)
class _Extent:
    """Bytes [offset, offset + size) of a file."""

    offset: int
    size: int


Read = Callable[[int, int], bytes]  # (start, end) -> these bytes of a file


def read_checkpoint(file: Path) -> dict[str, TensorInfo]:
    """The tensors of the checkpoint `file`; raises SourceError."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SourceError(f"{file}: missing, though the index names it") from None
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        size = os.fstat(descriptor).st_size
        return parse_checkpoint(str(file), size, lambda a, b: os.pread(descriptor, b - a, a))
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


def parse_checkpoint(
    file: str, size: int, read: Read, *, places: bool = True
) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint of `size` bytes.

    places: whether to find out where in the file they lie, for which each storage is looked at; else
    all offsets are 0. Raises SourceError, and what `read` raises.
    """
    first = read(0, min(size, len(LEGACY)))
    refuse_magic(file, first)
    try:
        if first.startswith(ZIP):
            value, extents = _archive(_Stream(size, read), places)
        elif first == LEGACY:
            value, extents = _legacy(size, read, places)
        else:
            raise MalformedError("it is no file of torch.save")
        tables = _weights(value)
        tensors = {name: _info(file, name, tensor, extents) for name, tensor in tables.items()}
    except MalformedError as error:
        raise SourceError(
            f"{file}: not read as a PyTorch checkpoint: {error}; convert it to safetensors"
        ) from None
    return tensors if places else {n: replace(t, offset=0) for n, t in tensors.items()}


# -- the two formats: value of the pickle, and where the storages lie ------------------------------


def _archive(stream: "_Stream", places: bool) -> tuple[Any, dict[str, _Extent]]:
    """Of the zip format."""
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            prefix = _prefix(archive.infolist())
            order = entries.get(f"{prefix}byteorder")
            if (archive.read(order)[:10] if order else None) not in LITTLE_ENDIAN:
                raise MalformedError("it was written by a big-endian machine")
            text = archive.read(f"{prefix}data.pkl")
    except MalformedError:
        raise
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
        *(ValueError, RuntimeError, OverflowError, KeyError),
    ) as error:
        raise MalformedError(f"broken archive, {str(error)[:100]!r}") from None
    value = read_pickle(io.BytesIO(text), KNOWN, _storage)
    folder = f"{prefix}data/"
    return value, {
        name.removeprefix(folder): _extent(stream, entry, places)
        for name, entry in entries.items()
        if name.startswith(folder)
    }


def _prefix(entries: Sequence[zipfile.ZipInfo]) -> str:
    """The folder in the archive that everything is in, with its slash; no entry may be odd."""
    if len({entry.filename for entry in entries}) < len(entries):
        raise MalformedError("its archive has two entries of one name")
    pickles = [e for e in entries if re.fullmatch(r"[^/]+/data\.pkl", e.filename)]
    if len(pickles) != 1:
        raise MalformedError(f"its archive has {len(pickles)} entries data.pkl, not one")
    for entry in entries:
        if entry.compress_type or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise MalformedError(
                f"{entry.filename[:100]!r} in its archive is compressed or encrypted"
            )
    if pickles[0].file_size > PICKLE_LIMIT:
        raise MalformedError(f"its data.pkl has {pickles[0].file_size} bytes, over {PICKLE_LIMIT}")
    return pickles[0].filename.removesuffix("data.pkl")


def _extent(stream: "_Stream", entry: zipfile.ZipInfo, places: bool) -> _Extent:
    """Where the data of an entry lie: behind its own header, whose padding the archive's list does not
    tell; without `places` as if there were none."""
    offset = entry.header_offset + 30
    if places and 30 <= offset <= stream.size:
        head = stream.at(offset - 30, offset)
        if not head.startswith(ZIP):
            raise MalformedError(f"{entry.filename[:100]!r} is not where its archive says")
        name, padding = struct.unpack("<HH", head[26:])
        offset += int(name) + int(padding)
    if offset < 30 or offset + entry.file_size > stream.size:
        raise MalformedError(f"{entry.filename[:100]!r} goes beyond its end; it is cut off")
    return _Extent(offset, entry.file_size)


def _legacy(size: int, read: Read, places: bool) -> tuple[Any, dict[str, _Extent]]:
    """Of the format before torch 1.6: five pickles, then for each storage its length and its bytes."""
    stream = io.BytesIO(read(0, min(size, PICKLE_LIMIT)))
    storages: dict[str, _Storage] = {}

    def stored(told: Any) -> _Storage:
        view, whole = _legacy_storage(told)
        if storages.setdefault(view.key, whole) != whole:
            raise MalformedError(f"it tells two lengths or types of storage {view.key[:40]!r}")
        return view

    _, version, system, value, keys = (read_pickle(stream, KNOWN, stored) for _ in range(5))
    if version != 1001 or type(system) is not Table or ("little_endian", True) not in system.pairs:
        raise MalformedError("it is of an unknown version or was written by a big-endian machine")
    extents, position = {}, stream.tell()
    for key in keys if type(keys) is list else [None]:
        if type(key) is not str or key not in storages:
            raise MalformedError("its storages are not those of its tensors")
        storage = storages[key]
        count = storage.end // ITEMSIZE[storage.dtype]
        if position + 8 + storage.end > size:
            raise MalformedError("it is cut off")
        if places and read(position, position + 8) != struct.pack("<q", count):
            raise MalformedError(f"the length of storage {key[:40]!r} is not what its tensors say")
        extents[key] = _Extent(position + 8, storage.end)
        position += 8 + storage.end
    return value, extents


class _Stream(io.RawIOBase):
    """The file as `zipfile` wants it. Reads are bounded: archives lie about what is in them."""

    def __init__(self, size: int, read: Read) -> None:
        self.size = size
        self.at = read
        self._place: int = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self.size)[whence]
        if self._place < 0:
            raise ValueError("a place before the start of the file")
        return self._place

    def read(self, length: int | None = -1) -> bytes:
        left = max(0, self.size - self._place)
        wanted = left if length is None or length < 0 else min(length, left)
        if wanted > READ_LIMIT:
            raise ValueError(f"{wanted} bytes at once, over {READ_LIMIT}")
        got = self.at(self._place, self._place + wanted) if wanted else b""
        self._place += len(got)
        return got


# -- what the pickle describes ---------------------------------------------------------------------


def _storage(told: Any) -> _Storage:
    """The storage that a persistent id tells, whole."""
    try:
        kind, of, key, _, length = told
        length = checked_count(length)
    except (TypeError, ValueError):
        raise MalformedError("a tensor has no storage as torch.save tells it") from None
    if (
        kind != "storage"
        or type(of) is not Global
        or of.name not in STORAGES
        or type(key) is not str
    ):
        raise MalformedError("a tensor has no storage as torch.save tells it")
    dtype = STORAGES[of.name]
    return _Storage(dtype, key, 0, length * ITEMSIZE[dtype])


def _legacy_storage(told: Any) -> tuple[_Storage, _Storage]:
    """The storage that a persistent id tells, which may be a view of another, and that other."""
    if type(told) is not tuple or len(told) != 6:
        raise MalformedError("a tensor has no storage as torch.save tells it")
    whole = _storage(told[:5])
    if told[5] is None:
        return whole, whole
    try:
        _, start, length = told[5]
        start, length = checked_count(start), checked_count(length)
    except (TypeError, ValueError):
        raise MalformedError("a tensor is a view of no storage") from None
    size = ITEMSIZE[whole.dtype]
    return replace(whole, start=start * size, end=min(whole.end, (start + length) * size)), whole


def _weights(value: Any) -> dict[str, Called]:
    """Tensors by name: of the table that the file holds, or of the only one in it."""
    tables = {id(value): ("", value)}
    if type(value) is Table and not _has_tensors(value):
        inner = {id(table): (key, table) for key, table in value.pairs}
        tables = {i: found for i, found in inner.items() if _has_tensors(found[1])}
    if len(tables) > 1:
        found = ", ".join(_shown(key) for key, _ in list(tables.values())[:3])
        raise MalformedError(f"it holds {len(tables)} tables of tensors ({found}), not one")
    _, table = next(iter(tables.values()), ("", None))
    if type(table) is not Table or not _has_tensors(table):
        raise MalformedError("it holds no table of tensors")
    if _holds_tensors([entry for _, entry in table.pairs if not _is_tensor(entry)]):
        raise MalformedError("it holds tensors in a table below that of its tensors")
    return _named(table)


def _named(table: Table) -> dict[str, Called]:
    out: dict[str, Called] = {}
    for name, entry in table.pairs:
        if not _is_tensor(entry):
            continue
        if type(name) is not str or name in out:
            raise MalformedError(f"a tensor's name is {_shown(name)}, no text or given twice")
        out[name] = entry
    return out


def _shown(key: Any) -> str:
    """A key of a table for a message; what is no text may be of any size."""
    return repr(key[:40]) if type(key) is str else f"of type {type(key).__name__}"


def _has_tensors(value: Any) -> bool:
    return type(value) is Table and any(_is_tensor(entry) for _, entry in value.pairs)


def _is_tensor(value: Any) -> bool:
    return type(value) is Called and value.function in TENSORS


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor anywhere in it; what is shared is looked at once."""
    seen: set[int] = set()
    left = [value]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is _Storage or _is_tensor(value):
            return True
        if type(value) is Table:
            left += [part for _, part in value.pairs]
        elif type(value) is Called:
            left.append(value.arguments)
        elif type(value) in (list, tuple):
            left += value
    return False


def _info(file: str, name: str, tensor: Called, extents: Mapping[str, _Extent]) -> TensorInfo:
    """Where the tensor lies, checked against its storage, and the storage against the file."""
    check_name(file, name)
    view = _view(name, tensor)
    check_dtype(file, name, view.dtype)
    storage, size = view.storage, ITEMSIZE[view.dtype]
    extent = extents.get(storage.key)
    if extent is None or storage.end > extent.size:
        raise SourceError(f"{file}: tensor {name!r} has a storage that is not whole in the file")
    offset = extent.offset + storage.start + view.start * size
    info = TensorInfo(view.dtype, view.shape, file, offset)
    if max(info.nbytes, storage.start + view.end * size) > storage.end:
        raise SourceError(
            f"{file}: tensor {name!r} of shape {list(view.shape)} {view.dtype} goes beyond its storage"
        )
    check_extent(file, name, info)
    return replace(info, strides=_strides(file, name, view))


def _view(name: str, tensor: Called) -> _View:
    """What the call says that makes the tensor, be it a parameter or of a type of its own."""
    call = tensor
    for _ in range(3):
        match call:
            case Called(function, (Called() as inner, *_)) if function in WRAPPERS:
                call = inner
            case Called(function, (Global(of), Global(kind), tuple() as parts, *_)) if (
                function == TYPED and kind in PARAMETERS
            ):
                call = Called(of, parts)
    try:
        storage, start, *extents = call.arguments[:4]
        shape, stride = (tuple(checked_count(n) for n in counts) for counts in extents)
        typed = call.function == REBUILT[-1]
        dtype = DTYPES[call.arguments[6].name.removeprefix("torch.")] if typed else storage.dtype
        view = _View(storage, checked_count(start), shape, stride, dtype)
        told = call.function in REBUILT and type(storage) is _Storage
        if told and len(shape) == len(stride) <= AXES:
            return view
    except (TypeError, ValueError, IndexError, KeyError, AttributeError):
        pass
    raise MalformedError(f"tensor {name[:100]!r} is not told as torch.save does")


def _strides(file: str, name: str, view: _View) -> tuple[int, int] | None:
    """Elements from row to row and from column to column, or None where rows follow one another."""
    if 0 in view.shape:
        return None
    shape, stride = view.shape, view.stride
    if len(shape) < 2:  # a column, as everywhere
        shape, stride = (*shape, 1, 1)[:2], (*stride, 1, 1)[:2]
    axes = [(n, apart) for n, apart in zip(shape[:-1], stride[:-1], strict=True) if n > 1]
    column = stride[-1] if shape[-1] > 1 else 1
    row = axes[-1][1] if axes else shape[-1] if column == 1 else 1
    even = all(outer == n * inner for (_, outer), (n, inner) in pairwise(axes))
    if not even or 1 not in (row, column):
        raise SourceError(
            f"{file}: tensor {name!r} of shape {list(view.shape)} lies in the file with strides "
            f"{list(view.stride)}; rows or columns in one piece are read: save it with .contiguous()"
        )
    return None if (row, column) == (shape[-1], 1) else (row, column)
