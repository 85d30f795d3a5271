"""What a run has finished of an adapter, so that the next one goes on from there."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.adapters.file import GrowingFile
from merge.numerics import Raw
from merge.write import JOURNAL, MODEL, check_same, read_journal, writing

Tensor = tuple[str, tuple[int, ...], Iterable[Raw]]  # dtype, shape, its bytes in parts


@dataclass(frozen=True)
class Run:
    """What a run has around it. plan: stands for its result; inputs: stamps of its input files (see
    write.input_stamps); beside(report): further files of the output, name -> text; progress(bytes)."""

    plan: str = ""
    inputs: Mapping[str, list[int]] = field(default_factory=dict)
    beside: Callable[[Any], Mapping[str, str]] = lambda report: {}
    progress: Callable[[int], None] = lambda count: None
    restart: bool = False
    overwrite: bool = False


class Journal:
    """A growing file of tensors, and a line for every group of them that is whole. Use as a context."""

    def __init__(self, partial: Path, file: str, names: Sequence[str], run: Run) -> None:
        self._partial, self._run = partial, run
        self._weights = partial / MODEL / file
        self._names = names
        self._known: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Journal":
        lines, size = read_journal(self._partial / JOURNAL) if not self._run.restart else ([], 0)
        if lines:
            check_same(self._partial, lines[0], self._run.plan, self._run.inputs)
        with writing(self._partial):
            if not lines:
                shutil.rmtree(self._partial / MODEL, ignore_errors=True)
            (self._partial / MODEL).mkdir(exist_ok=True)
            self._stream = (self._partial / JOURNAL).open("r+b" if lines else "wb")
        self._file = GrowingFile(self._weights, self._names, self._taken_up(lines[1:]))
        with writing(self._partial):
            self._stream.truncate(size)
            self._stream.seek(0, os.SEEK_END)
        if not lines:
            self._note({"plan": self._run.plan, "inputs": self._run.inputs})
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._file.finish()
        self._stream.close()

    def known(self, name: str) -> dict[str, Any] | None:
        """The line of a group that an earlier run finished."""
        return self._known.get(name)

    def add(self, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes a group of tensors and notes it."""
        for tensor, (dtype, shape, parts) in tensors.items():
            self._file.add(tensor, dtype, shape, parts)
        self._note({"name": name, **facts, "entries": self._file.noted(list(tensors))})

    def _taken_up(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Entries of the file by the lines whose bytes are there, up to the first whose are not."""
        entries: dict[str, Any] = {}
        for line in lines:
            if not GrowingFile.holds(self._weights, self._names, line["entries"]):
                break
            self._known[line["name"]] = line
            entries |= line["entries"]
        return entries

    def _note(self, line: Mapping[str, Any]) -> None:
        with writing(self._partial):
            self._stream.write(json.dumps(line).encode() + b"\n")
            self._stream.flush()
