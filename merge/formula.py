"""What happens to one grain: stored values in, merged stored values or a statistic out.

Written once, as numpy expressions; run on arrays as they are, or compiled into one loop where enough
work waits. The first grain that a compiled loop meets is also computed by numpy: if the bits differ,
the loop is not used.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge.fuse import BINS, LANES, Loop, Untraceable, traced
from merge.methods import Counts, Method, Passes, Sums
from merge.numerics import (
    STORAGE,
    Array,
    Counter,
    Raw,
    folded,
    from_float32,
    random_key,
    to_float32,
)
from merge.plan import Step

Expression = Callable[[Sequence[Any], Counter], Sequence[Any]]
GrainFunction = Callable[[Sequence[Raw], int], Any]


@dataclass(frozen=True)
class Formula:
    """The arithmetic of one step of a plan."""

    step: Step
    method: Method
    fuse: bool
    allow_nonfinite: bool

    def passes(self) -> Passes | None:
        """The method's statistics passes over the step's tensors, or None."""
        if self.method.statistics is None or self.step.copy:
            return None
        size, models = self.step.rows * self.step.cols, len(self.step.operands)
        return self.method.statistics(size, models=models, **self._arguments)

    def merging(self, stats: Any) -> GrainFunction:
        """(stored rows of every input, number of their first element) -> merged rows as stored."""
        # half precision has no integer shortcut: its loop ends in float32
        dtype = self.step.dtype if self.step.dtype in ("BF16", "F32") else "F32"

        def merged(raws: Sequence[Any], counter: Counter) -> list[Any]:
            x, base = self._operands(raws)
            given = {"x": x, "stats": stats, "random": lambda i: counter.random(self._key(i))}
            out = self.method.function(*(given[n] for n in self.method.takes), **self._arguments)
            if base is not None:
                out = base + out
            if self.allow_nonfinite:
                out[np.isnan(out)] = np.nan  # other NaNs could carry into infinity when rounded
            return [from_float32(out, dtype)]

        grain = self._grain_function(merged, "store")
        if dtype == self.step.dtype:
            return lambda raws, first: grain(raws, first)[0]
        return lambda raws, first: from_float32(grain(raws, first)[0], self.step.dtype)

    def measuring(self, request: Sums | Counts) -> GrainFunction:
        """(stored rows of every input, number of their first element) -> statistic of the grain."""
        if isinstance(request, Sums):
            terms = self._grain_function(lambda raws, _: request.terms(self._operands(raws)[0]), "sum")
            return lambda raws, first: np.array([folded(lanes) for lanes in terms(raws, first)])
        bins = self._grain_function(lambda raws, _: request.bins(self._operands(raws)[0]), "count")
        return lambda raws, first: np.stack(bins(raws, first))

    @property
    def _arguments(self) -> dict[str, Any]:
        return self.method.arguments(self.step.parameters)

    def _key(self, model: int) -> int:
        return random_key(self.step.parameters.get("seed", 0), self.step.name, model)

    def _operands(self, raws: Sequence[Any]) -> tuple[list[Array], Array | None]:
        """The inputs as float32, the base taken off where there is one."""
        dtypes = [operand.info.dtype for operand in self.step.inputs]
        x = [
            to_float32(raw, "F32" if raw.dtype == np.float32 else dtype)
            for raw, dtype in zip(raws, dtypes, strict=True)
        ]
        if self.step.base is None:
            return x, None
        base, *models = x
        return [model - base for model in models], base

    def _grain_function(self, expression: Expression, kind: str) -> Callable[[Sequence[Raw], int], Any]:
        """`expression` reduced as `kind` says (see fuse.traced), compiled or by numpy."""

        def by_numpy(raws: Sequence[Raw], first: int) -> list[Any]:
            shape = (raws[0].shape[0], raws[0].shape[1])
            with np.errstate(all="ignore"):  # infinities are looked for in what is written
                results = expression(raws, Counter.of(first, shape) if kind == "store" else _NONE)
            return [_REDUCED[kind](result) for result in results]

        loop = self._loop(expression, kind) if self.fuse and not self.allow_nonfinite else None
        if loop is None:
            return by_numpy
        return lambda raws, first: _run_checked(loop, kind, by_numpy, raws, first)

    def _loop(self, expression: Expression, kind: str) -> Loop | None:
        dtypes = [_loop_dtype(operand.info.dtype) for operand in self.step.inputs]
        try:
            return traced(lambda raws, index, high: expression(raws, Counter(index, high)), dtypes, kind)
        except Untraceable:
            return None


_NONE = Counter(np.empty(0, np.uint32), np.uint32(0))


def _loop_dtype(dtype: str) -> "np.dtype[Any]":
    """Half precision is widened before the loop, which knows no such type."""
    return np.dtype(np.float32) if dtype == "F16" else STORAGE[dtype]


def _lanes(values: Any) -> Any:
    """Element i added to lane i % LANES, in order."""
    flat = values.ravel()
    whole = flat.size // LANES * LANES
    lanes = np.zeros(LANES)
    if whole:
        lanes += np.add.reduce(flat[:whole].reshape(-1, LANES), axis=0)
    lanes[: flat.size - whole] += flat[whole:]
    return lanes


def _counted(values: Any) -> Any:
    return np.bincount(values[values < BINS], minlength=BINS)


_REDUCED: dict[str, Callable[[Any], Any]] = {"store": lambda v: v, "sum": _lanes, "count": _counted}


def _run_loop(loop: Loop, kind: str, raws: Sequence[Raw], first: int) -> list[Any]:
    flat = [
        (to_float32(raw, "F16") if raw.dtype == np.float16 else raw).reshape(-1) for raw in raws
    ]
    if kind == "store":
        out: list[Any] = [np.empty(flat[0].size, dtype) for dtype in loop.outputs]
    elif kind == "sum":
        out = [np.zeros(LANES) for _ in loop.outputs]
    else:
        out = [np.zeros(BINS, np.int64) for _ in loop.outputs]
    loop.run(first, flat, out)
    return [part.reshape(raws[0].shape) for part in out] if kind == "store" else out


_trusted: dict[str, bool] = {}
_checking = threading.Lock()


def _run_checked(loop: Loop, kind: str, by_numpy: Callable[[Sequence[Raw], int], list[Any]], raws: Sequence[Raw], first: int) -> list[Any]:
    """The loop's result, once it gave numpy's bits on a first grain; else numpy's."""
    trusted = _trusted.get(loop.source)
    if trusted is None:
        with _checking:
            expected = by_numpy(raws, first)
            found = _run_loop(loop, kind, raws, first)
            same = all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
            _trusted[loop.source] = same
        return expected
    return _run_loop(loop, kind, raws, first) if trusted else by_numpy(raws, first)

