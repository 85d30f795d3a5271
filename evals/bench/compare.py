"""How far two written models are apart, in units of bfloat16; a child process that prints JSON.

Called as `python -m evals.bench.compare FOLDER FOLDER`.
"""

import json
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .weights import to_float32

BLOCK = 1 << 20  # values


@dataclass(frozen=True)
class Stored:
    """One bfloat16 tensor: an open file, the byte offset of its data, and its shape."""

    descriptor: int
    offset: int
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def read(self, first: int, count: int) -> NDArray[np.uint16]:
        return np.frombuffer(
            os.pread(self.descriptor, 2 * count, self.offset + 2 * first), np.uint16
        )


def compared(a: Path, b: Path) -> dict[str, float | int | bool]:
    """same_tensors; share of values with equal bits; the largest difference, plain and in ulp."""
    left, right = stored(a), stored(b)
    shapes = [{name: s.shape for name, s in side.items()} for side in (left, right)]
    if shapes[0] != shapes[1]:
        return {"same_tensors": False}
    equal, total, largest, ulps = 0, 0, 0.0, 0.0
    for name, one in left.items():
        for first in range(0, one.values, BLOCK):
            count = min(BLOCK, one.values - first)
            x, y = (side.read(first, count) for side in (one, right[name]))
            equal += int(np.count_nonzero(x == y))
            gap, in_ulps = difference(to_float32(x), to_float32(y))
            largest, ulps, total = max(largest, gap), max(ulps, in_ulps), total + count
    return {"same_tensors": True, "equal": equal / total, "largest": largest, "ulp": ulps}


def difference(x: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[float, float]:
    """Largest |x - y|, and largest |x - y| in ulp of bfloat16.

    The ulp is that of the larger of both values but at least that of the block's root mean square:
    a value near zero is a difference of values of that size, and carries their rounding.
    """
    gap = np.abs(x - y)
    typical = np.sqrt(np.mean(np.square(x), dtype=np.float64), dtype=np.float64)
    size = np.maximum(np.maximum(np.abs(x), np.abs(y)), np.float32(max(typical, 1e-30)))
    ulp = np.ldexp(np.float32(1), np.frexp(size)[1] - 8)  # 8 significant bits
    return float(gap.max(initial=0.0)), float((gap / ulp).max(initial=0.0))


def stored(folder: Path) -> Mapping[str, Stored]:
    """Every tensor in the weight files of `folder`; ValueError where one is not bfloat16."""
    found: dict[str, Stored] = {}
    for file in sorted(folder.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
        header = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file}: tensor {name!r} is {entry['dtype']}, not BF16")
            start = 8 + length + entry["data_offsets"][0]
            found[name] = Stored(descriptor, start, tuple(entry["shape"]))
    return found


if __name__ == "__main__":
    print(json.dumps(compared(Path(sys.argv[1]), Path(sys.argv[2]))))
