"""A mixture of adapters as it lies in its folder, and the parts of its tensors that are kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merge.errors import ReadError
from merge.experts.altered import Rows, Stretch
from merge.experts.assembly import Routing
from merge.experts.names import told_mode
from merge.numerics import Raw
from merge.sources import Source, TensorInfo
from merge.sources.model import Model


@dataclass(frozen=True)
class Former:
    """A mixture of adapters as it lies in its folder."""

    model: Model

    @property
    def source(self) -> Source:
        return self.model.source

    @property
    def told(self) -> Mapping[str, Any]:
        """config.json's table about it."""
        return self.model.config["mixture"]  # type: ignore[no-any-return]

    @property
    def routing(self) -> Routing:
        """How it is routed, as far as it tells; mode "" where it does not."""
        told = self.told
        mode = "arrow" if told["absolute"] else told_mode(self.model.folder)
        return Routing(
            mode, told["top_k"], told["temperature"], told["per"], told["normalise"], 0, "",
            absolute=told["absolute"],
        )  # fmt: skip

    def ranks(self, layer: str) -> list[int]:
        """Of every expert; none where the layer is not routed."""
        facts = self.told["modules"].get(layer)
        return list(facts["ranks"]) if facts else []

    def rows(self, name: str, numbers: Sequence[int]) -> list[Rows]:
        """Rows of a tensor, in stretches."""
        return [Stretch(self.source, name, first, end) for first, end in runs(numbers)]

    def stretches(self, layer: str, kept: Sequence[int]) -> bool:
        """Whether DoRA is in one of these experts: its row is not zero."""
        facts = self.told["modules"].get(layer)
        if not (facts and facts["dora"]):
            return False
        rows = self.rows(f"{layer}.dora", kept)
        try:
            return any(np.any(each.read(0, each.info.rows)) for each in rows)
        except ReadError:  # of a model on the hub only the headers are here, to plan
            return True


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of each stretch of ascending numbers that follow one another."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i


@dataclass(frozen=True)
class ColumnsOf:
    """Columns [first, end) of a matrix."""

    of: Stretch
    first: int
    end: int

    @property
    def info(self) -> TensorInfo:
        return replace(self.of.info, shape=(self.of.info.rows, self.end - self.first))

    @property
    def sources(self) -> Sequence[Source]:
        return self.of.sources

    def read(self, first: int, end: int) -> Raw:
        return self.of.read(first, end)[:, self.first : self.end]

    def room(self, rows: int) -> int:
        return self.of.room(rows)


@dataclass(frozen=True)
class Known:
    """Numbers, one a row."""

    values: Sequence[float]
    sources: Sequence[Source] = ()

    @property
    def info(self) -> TensorInfo:
        return TensorInfo("F32", (len(self.values), 1))

    def read(self, first: int, end: int) -> Raw:
        return np.array(self.values[first:end], np.float32)[:, None]

    def room(self, rows: int) -> int:
        return 8 * rows
