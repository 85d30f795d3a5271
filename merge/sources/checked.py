"""Facts about a tensor that a file tells, checked before they are believed; whatever the format."""

from typing import Any

from merge.errors import SourceError
from merge.numerics import STORAGE
from merge.sources import TensorInfo
from merge.sources.foreign import LOW_PRECISION

NAME_LIMIT = 1000  # characters
LARGEST = 1 << 48  # bytes or elements; beyond any file
LARGEST_EMPTY = 1 << 24  # rows of no columns: they cost no bytes, but work


def checked_count(value: Any) -> int:
    """A whole number of elements or bytes, and nothing that merely can be read as one; else ValueError."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError
    return value


def check_name(file: str, name: str) -> None:
    if len(name) > NAME_LIMIT or not name.isprintable():
        raise SourceError(f"{file}: {name[:40]!r} cannot be the name of a tensor")


def check_dtype(file: str, name: str, dtype: Any) -> None:
    if isinstance(dtype, str) and dtype in STORAGE:
        return
    known = LOW_PRECISION.get(dtype) if isinstance(dtype, str) else None
    stored = f"{str(dtype)[:40]!r}" + (f", which is {known}" if known else "")
    raise SourceError(
        f"{file}: tensor {name!r} is stored as {stored}; plain floats and integers are read "
        f"({', '.join(STORAGE)}): dequantise the model first"
    )


def check_extent(file: str, name: str, info: TensorInfo) -> None:
    if not info.cols and info.rows > LARGEST_EMPTY:
        raise SourceError(f"{file}: tensor {name!r} of shape {list(info.shape)} holds nothing")
