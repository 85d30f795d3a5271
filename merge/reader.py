"""Rows of a plan's tensors. Those of a model that is itself a merge are merged as they are read.

So a merge of merges needs no room for what lies between: a grain of it is made from the same grain of
its own inputs, to the bit as if it had been written and read again. What its method has to know of the
whole tensor first is found out once, by a pass of its own.
"""

import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from merge.finite import check_grain, check_input
from merge.formula import Formula, Grains, Merging
from merge.methods import Passes, Request, Statistic, Sums
from merge.numerics import (
    STORAGE,
    Raw,
    combined_digest,
    grain_digest,
    grains,
    pairwise,
    whole_grains,
)
from merge.plan import Operand, Plan, Step


class Reader:
    """Reads any operand of a plan; of steps within steps it keeps what their methods found out."""

    def __init__(self, plan: Plan, *, fuse: bool) -> None:
        self.plan = plan
        self._fuse = fuse
        self._made: dict[int, _Made] = {}
        self._lock = threading.Lock()

    def read(self, operand: Operand, first: int, end: int, out: memoryview) -> None:
        """Fills `out` (bytes) with rows [first, end) as stored; both lie at grains. Raises ReadError,
        NonFiniteError."""
        step = operand.step
        if step is None:
            self.plan.models[operand.model].source.read(operand.tensor, first, end, out)
        elif step.places:
            self._assemble(step, first, end, out)
        elif step.copy:
            self.read(step.operands[0], first, end, out)
        else:
            self._merge(step, first, end, out)

    def mapped(self, operand: Operand, first: int, end: int) -> Raw | None:
        """The rows that `read` gives, where they lie in a file; None where they have to be read."""
        step = operand.step
        if step is None:
            return self.plan.models[operand.model].source.mapped(operand.tensor, first, end)
        return self.mapped(step.operands[0], first, end) if step.copy and not step.places else None

    def digest(self, operand: Operand) -> str:
        """Of all rows, as a merge notes it of its inputs."""
        return combined_digest(grain_digest(rows) for rows, _ in self._rows_of(operand))

    def _rows_of(self, operand: Operand) -> Iterator[tuple[Raw, int]]:
        info = operand.info
        for a, b in grains(info.shape):
            yield self.rows(operand, a, b), a

    def rows(self, operand: Operand, first: int, end: int) -> Raw:
        """Rows [first, end) as stored, [end - first, cols]."""
        rows = np.empty((end - first, operand.info.cols), STORAGE[operand.info.dtype])
        self.read(operand, first, end, rows.reshape(-1).view(np.uint8).data)
        return rows

    def _assemble(self, step: Step, first: int, end: int, out: memoryview) -> None:
        rows = np.frombuffer(out, STORAGE[step.dtype]).reshape(end - first, step.cols)
        for operand, places in zip(step.operands, step.places, strict=True):
            a, b = np.searchsorted(places, (first, end)).tolist()
            if a < b:
                start, stop = whole_grains(operand.info.shape, a, b)
                rows[places[a:b] - first] = self.rows(operand, start, stop)[a - start : b - start]

    def _merge(self, step: Step, first: int, end: int, out: memoryview) -> None:
        made = self._of(step)
        merging = made.merging(self)
        merged = np.frombuffer(out, STORAGE[step.dtype]).reshape(end - first, step.cols)
        for a, b in grains(step.shape, first, end):
            grain = self.grain(step, a, b)
            rows = merged[a - first : b - first]
            if not merging(grain, rows) and not made.formula.allow_nonfinite:
                check_grain(self.plan, step, grain[0], rows, a)

    def grain(self, step: Step, first: int, end: int) -> Grains:
        """Rows of all inputs of a step within a step."""
        return [self.rows(operand, first, end) for operand in step.inputs], first * step.cols

    def _of(self, step: Step) -> "_Made":
        allow = self.plan.recipe.sections.allow_nonfinite
        with self._lock:
            return self._made.setdefault(id(step), _Made(Formula(step, self._fuse, allow)))


class _Made:
    """A step within a step: its arithmetic, and what its method found out about the whole tensor."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._merging: Merging | None = None
        self._lock = threading.Lock()

    def merging(self, reader: Reader) -> Merging:
        with self._lock:
            if self._merging is None:
                passes = self.formula.passes()
                stats = (
                    driven(passes, lambda request: self._over_all(reader, request))
                    if passes
                    else None
                )
                self._merging = self.formula.merging(stats)
            return self._merging

    def _over_all(self, reader: Reader, request: Request) -> Statistic:
        measuring = self.formula.measuring(request)

        def parts() -> Iterator[Statistic]:
            step = self.formula.step
            for a, b in grains(step.shape):
                grain = reader.grain(step, a, b)
                found, finite = measuring(grain)
                if not finite and not self.formula.allow_nonfinite:
                    for index, rows in enumerate(grain[0]):
                        check_input(reader.plan, step, index, rows, a)
                yield from found

        return reduced(request, parts())


def driven(passes: Passes, measured: Callable[[Request], Statistic]) -> Any:
    """What a method's statistics passes find out; `measured` answers what they ask for."""
    try:
        wanted = next(passes)
        while True:
            wanted = passes.send(measured(wanted))
    except StopIteration as stop:
        return stop.value


def reduced(request: Request, parts: Iterable[Statistic]) -> Statistic:
    """What `request` asks of the whole tensor: the sum of `parts`, or all rows; in the order of grains.
    Integers are added as they come."""
    if isinstance(request, Sums) and not request.by_column:
        found = list(parts)
        return np.concatenate(found, axis=1) if request.by_row else pairwise(found)
    return functools.reduce(operator.iadd, parts)
