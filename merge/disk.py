"""Reads and writes at a place in a file, whole or not at all.

What a merge writes it does not need in memory again. Linux 6.14 and later can be told so (`uncached`): data
still goes through the page cache, so nothing need be aligned, but its pages are written back at once and
used again for what comes next. A merge then neither pushes its inputs out of memory nor waits for the
system to find new pages, which took longer than the disk did. Other systems do as they always do.
"""

import errno
import os
import sys

UNCACHED = (
    0x80 if sys.platform == "linux" else 0
)  # RWF_DONTCACHE in linux/fs.h; os has no name for it
REFUSED = (errno.EOPNOTSUPP, errno.EINVAL)  # an older kernel, or a file system that cannot


def read_at(descriptor: int, out: memoryview, position: int, *, uncached: bool = False) -> None:
    """Fills `out` (bytes); raises OSError, or EOFError that names the byte where the file ends before."""
    done = 0
    while done < len(out):
        got = _read(descriptor, out[done:], position + done, UNCACHED if uncached else 0)
        if got == 0:
            raise EOFError(f"byte {position + done}")
        done += got


def write_at(
    descriptor: int, buffers: list[memoryview], position: int, *, uncached: bool = False
) -> None:
    """Writes all of `buffers` (bytes) one after another; raises OSError."""
    left = [buffer for buffer in buffers if buffer.nbytes]
    while left:
        done = _write(descriptor, left, position, UNCACHED if uncached else 0)
        position += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if left:
            left[0] = left[0][done:]


def _read(descriptor: int, out: memoryview, position: int, flags: int) -> int:
    try:
        return os.preadv(descriptor, [out], position, flags)
    except OSError as error:
        if not flags or error.errno not in REFUSED:
            raise
        return os.preadv(descriptor, [out], position)


def _write(descriptor: int, buffers: list[memoryview], position: int, flags: int) -> int:
    try:
        return os.pwritev(descriptor, buffers, position, flags)
    except OSError as error:
        if not flags or error.errno not in REFUSED:
            raise
        return os.pwritev(descriptor, buffers, position)
