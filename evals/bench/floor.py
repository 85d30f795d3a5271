"""The least that a merge has to do: read all inputs once, write one output; a child process.

Called as `python floor.py THREADS OUTPUT MODEL...`. Plain preadv and pwrite of 4 MiB through one
reused buffer per thread; the last model read is what is written. Nothing is synchronised to disk.
"""

import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 4 << 20  # bytes
_buffer = threading.local()


def copy_through(threads: int, output: Path, models: Sequence[Path]) -> None:
    """Reads every weight file of `models` (equal layouts) and writes those of the last one."""
    output.mkdir(parents=True)
    with ThreadPoolExecutor(threads) as pool:
        futures = []
        for file in sorted(models[0].glob("*.safetensors")):
            size = file.stat().st_size
            inputs = [os.open(model / file.name, os.O_RDONLY) for model in models]
            written = os.open(output / file.name, os.O_WRONLY | os.O_CREAT)
            os.ftruncate(written, size)
            futures += [
                pool.submit(_chunk, inputs, written, at, min(CHUNK, size - at))
                for at in range(0, size, CHUNK)
            ]
        for future in futures:
            future.result()


def _chunk(inputs: Sequence[int], output: int, at: int, size: int) -> None:
    if not hasattr(_buffer, "memory"):
        _buffer.memory = memoryview(bytearray(CHUNK))
    memory = _buffer.memory[:size]
    for descriptor in inputs:
        if os.preadv(descriptor, [memory], at) != size:
            raise OSError(f"short read at byte {at}")
    if os.pwrite(output, memory, at) != size:
        raise OSError(f"short write at byte {at}")


if __name__ == "__main__":
    copy_through(int(sys.argv[1]), Path(sys.argv[2]), [Path(model) for model in sys.argv[3:]])
