"""What was answered and graded, a line of JSON each, by what was asked: nothing is asked twice."""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from merge.agreement import canonical
from merge.errors import OutputError, RequestError, WriteError
from merge.printing import printable

LOCK = "lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder of journals and holds its lock; raises OutputError where another run has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be used ({error.strerror})") from None
    try:
        _take(lock, folder)
        yield
    finally:
        os.close(lock)


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = printable(os.read(lock, 100).decode("utf-8", "replace")) or "another run"
        what = f"{holder} judges there; wait for it or choose another --output"
        raise OutputError(f"{folder}: {what}") from None
    with suppress(OSError):  # of a full disk, which the journals tell
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())


class Journal:
    """A file of rows, each with a `key`; a last line that a killed run wrote in part is dropped."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, Lock()
        self._known: dict[str, dict[str, Any]] = {}
        self._turns: dict[str, Lock] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_bytes() if file.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            for line in whole.splitlines():  # of bytes: texts may hold other ends of lines
                row = json.loads(line)
                self._known[row["key"]] = row
            if len(whole) < len(text):
                os.truncate(file, len(whole))
            self._size = len(whole)
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{file}: is not what mergetool judge writes ({error})") from None
        except OSError as error:
            raise RequestError(f"{file}: cannot be used ({error.strerror})") from None

    def row(
        self, asked: Mapping[str, Any], about: Mapping[str, Any], answered: Callable[[], Any]
    ) -> Any:
        """The answer to `asked`: that of the file, or a new one, which is written down at once; threads that
        ask the same wait for the one answer. about: what the row tells besides."""
        # replies may hold half a character
        told = canonical(dict(asked)).encode("utf-8", "surrogatepass")
        key = hashlib.sha256(told).hexdigest()
        with self._turn(key):
            if key not in self._known:
                row = {"key": key, **about, "answer": answered()}
                with self._lock:
                    self._append(row)
                self._known[key] = row
        return self._known[key]["answer"]

    def _turn(self, key: str) -> Lock:
        """Held by the thread that asks."""
        with self._lock:
            return self._turns.setdefault(key, Lock())

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        try:
            with self._file.open("ab") as file:
                file.write(line)
        except OSError as error:
            with suppress(OSError):  # of a full disk: what comes next must not stand in half a row
                os.truncate(self._file, self._size)
            raise WriteError(f"{self._file}: {error.strerror}") from None
        self._size += len(line)
