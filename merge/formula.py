"""What happens to one grain: stored values in, merged stored values or a statistic out.

Written once, as numpy expressions; run on arrays as they are, or compiled into one loop where enough
work waits. The first grain that a compiled loop meets is also computed by numpy: if the bits differ,
the loop is not used.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.fuse import BINS, LANES, ROW_LANES, Loop, UntraceableError, traced
from merge.methods import Counts, Method, OfRows, Passes, Request, Statistic
from merge.numerics import (
    INFINITY,
    STORAGE,
    Array,
    Counter,
    Raw,
    folded,
    from_float32,
    largest_magnitude,
    random_key,
    row_sums,
    to_float32,
)
from merge.plan import Step
from merge.ranks import magnitude_ranks

# stored rows of every input, and the numbers of their elements for whoever asks -> arrays
Expression = Callable[[Sequence[Any], Callable[[], Counter]], Iterable[Any]]
Grain = tuple[Sequence[Raw], int]  # stored rows of every input, number of their first element
# merged rows, in the memory that is given for them if that can be; whether all was seen to be finite
Merging = Callable[[Grain, Raw | None], tuple[Raw, bool]]


@dataclass(frozen=True)
class Formula:
    """The arithmetic of one step of a plan."""

    step: Step
    fuse: bool
    allow_nonfinite: bool

    @property
    def method(self) -> Method:
        return self.step.method

    @property
    def merges_as_it_reads(self) -> bool:
        """Whether a grain that was read is merged at once, without statistics passes."""
        return self.method.statistics is None and not self.step.copy

    def passes(self) -> Passes | None:
        """The method's statistics passes over the step's tensors, or None."""
        if self.method.statistics is None or self.step.copy:
            return None
        cols, models = self.step.cols, len(self.step.operands)
        return self.method.statistics(
            self.step.rows * cols, models=models, cols=cols, **self._arguments
        )

    def merging(self, stats: Any) -> Merging:
        """A function from a grain to its merged rows as stored, and whether all values of the grain and
        of the result were seen to be finite; if not, some may be."""
        # half precision has no integer shortcut: its loop ends in float32
        dtype = self.step.dtype if self.step.dtype in ("BF16", "F32") else "F32"
        if stats is not None and self.method.settled:
            stats = self.method.settled(stats, **self._arguments)
        found = stats if isinstance(stats, OfRows) else OfRows(None, stats)

        def merged(raws: Sequence[Any], elements: Callable[[], Counter]) -> list[Any]:
            x, base, beside = self._operands(raws)
            given = {"x": x, "stats": found.stats, "ranks": beside.__getitem__}
            given["of_rows"] = beside[0] if beside else None
            given["random"] = lambda i: elements().random(self._key(i))
            out = self.method.function(*(given[n] for n in self.method.takes), **self._arguments)
            if base is not None:
                out = base + out
            if self.allow_nonfinite:
                out[np.isnan(out)] = np.nan  # other NaNs could carry into infinity when rounded
            return [from_float32(out, dtype)]

        beside = self._ranks() if "ranks" in self.method.takes else _of_rows(found.of_rows)
        function = self._compiled(merged, "store", beside)
        if dtype == self.step.dtype:
            return function.checked
        return lambda grain, into: (from_float32(function(grain)[0], self.step.dtype), False)

    def measuring(self, request: Request) -> Callable[[Iterable[Grain]], list[Statistic]]:
        """A function from grains to their statistics: one each, or (integers) one for all."""
        if isinstance(request, Counts):
            return self._counting(request)
        kind = "columns" if request.by_column else "rows" if request.by_row else "sum"
        function = self._compiled(lambda raws, _: request.terms(self._operands(raws)[0]), kind)
        if kind == "sum":
            return lambda grains: [
                np.array([folded(lanes) for lanes in function(grain)]) for grain in grains
            ]
        if kind == "rows":
            return lambda grains: [np.stack(function(grain)) for grain in grains]
        return _added(function)

    def _counting(self, request: Counts) -> Callable[[Iterable[Grain]], list[Statistic]]:
        def bins(raws: Sequence[Any], _: Any) -> Iterable[Any]:
            x, _, of_rows = self._operands(raws)
            return request.bins(x, *of_rows)

        return _added(self._compiled(bins, "count", _of_rows(request.of_rows)))

    @property
    def _arguments(self) -> dict[str, Any]:
        return self.method.arguments(self.step.parameters)

    def _key(self, model: int) -> int:
        return random_key(self.step.parameters.get("seed", 0), self.step.name, model)

    def _operands(self, raws: Sequence[Any]) -> tuple[list[Array], Array | None, Sequence[Any]]:
        """The inputs as float32, the base taken off where there is one; the base; what stands beside."""
        inputs = len(self.step.inputs)
        x = [self._widened(raw, i) for i, raw in enumerate(raws[:inputs])]
        if self.step.base is None:
            return x, None, raws[inputs:]
        base, *models = x
        return [model - base for model in models], base, raws[inputs:]

    def _widened(self, raw: Any, i: int) -> Any:
        """Rows of input i as float32; a loop is given half precision so."""
        return to_float32(raw, "F32" if raw.dtype == np.float32 else self.step.inputs[i].info.dtype)

    def _ranks(self) -> "_Beside":
        """The rank of each value of each model (of its task vector, where there is a base)."""

        def ranks(grain: Grain) -> list[Raw]:
            raws, skipped = grain[0], int(self.step.base is not None)
            base = self._widened(raws[0], 0) if skipped else np.float32(0.0)
            with np.errstate(all="ignore"):
                return [
                    magnitude_ranks(self._widened(raws[i], i) - base, self.fuse)
                    for i in range(skipped, len(raws))
                ]

        return _Beside((np.dtype(np.float64),) * len(self.step.operands), ranks)

    def _compiled(
        self, expression: Expression, kind: str, beside: "_Beside | None" = None
    ) -> "_GrainFunction":
        loop = self._loop(expression, kind, beside.dtypes if beside else ())
        return _GrainFunction(expression, kind, loop, self.fuse, beside)

    def _loop(
        self, expression: Expression, kind: str, beside: Sequence["np.dtype[Any]"]
    ) -> Loop | None:
        if not self.fuse or kind == "columns":
            return None
        dtypes = [_loop_dtype(operand.info.dtype) for operand in self.step.inputs]
        try:
            return traced(
                lambda raws, index, high: list(expression(raws, lambda: Counter(index, high))),
                [*dtypes, *beside],
                kind,
            )
        except UntraceableError:
            return None


@dataclass(frozen=True)
class _Beside:
    """Arrays of a grain that are neither stored nor element-wise: further inputs of its expression."""

    dtypes: "Sequence[np.dtype[Any]]"
    of: Callable[[Grain], Sequence[Raw]]


def _of_rows(numbers: Array | None) -> _Beside | None:
    """`numbers`, float32 [rows of the tensor], each repeated along its row."""
    if numbers is None:
        return None

    def repeated(grain: Grain) -> list[Raw]:
        raws, element = grain
        rows, cols = raws[0].shape
        first = element // cols
        return [np.broadcast_to(numbers[first : first + rows, None], (rows, cols))]

    return _Beside((np.dtype(np.float32),), repeated)


def _added(function: "_GrainFunction") -> Callable[[Iterable[Grain]], list[Statistic]]:
    """Integers of all grains in one."""

    def total_of(grains: Iterable[Grain]) -> list[Statistic]:
        total: list[Any] | None = None
        for grain in grains:
            total = function(grain, total)
        return [np.stack(total)] if total else []

    return total_of


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


def _row_lanes(values: Any) -> Any:
    """Element i of a row added to its lane i % ROW_LANES, in order; then the sums of the lanes."""
    rows, cols = values.shape
    whole = cols // ROW_LANES * ROW_LANES
    lanes = np.zeros((rows, min(cols, ROW_LANES)))
    if whole:
        lanes += np.add.reduce(values[:, :whole].reshape(rows, -1, ROW_LANES), axis=1)
    lanes[:, : cols - whole] += values[:, whole:]
    return row_sums(lanes)


def _counted(values: Any) -> Any:
    return np.bincount(values[values < BINS], minlength=BINS)


# of the types that a loop sees: 16 bits are bfloat16
_LIMITS = {STORAGE[name].str[1:]: INFINITY[name] for name in ("BF16", "F32", "F64")}
_REDUCED: dict[str, Callable[[Any], Any]] = {
    "store": lambda v: v,
    "sum": _lanes,
    "rows": _row_lanes,
    "count": _counted,
    "columns": lambda v: v.sum(axis=0),
}
_trusted: dict[str, bool] = {}  # whether a loop gave numpy's bits on the first grain that it met
_one_at_a_time, _one_trial = threading.Lock(), threading.Lock()
_log = logging.getLogger("mergetool")


@dataclass(frozen=True)
class _GrainFunction:
    """`expression` of a grain, reduced as `kind` says (see fuse.traced): by its loop or by numpy."""

    expression: Expression
    kind: str
    loop: Loop | None
    fuse: bool  # then memory is planned for the arrays of one thread at a time
    beside: _Beside | None = None

    def __call__(self, grain: Grain, total: list[Any] | None = None) -> list[Any]:
        """One array per result; counts are added to `total` where it is given."""
        grain = self._with_beside(grain)
        if self._by_loop_now():
            return self.by_loop(grain, total)[0]
        return self._added(self._tried(grain) if self.fuse else self.by_numpy(grain), total)

    def checked(self, grain: Grain, into: Raw | None = None) -> tuple[Any, bool]:
        """The one result that is stored, and whether the loop saw nothing but finite values.

        into: contiguous memory that a loop fills with the result, which then is `into` itself.
        """
        if not self._by_loop_now():
            return self(grain)[0], False
        results, largest = self.by_loop(self._with_beside(grain), into=into)
        assert self.loop is not None
        types = (*self.loop.inputs, *self.loop.outputs)
        finite = all(found < _LIMITS[t.str[1:]] for found, t in zip(largest, types, strict=True))
        return into if into is not None else results[0], finite

    def _with_beside(self, grain: Grain) -> Grain:
        raws, element = grain
        return ([*raws, *self.beside.of(grain)], element) if self.beside else grain

    def _by_loop_now(self) -> bool:
        return self.fuse and self.loop is not None and _trusted.get(self.loop.source, False)

    def _tried(self, grain: Grain) -> list[Any]:
        """By numpy; the first that comes tries the loop as well, while others go on by numpy."""
        with _one_at_a_time:
            expected = self.by_numpy(grain)
            if self.loop is None or self.loop.source in _trusted:
                return expected
            _trusted[self.loop.source] = False
        with _one_trial:
            _trusted[self.loop.source] = self._agrees(grain, expected)
        return expected

    def _agrees(self, grain: Grain, expected: list[Any]) -> bool:
        try:
            found, largest = self.by_loop(grain)
        except UntraceableError as error:
            _log.warning("merging without compiled loops: %s", str(error).splitlines()[0])
            return False
        same = all(_same_bits(a, b) for a, b in zip(found, expected, strict=True))
        if self.kind == "store":
            magnitudes = [largest_magnitude(_widened(raw)) for raw in grain[0]]
            magnitudes += [largest_magnitude(result) for result in expected]
            same &= largest.tolist() == magnitudes
        if not same:
            _log.warning(
                "a compiled loop gives other bits than numpy on this machine; it is not used"
            )
        return same

    def by_numpy(self, grain: Grain) -> list[Any]:
        raws, first = grain
        elements = cache(lambda: Counter.of(first, raws[0].shape))
        with np.errstate(all="ignore"):  # infinities are looked for in what is written
            return [_REDUCED[self.kind](result) for result in self.expression(raws, elements)]

    def by_loop(
        self, grain: Grain, total: list[Any] | None = None, into: Raw | None = None
    ) -> tuple[list[Any], NDArray[np.uint64]]:
        """The results, and what Loop.run tells. into: where the one result that is stored goes."""
        assert self.loop is not None
        raws, first = grain
        flat = [np.ascontiguousarray(_widened(raw)).reshape(-1) for raw in raws]
        out: list[Any]
        if into is not None:
            out = [into.reshape(-1)]
        elif self.kind == "store":
            out = [np.empty(flat[0].size, dtype) for dtype in self.loop.outputs]
        elif self.kind == "sum":
            out = [np.zeros(LANES) for _ in self.loop.outputs]
        elif self.kind == "rows":
            out = [np.zeros(len(raws[0])) for _ in self.loop.outputs]
        else:
            out = total or [np.zeros(BINS, np.int64) for _ in self.loop.outputs]
        largest = self.loop.run(first, flat, out, raws[0].shape[1])
        shaped = [o.reshape(raws[0].shape) for o in out] if self.kind == "store" else out
        return shaped, largest

    @staticmethod
    def _added(results: list[Any], total: list[Any] | None) -> list[Any]:
        return [a + b for a, b in zip(results, total, strict=True)] if total else results


def _widened(raw: Raw) -> Raw:
    return to_float32(raw, "F16") if raw.dtype == np.float16 else raw


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """NaNs are equal only where their bits are."""
    kind = f"u{a.itemsize}"
    return a.dtype == b.dtype and bool(np.array_equal(a.view(kind), b.view(kind)))
