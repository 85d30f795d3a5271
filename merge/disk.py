"""Reads and writes at a place in a file, whole or not at all.

What a merge writes it does not need in memory again, nor what is read only to be compared. Linux can be
told so (`uncached`): data still goes through the page cache, so nothing need be aligned, but its pages
are written back at once and used again for what comes next. A merge then neither pushes its inputs out
of memory nor waits for the system to find new pages, which took longer than the disk did. Where the
system does not know that, it does as it always does.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

AT_ONCE = 4 << 20  # bytes of one read: with 512 KiB a disk gave half as much

# RWF_DONTCACHE of linux/fs.h, for which `os` has no name
UNCACHED = 0x80 if sys.platform == "linux" else 0
# by an older kernel, a file system that cannot, a sandbox
REFUSED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def read_at(descriptor: int, out: memoryview, position: int, *, uncached: bool = False) -> None:
    """Fills `out` (bytes); raises OSError, or EOFError that names the byte where the file ends before."""
    done = 0
    while done < len(out):
        got = _moved(os.preadv, descriptor, [out[done:]], position + done, uncached)
        if got == 0:
            raise EOFError(f"byte {position + done}")
        done += got


def digest_of(file: Path, start: int = 0, end: int | None = None) -> str:
    """XXH3-128 of bytes [start, end) of a file, or of as many as it has; raises OSError."""
    found = xxhash.xxh3_128()
    left = sys.maxsize if end is None else end - start
    with file.open("rb") as stream:
        stream.seek(start)
        while part := stream.read(min(AT_ONCE, left)):
            found.update(part)
            left -= len(part)
    return found.hexdigest()


def write_at(
    descriptor: int, buffers: Sequence[memoryview], position: int, *, uncached: bool = False
) -> None:
    """Writes all of `buffers` (bytes) one after another; raises OSError."""
    left = [buffer for buffer in buffers if buffer.nbytes]
    while left:
        done = _moved(os.pwritev, descriptor, left, position, uncached)
        position += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if left:
            left[0] = left[0][done:]


def _moved(
    call: Callable[..., int],
    descriptor: int,
    buffers: Sequence[memoryview],
    position: int,
    uncached: bool,
) -> int:
    """Bytes that one call of the system read or wrote."""
    if uncached and UNCACHED:
        try:
            return call(descriptor, buffers, position, UNCACHED)
        except NotImplementedError:  # Python was built for a library without flags
            pass
        except OSError as error:
            if error.errno not in REFUSED:
                raise
    return call(descriptor, buffers, position)
