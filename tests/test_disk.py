"""Whole reads and writes at a place, also where the system cannot leave the page cache alone."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge.disk import UNCACHED, read_at, write_at


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)
    yield descriptor
    os.close(descriptor)


REFUSALS = {
    "as it is": None,
    "an older kernel": OSError(errno.EOPNOTSUPP, "not supported"),
    "a file system that cannot": OSError(errno.EINVAL, "invalid"),
    "a sandbox": OSError(errno.ENOSYS, "no such call"),
    "a Python without flags": NotImplementedError("preadv2"),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("place", [0, 1, 4096, 5000])
def test_what_was_written_is_read(
    file: int, place: int, refusal: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    for name in ("preadv", "pwritev"):

        def watched(*given: Any, real: Any = getattr(os, name)) -> int:
            asked.append(given[3] if len(given) > 3 else 0)
            if asked[-1] and refusal:
                raise refusal
            return int(real(*given))

        monkeypatch.setattr(os, name, watched)
    data = os.urandom(20_000)
    parts = [memoryview(data)[:7], memoryview(data)[7:7], memoryview(data)[7:]]
    write_at(file, parts, place, uncached=True)
    out = bytearray(len(data))
    read_at(file, memoryview(out), place, uncached=True)
    assert out == data
    assert os.pread(file, 1 << 20, 0) == bytes(place) + data
    once = [UNCACHED, 0] if refusal and UNCACHED else [UNCACHED]
    assert asked[: len(once)] == once
    assert asked.count(UNCACHED) >= 2  # the write and the read


def test_a_short_write_or_read_goes_on(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, b, *rest: real_write(fd, [b[0][:3]], *rest))
    monkeypatch.setattr(os, "preadv", lambda fd, b, *rest: real_read(fd, [b[0][:3]], *rest))
    write_at(file, [memoryview(b"abcde"), memoryview(b"fghijkl")], 2)
    out = bytearray(12)
    read_at(file, memoryview(out), 2)
    assert out == b"abcdefghijkl"


def test_a_file_that_ends_too_early_is_told_with_its_end(file: int) -> None:
    os.write(file, b"abc")
    with pytest.raises(EOFError, match="byte 3"):
        read_at(file, memoryview(bytearray(5)), 1, uncached=True)


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with (tmp_path / "f").open("rb") as reading, pytest.raises(OSError, match="Bad file"):
        write_at(reading.fileno(), [memoryview(b"a")], 0, uncached=True)
