"""Fills a base and its fine-tunes with bfloat16 values spread like real ones; a child process.

Called as `python -m evals.bench.weights SHAPE BASE TUNE...`.

Same values at every call: each block has its own generator, seeded by model, tensor and place.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .models import BYTES, SHAPES, Place, places

BASE_SPREAD, DELTA_SPREAD = 0.02, 0.002  # standard deviations; a fine-tune's change is a tenth
BLOCK = 1 << 20  # values; 4 MiB as float32
SEED = 20


def fill(shape_name: str, folders: Sequence[Path]) -> None:
    """Writes all weights of the checkpoints in `folders`, the base first; 30 MB per thread."""
    found = list(places(SHAPES[shape_name]))
    with ExitStack() as stack, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        opened = [
            {file: _opened(folder / file, stack) for file in {place.file for place in found}}
            for folder in folders
        ]
        futures = [
            pool.submit(_fill_block, place, number, first, [files[place.file] for files in opened])
            for number, place in enumerate(found)
            for first in range(0, place.values, BLOCK)
        ]
        for future in futures:
            future.result()


def _opened(file: Path, stack: ExitStack) -> int:
    return stack.enter_context(file.open("r+b", buffering=0)).fileno()


def _fill_block(place: Place, number: int, first: int, descriptors: Sequence[int]) -> None:
    """Values `first` and on of one tensor, in all models."""
    count = min(BLOCK, place.values - first)
    at = place.offset + first * BYTES
    mean = 1.0 if "norm" in place.name else 0.0
    base = _normal((SEED, 0, number, first), count, BASE_SPREAD) + np.float32(mean)
    stored = to_bfloat16(base)
    os.pwrite(descriptors[0], stored.data, at)
    base = to_float32(stored)
    for model, descriptor in enumerate(descriptors[1:], start=1):
        delta = _normal((SEED, model, number, first), count, DELTA_SPREAD)
        os.pwrite(descriptor, to_bfloat16(base + delta).data, at)


def _normal(seed: tuple[int, ...], count: int, spread: float) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
    return generator.standard_normal(count, dtype=np.float32) * np.float32(spread)


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of finite `x` rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    fill(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
