"""What was answered and graded, a line of JSON each, by what was asked: nothing is asked twice."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from merge.agreement import canonical
from merge.errors import RequestError, WriteError


class Journal:
    """A file of rows, each with a `key`; a last line that a killed run wrote in part is dropped."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, Lock()
        self._known: dict[str, dict[str, Any]] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_bytes() if file.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            for line in whole.splitlines():  # of bytes: texts may hold other ends of lines
                row = json.loads(line)
                self._known[row["key"]] = row
            if len(whole) < len(text):
                os.truncate(file, len(whole))
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{file}: is not what mergetool judge writes ({error})") from None
        except OSError as error:
            raise RequestError(f"{file}: cannot be used ({error.strerror})") from None

    def row(
        self, asked: Mapping[str, Any], about: Mapping[str, Any], answered: Callable[[], Any]
    ) -> Any:
        """The answer to `asked`: that of the file, or a new one, which is written down at once. about: what
        the row tells besides."""
        key = hashlib.sha256(canonical(dict(asked)).encode()).hexdigest()
        if key not in self._known:
            row = {"key": key, **about, "answer": answered()}
            with self._lock:
                self._append(row)
                self._known[key] = row
        return self._known[key]["answer"]

    def _append(self, row: Mapping[str, Any]) -> None:
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise WriteError(f"{self._file}: {error.strerror}") from None
