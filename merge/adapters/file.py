"""A safetensors file whose tensors become known one after another: the header's room is kept, its text
comes last, padded with spaces as the format allows. What a journal tells of is taken up again."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge.disk import digest_of
from merge.numerics import Raw
from merge.write import writing

ENTRY = 200  # bytes in a header, at most, for a tensor of two dimensions beside its name


class GrowingFile:
    """Writes `names`, or fewer of them, in the order of `add`; whole after `finish`.

    `entries`: those that the file holds already, in their order; what follows them is written anew.
    """

    def __init__(self, file: Path, names: Sequence[str], entries: Mapping[str, Any]) -> None:
        self._file, self._start = file, _start(names)
        self._entries: dict[str, Any] = dict(entries)
        self._size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        with writing(file):
            self._stream = file.open("r+b" if entries else "wb")
            self._stream.truncate(self._start + self._size)
            self._stream.seek(0, os.SEEK_END)

    @staticmethod
    def holds(file: Path, names: Sequence[str], entries: Mapping[str, Any]) -> bool:
        """Whether the bytes that a journal's entries tell of are in `file`."""
        return file.is_file() and all(
            _digest(file, _start(names), entry) == entry["digest"] for entry in entries.values()
        )

    def add(self, name: str, dtype: str, shape: tuple[int, ...], parts: Iterable[Raw]) -> None:
        """Appends a tensor, whose bytes are those of `parts`; raises WriteError."""
        start = self._size
        for part in parts:
            with writing(self._file):
                self._size += self._stream.write(part.tobytes())
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, self._size]}

    def noted(self, names: Sequence[str]) -> dict[str, Any]:
        """The entries of tensors that were added, for a journal: their bytes have left this process."""
        with writing(self._file):
            self._stream.flush()
        for name in names:
            self._entries[name]["digest"] = _digest(self._file, self._start, self._entries[name])
        return {name: self._entries[name] for name in names}

    def finish(self) -> None:
        kept = ("dtype", "shape", "data_offsets")
        entries = {name: {key: e[key] for key in kept} for name, e in self._entries.items()}
        text = json.dumps(
            {"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")
        ).encode()
        room = self._start - 8
        assert len(text) <= room
        with writing(self._file), self._stream as stream:
            stream.seek(0)
            stream.write(room.to_bytes(8, "little") + text.ljust(room))
            stream.flush()
            os.fsync(stream.fileno())


def _start(names: Sequence[str]) -> int:
    """Where the bytes of the first tensor lie: after the header's length and its room."""
    return 8 + -(-(64 + sum(len(json.dumps(name)) + ENTRY for name in names)) // 8) * 8


def _digest(file: Path, start: int, entry: Mapping[str, Any]) -> str:
    first, end = entry["data_offsets"]
    with writing(file):
        return digest_of(file, start + first, start + end)
