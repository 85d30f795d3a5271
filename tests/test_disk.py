"""Whole reads and writes at a place, also where the system cannot leave the page cache alone."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from merge.disk import read_at, write_at


@pytest.fixture
def file(tmp_path: Path) -> int:
    return os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)


@pytest.fixture(params=["as it is", "unsupported", "invalid"])
def uncached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system as it is, and as others refuse the flag."""
    if request.param == "as it is":
        return
    refusal = {"unsupported": errno.EOPNOTSUPP, "invalid": errno.EINVAL}[request.param]
    for name in ("preadv", "pwritev"):

        def refusing(*given: Any, real: Any = getattr(os, name)) -> int:
            if len(given) > 3 and given[3]:
                raise OSError(refusal, os.strerror(refusal))
            return int(real(*given))

        monkeypatch.setattr(os, name, refusing)


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("place", [0, 1, 4096, 5000])
def test_what_was_written_is_read(file: int, place: int) -> None:
    data = os.urandom(20_000)
    parts = [memoryview(data)[:7], memoryview(data)[7:7], memoryview(data)[7:]]
    write_at(file, parts, place, uncached=True)
    out = bytearray(len(data))
    read_at(file, memoryview(out), place, uncached=True)
    assert out == data
    assert os.pread(file, 1 << 20, 0) == bytes(place) + data


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
    only_reading = os.open(tmp_path / "f", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file"):
        write_at(only_reading, [memoryview(b"a")], 0, uncached=True)
