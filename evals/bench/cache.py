"""The page cache: filled before a run, and how much of a file it holds."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

CHUNK = 4 << 20  # bytes


def warm(files: Iterable[Path]) -> float:
    """Reads all `files` once, dirty pages written back; the fraction of them then in memory."""
    listed = list(files)
    os.sync()  # a throttled writer would otherwise pay for the run before it
    buffer = bytearray(CHUNK)
    for file in listed:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    total = sum(file.stat().st_size for file in listed)
    return sum(_resident(file) * file.stat().st_size for file in listed) / total


def _resident(file: Path) -> float:
    """Fraction of a file's pages in memory; 1.0 for an empty one."""
    size = file.stat().st_size
    if not size:
        return 1.0
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), flags
        )
        del start  # a view in use cannot be closed
    return 0.0 if failed else sum(flag & 1 for flag in bytes(flags)) / pages


def available_memory() -> int:
    """Bytes that programs and the page cache can share without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
