"""What happens to grains: stored values in, merged stored values or a statistic out.

Written once, as numpy expressions; run on the arrays of a grain as they are, or compiled into one loop,
which takes many grains at once, where enough work waits. The first grain that a compiled loop meets is also
computed by numpy: if the bits differ, the loop is not used.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.fuse import Loop, UntraceableError, traced
from merge.machine import UncompiledError
from merge.methods import Counts, Method, OfRows, Passes, Request, Statistic
from merge.nest import BINS, LANES, ROW_LANES
from merge.numerics import (
    INFINITY,
    STORAGE,
    Array,
    Counter,
    Raw,
    from_float32,
    grain_rows,
    grains,
    largest_magnitude,
    random_key,
    row_sums,
    to_float32,
)
from merge.plan import Step
from merge.ranks import magnitude_ranks

# stored rows of every input, and the numbers of their elements for whoever asks -> arrays
Expression = Callable[[Sequence[Any], Callable[[], Counter]], Iterable[Any]]
Grains = tuple[Sequence[Raw], int]  # stored rows of every input; number of their first element
# merged rows, in the memory that is given for them; whether all values of the grains and of the result were
# seen to be finite: if not, some may be
Merging = Callable[[Grains, Raw], bool]
# statistics, one for each grain or one for all; whether all values of the grains were seen to be finite
Measuring = Callable[[Grains], tuple[list[Statistic], bool]]


@dataclass(frozen=True)
class Formula:
    """The arithmetic of one step of a plan, on one grain of its rows or more."""

    step: Step
    fuse: bool
    allow_nonfinite: bool

    @property
    def method(self) -> Method:
        return self.step.method

    def passes(self) -> Passes | None:
        """The method's statistics passes over the step's tensors, or None."""
        if self.method.statistics is None or self.step.copy:
            return None
        cols, models = self.step.cols, len(self.step.operands)
        return self.method.statistics(
            self.step.rows * cols, models=models, cols=cols, **self._arguments
        )

    def merging(self, stats: Any) -> Merging:
        """What fills memory with the merged rows of grains, as they are stored."""
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
            return function.store

        def rounded(given: Grains, into: Raw) -> bool:
            for grain, a, b in one_by_one(given):
                (values,), _ = function(grain)
                into[a:b] = from_float32(values, self.step.dtype)
            return False

        return rounded

    def measuring(self, request: Request) -> Measuring:
        """What finds out the statistics of grains."""
        if isinstance(request, Counts):
            of_rows = _of_rows(request.of_rows)
            return self._compiled(lambda raws, _: self._bins(request, raws), "count", of_rows).total
        kind = "columns" if request.by_column else "rows" if request.by_row else "sum"
        function = self._compiled(lambda raws, _: request.terms(self._operands(raws)[0]), kind)
        if kind == "columns":
            return function.total

        def measured(given: Grains) -> tuple[list[Statistic], bool]:
            results, finite = function(given)
            if kind == "rows":
                return [np.stack(results)], finite
            return list(np.stack([row_sums(lanes) for lanes in results], axis=1)), finite

        return measured

    def _bins(self, request: Counts, raws: Sequence[Any]) -> Iterable[Any]:
        x, _, of_rows = self._operands(raws)
        return request.bins(x, *of_rows)

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

        def ranks(grain: Grains) -> list[Raw]:
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
        loop = self._loop(expression, kind, beside or _Beside((), lambda grain: ()))
        return _GrainFunction(expression, kind, loop, self.fuse, beside)

    def _loop(self, expression: Expression, kind: str, beside: "_Beside") -> Loop | None:
        if not self.fuse or kind == "columns":
            return None
        dtypes = [_loop_dtype(operand.info.dtype) for operand in self.step.inputs]
        try:
            return traced(
                lambda raws, index, high: list(expression(raws, lambda: Counter(index, high))),
                [*dtypes, *beside.dtypes],
                kind,
                len(beside.dtypes) * beside.by_row,
            )
        except UntraceableError:
            return None


@dataclass(frozen=True)
class _Beside:
    """Arrays that are not stored: further inputs of an expression, [rows, cols] or, by row, [rows, 1]."""

    dtypes: "Sequence[np.dtype[Any]]"
    of: Callable[[Grains], Sequence[Raw]]
    by_row: bool = False


def _of_rows(numbers: Array | None) -> _Beside | None:
    """`numbers`, float32 [rows of the tensor]."""
    if numbers is None:
        return None

    def of(given: Grains) -> list[Raw]:
        raws, element = given
        rows, cols = raws[0].shape
        first = element // cols
        return [numbers[first : first + rows, None]]

    return _Beside((np.dtype(np.float32),), of, by_row=True)


def one_by_one(given: Grains) -> Iterator[tuple[Grains, int, int]]:
    """Each grain, and the first and end of its rows among those that are given."""
    raws, element = given
    rows, cols = raws[0].shape
    for a, b in grains((rows, cols)):
        yield ([raw[a:b] for raw in raws], element + a * cols), a, b


def _loop_dtype(dtype: str) -> "np.dtype[Any]":
    """Half precision is widened before the loop, which knows no such type."""
    return np.dtype(np.float32) if dtype == "F16" else STORAGE[dtype]


def _lanes(values: Any) -> Any:
    """Element i of the one grain added to lane i % LANES, in order, [1, LANES]."""
    flat = values.ravel()
    whole = flat.size // LANES * LANES
    lanes = np.zeros((1, LANES))
    if whole:
        lanes[0] += np.add.reduce(flat[:whole].reshape(-1, LANES), axis=0)
    lanes[0, : flat.size - whole] += flat[whole:]
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
_ADDED = ("count", "columns")  # kinds whose results of two grains are added, not put in a row
# results of which a loop makes more than one grain's: 8 KiB of lanes for each and grain
FEW_SUMS = 64
_trusted: dict[str, bool] = {}  # whether a loop gave numpy's bits on the first grain that it met
_one_at_a_time, _one_trial = threading.Lock(), threading.Lock()
_log = logging.getLogger("mergetool")


@dataclass(frozen=True)
class _GrainFunction:
    """`expression` of grains, reduced as `kind` says (see fuse.traced): by its loop or by numpy."""

    expression: Expression
    kind: str
    loop: Loop | None
    fuse: bool  # then memory is planned for the arrays of one thread at a time
    beside: _Beside | None = None

    def __call__(self, given: Grains) -> tuple[list[Any], bool]:
        """One array per result; whether a loop saw nothing but finite values."""
        found: list[list[Any]] = []
        finite = True
        for piece, _, _ in self._pieces(given):
            results, seen = self._of_piece(piece)
            finite &= seen
            if found and self.kind in _ADDED:
                for total, more in zip(found[0], results, strict=True):
                    total += more
            else:
                found.append(results)
        if len(found) == 1:
            return found[0], finite
        return [np.concatenate(parts) for parts in zip(*found, strict=True)], finite

    def total(self, given: Grains) -> tuple[list[Statistic], bool]:
        """The integers of all grains in one."""
        results, finite = self(given)
        return [np.stack(results)], finite

    def store(self, given: Grains, into: Raw) -> bool:
        """Fills `into`, contiguous memory, with the one result; tells what a call tells."""
        finite = True
        for piece, a, b in self._pieces(given):
            finite &= self._of_piece(piece, into[a:b])[1]
        return finite

    def _pieces(self, given: Grains) -> Iterable[tuple[Grains, int, int]]:
        """What is computed at once: everything by a loop, where that needs little memory beside it and all
        elements share the high part of their numbers; otherwise one grain after the other."""
        raws, first = given
        alike = first >> 32 == max(first, first + raws[0].size - 1) >> 32
        if self._by_loop_now() and alike and self._is_lean(raws):
            return [(given, 0, len(raws[0]))]
        return one_by_one(given)

    def _is_lean(self, raws: Sequence[Raw]) -> bool:
        """Whether a loop needs no other arrays of the size of these, and no lanes of very many sums."""
        bare = self.beside is None or self.beside.by_row
        many = self.loop is not None and len(self.loop.outputs) > FEW_SUMS
        return bare and not many and all(raw.dtype != np.float16 for raw in raws)

    def _of_piece(self, piece: Grains, into: Raw | None = None) -> tuple[list[Any], bool]:
        piece = self._with_beside(piece)
        if self.loop is None or not self._by_loop_now():
            results = self._tried(piece) if self.fuse else self.by_numpy(piece)
            if into is not None:
                into[:] = results[0]
            return results, False
        results, largest = self.by_loop(piece, into)
        limits = [_LIMITS[dtype.str[1:]] for dtype in self.loop.watched]
        return results, all(x < limit for x, limit in zip(largest, limits, strict=True))

    def _with_beside(self, given: Grains) -> Grains:
        raws, element = given
        return ([*raws, *self.beside.of(given)], element) if self.beside else given

    def _by_loop_now(self) -> bool:
        return self.fuse and self.loop is not None and _trusted.get(self.loop.source, False)

    def _tried(self, grain: Grains) -> list[Any]:
        """By numpy; the first that comes tries the loop as well, while others go on by numpy."""
        with _one_at_a_time:
            expected = self.by_numpy(grain)
            if self.loop is None or self.loop.source in _trusted:
                return expected
            _trusted[self.loop.source] = False
        with _one_trial:
            _trusted[self.loop.source] = self._agrees(grain, expected)
        return expected

    def _agrees(self, grain: Grains, expected: list[Any]) -> bool:
        try:
            found, largest = self.by_loop(grain)
        except UncompiledError as error:
            _log.warning("merging without compiled loops: %s", str(error).splitlines()[0])
            return False
        same = all(_same_bits(a, b) for a, b in zip(found, expected, strict=True))
        assert self.loop is not None
        elements = grain[0][: len(grain[0]) - self.loop.by_row]
        seen = [*map(_widened, elements), *expected][: len(largest)]
        same = same and largest.tolist() == [largest_magnitude(values) for values in seen]
        if not same:
            _log.warning(
                "a compiled loop gives other bits than numpy on this machine; it is not used"
            )
        return same

    def by_numpy(self, grain: Grains) -> list[Any]:
        """One grain, what stands beside it among its rows."""
        raws, first = grain
        elements = cache(lambda: Counter.of(first, raws[0].shape))
        with np.errstate(all="ignore"):  # infinities are looked for in what is written
            return [_REDUCED[self.kind](result) for result in self.expression(raws, elements)]

    def by_loop(
        self, given: Grains, into: Raw | None = None
    ) -> tuple[list[Any], NDArray[np.uint64]]:
        """The results, and what Loop.run tells. into: where the one result that is stored goes."""
        assert self.loop is not None
        raws, first = given
        rows, cols = raws[0].shape
        if self.kind == "sum":
            cols *= grain_rows((rows, cols))
        elif self.kind != "rows" and not self.loop.by_row:
            cols *= rows  # all of one row, so that the innermost loop is long
        flat = [np.ascontiguousarray(_widened(raw)).reshape(-1) for raw in raws]
        out = self.loop.room(flat[0].size, cols) if into is None else [into.reshape(-1)]
        largest = self.loop.run(first, flat, out, cols)
        return [o.reshape(rows, -1) if self.kind == "store" else o for o in out], largest


def _widened(raw: Raw) -> Raw:
    return to_float32(raw, "F16") if raw.dtype == np.float16 else raw


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """NaNs are equal only where their bits are."""
    kind = f"u{a.itemsize}"
    return a.dtype == b.dtype and bool(np.array_equal(a.view(kind), b.view(kind)))
