"""A safetensors file whose tensors become known one after another: the header's room is kept, its text
comes last, padded with spaces as the format allows."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from merge.numerics import Raw
from merge.write import writing

ENTRY = 200  # bytes in a header, at most, for a tensor of two dimensions beside its name


class GrowingFile:
    """Writes `names`, or fewer of them, in the order of `add`; whole after `finish`."""

    def __init__(self, file: Path, names: Iterable[str]) -> None:
        self._file = file
        room = 64 + sum(len(json.dumps(name)) + ENTRY for name in names)
        self._header = -(-room // 8) * 8
        self._entries: dict[str, dict[str, object]] = {}
        self._size = 0
        with writing(file):
            self._stream = file.open("wb")
            self._stream.seek(8 + self._header)

    def add(self, name: str, dtype: str, shape: tuple[int, ...], parts: Iterable[Raw]) -> None:
        """Appends a tensor, whose bytes are those of `parts`; raises WriteError."""
        start = self._size
        for part in parts:
            with writing(self._file):
                self._size += self._stream.write(part.tobytes())
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, self._size]}

    def finish(self) -> None:
        header = {"__metadata__": {"format": "pt"}} | self._entries
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= self._header
        with writing(self._file), self._stream as stream:
            stream.seek(0)
            stream.write(self._header.to_bytes(8, "little") + text.ljust(self._header))
            stream.flush()
            os.fsync(stream.fileno())
