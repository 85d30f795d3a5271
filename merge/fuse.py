"""Plain numpy functions of equal-shaped arrays, compiled into one loop over their elements.

A method is written as numpy expressions over whole arrays, each of which passes over memory once. Here
such a function is called with symbols instead of arrays; what it does to them is written down as the
body of one loop in LLVM's language, which LLVM compiles for this processor (in about a tenth of a
second). The numbers that it uses (weights, thresholds, keys of random numbers) become arguments, so
that one compiled loop serves all tensors. Nothing is reordered or contracted: the loop gives the bits
of the numpy function, 10 times faster where that is bound by memory.

What is not element-wise raises UntraceableError; the caller then keeps to numpy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from merge.machine import compiled
from merge.nest import BINS, LANES, Value, load, text


class UntraceableError(Exception):
    """The function does something that is not an element-wise numpy operation known here."""


_TYPES = {"f4": "float", "f8": "double", "u2": "i16", "u4": "i32", "u8": "i64", "b1": "i1"}
_FLOAT = {
    "add": "fadd {t} {a}, {b}", "subtract": "fsub {t} {a}, {b}", "multiply": "fmul {t} {a}, {b}",
    "divide": "fdiv {t} {a}, {b}", "negative": "fneg {t} {a}",
    "absolute": "call {t} @llvm.fabs.{f}({t} {a})", "sqrt": "call {t} @llvm.sqrt.{f}({t} {a})",
    "greater": "fcmp ogt {t} {a}, {b}", "greater_equal": "fcmp oge {t} {a}, {b}",
    "less": "fcmp olt {t} {a}, {b}", "less_equal": "fcmp ole {t} {a}, {b}",
    "equal": "fcmp oeq {t} {a}, {b}", "not_equal": "fcmp une {t} {a}, {b}",
}  # fmt: skip
_UNSIGNED = {
    "add": "add {t} {a}, {b}", "subtract": "sub {t} {a}, {b}", "multiply": "mul {t} {a}, {b}",
    "negative": "sub {t} 0, {a}", "invert": "xor {t} {a}, -1",
    "bitwise_and": "and {t} {a}, {b}", "bitwise_or": "or {t} {a}, {b}",
    "bitwise_xor": "xor {t} {a}, {b}",
    "greater": "icmp ugt {t} {a}, {b}", "greater_equal": "icmp uge {t} {a}, {b}",
    "less": "icmp ult {t} {a}, {b}", "less_equal": "icmp ule {t} {a}, {b}",
    "equal": "icmp eq {t} {a}, {b}", "not_equal": "icmp ne {t} {a}, {b}",
}  # fmt: skip
_BOOL = {
    "bitwise_and": "and i1 {a}, {b}", "bitwise_or": "or i1 {a}, {b}",
    "bitwise_xor": "xor i1 {a}, {b}", "invert": "xor i1 {a}, true",
    "logical_and": "and i1 {a}, {b}", "logical_or": "or i1 {a}, {b}",
    "logical_not": "xor i1 {a}, true",
}  # fmt: skip
_PATTERNS = {"f": _FLOAT, "u": _UNSIGNED, "b": _BOOL}
_SHIFTS = {"left_shift": "shl", "right_shift": "lshr"}


class Symbol(NDArrayOperatorsMixin):
    """Stands for an array while a function is traced; in-place operations make it stand for another."""

    def __init__(self, trace: "_Trace", name: str, dtype: np.dtype[Any]) -> None:
        self.trace, self.name, self.dtype = trace, name, dtype

    def __array_ufunc__(
        self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any
    ) -> "Symbol":
        if method != "__call__" or options:
            raise UntraceableError(f"{ufunc.__name__}.{method} with {sorted(options)}")
        result = self.trace.apply(ufunc, inputs)
        if out is None:
            return result
        target: Symbol = out[0]
        target.name = self.trace.cast(result, target.dtype)
        return target

    def __array_function__(self, function: Any, types: Any, inputs: Any, options: Any) -> "Symbol":
        if function is not np.where or len(inputs) != 3 or options:
            raise UntraceableError(f"numpy.{function.__name__}")
        return self.trace.chosen(*inputs)

    def astype(self, dtype: Any, copy: bool = True) -> "Symbol":
        wanted = np.dtype(dtype)
        return Symbol(self.trace, self.trace.cast(self, wanted), wanted)

    def view(self, dtype: Any) -> "Symbol":
        wanted = np.dtype(dtype)
        if wanted.itemsize != self.dtype.itemsize or "b" in (wanted.kind, self.dtype.kind):
            raise UntraceableError(f"view of {self.dtype} as {wanted}")
        return self.trace.emit(f"bitcast {_typed(self)} to {_type(wanted)}", wanted)

    def copy(self) -> "Symbol":
        return Symbol(self.trace, self.name, self.dtype)

    def __bool__(self) -> bool:
        raise UntraceableError("a decision that depends on the values of an array")

    def __getattr__(self, name: str) -> Any:
        raise UntraceableError(f"array.{name}")


def _type(dtype: "np.dtype[Any]") -> str:
    """LLVM's name of a type."""
    name = "b1" if dtype == np.bool_ else dtype.str[1:]
    if name not in _TYPES:
        raise UntraceableError(f"values of type {dtype}")
    return _TYPES[name]


def _typed(symbol: Symbol) -> str:
    return f"{_type(symbol.dtype)} {symbol.name}"


@dataclass
class _Trace:
    """The lines of a loop's body so far, and the numbers that it takes as arguments."""

    lines: list[str] = field(default_factory=list)
    numbers: dict[str, list[Any]] = field(default_factory=lambda: {"f4": [], "f8": [], "u4": []})

    def emit(self, expression: str, dtype: np.dtype[Any]) -> Symbol:
        name = f"%v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return Symbol(self, name, dtype)

    def loaded(self, array: str, dtype: "np.dtype[Any]") -> str:
        """The name of the element of `array`."""
        name = f"%v{len(self.lines)}"
        self.lines += load(name, _type(dtype), array, "%i")
        return name

    def apply(self, ufunc: Any, inputs: Sequence[Any]) -> Symbol:
        name = ufunc.__name__
        try:
            loop = ufunc.resolve_dtypes((*(_type_of(value) for value in inputs), None))
        except TypeError as error:
            raise UntraceableError(f"numpy.{name}: {error}") from None
        a, b = [*(self.cast(v, t) for v, t in zip(inputs, loop, strict=False)), ""][:2]
        kind, t = loop[0].kind, _type(loop[0])
        if name in _SHIFTS and kind == "u":
            return self._shifted(_SHIFTS[name], t, a, b, loop[0])
        pattern = _PATTERNS[kind].get(name)
        if pattern is None or loop[0] != loop[ufunc.nin - 1]:
            raise UntraceableError(f"numpy.{name} of {loop[0]}")
        f = f"f{8 * loop[0].itemsize}"
        return self.emit(pattern.format(t=t, f=f, a=a, b=b), loop[-1])

    def _shifted(self, how: str, t: str, a: str, b: str, dtype: "np.dtype[Any]") -> Symbol:
        """By as many bits as there are, numpy gives 0 and LLVM nothing certain."""
        if b.isdigit() and int(b) < 8 * dtype.itemsize:
            return self.emit(f"{how} {t} {a}, {b}", dtype)
        few = self.emit(f"icmp ult {t} {b}, {8 * dtype.itemsize}", np.dtype(np.bool_))
        by = self.emit(f"select i1 {few.name}, {t} {b}, {t} 0", dtype)
        shifted = self.emit(f"{how} {t} {a}, {by.name}", dtype)
        return self.emit(f"select i1 {few.name}, {t} {shifted.name}, {t} 0", dtype)

    def chosen(self, condition: Any, a: Any, b: Any) -> Symbol:
        """numpy.where."""
        dtype = np.result_type(*(v.dtype if isinstance(v, Symbol) else v for v in (a, b)))
        which, t = self.cast(condition, np.dtype(np.bool_)), _type(dtype)
        a, b = self.cast(a, dtype), self.cast(b, dtype)
        return self.emit(f"select i1 {which}, {t} {a}, {t} {b}", dtype)

    def cast(self, value: Any, dtype: np.dtype[Any]) -> str:
        """The name of `value` (a symbol or a number) as `dtype`."""
        if not isinstance(value, Symbol):
            return self.number(value, dtype)
        if value.dtype == dtype:
            return value.name
        how = _conversion(value.dtype, dtype)
        return self.emit(f"{how} {_typed(value)} to {_type(dtype)}", dtype).name

    def number(self, value: Any, dtype: np.dtype[Any]) -> str:
        if type(value) is int and dtype.kind == "u":  # part of the formula, like a shift
            return str(int(dtype.type(value)))
        if np.ndim(value) != 0 or dtype.str[1:] not in self.numbers:
            raise UntraceableError(f"an operand of shape {np.shape(value)} and type {dtype}")
        known = self.numbers[dtype.str[1:]]
        known.append(dtype.type(value))
        return f"%{dtype.str[1:]}_{len(known) - 1}"


def _conversion(old: "np.dtype[Any]", new: "np.dtype[Any]") -> str:
    """LLVM's instruction for a cast that numpy defines for every value."""
    wider = new.itemsize > old.itemsize
    known = {
        ("f", "f"): "fpext" if wider else "fptrunc",
        ("u", "u"): "zext" if wider else "trunc",
        ("b", "u"): "zext",
        ("b", "f"): "uitofp",
        ("u", "f"): "uitofp",
    }
    if (old.kind, new.kind) not in known:
        raise UntraceableError(f"a cast from {old} to {new}")
    return known[old.kind, new.kind]


def _type_of(value: Any) -> Any:
    """What numpy's promotion looks at: a Python number adapts itself to the arrays."""
    if isinstance(value, Symbol):
        return value.dtype
    return type(value) if type(value) in (bool, int, float) else np.asarray(value).dtype


@dataclass(frozen=True)
class Loop:
    """A traced function: the text of its loop and the numbers to run it with.

    kind: what becomes of the results, see `traced`. inputs, outputs: types of the arrays. by_row: how many of
    the last inputs hold one number for each row.
    """

    source: str
    kind: str
    numbers: tuple[NDArray[Any], ...]
    inputs: tuple[np.dtype[Any], ...]
    outputs: tuple[np.dtype[Any], ...]
    by_row: int = 0

    @property
    def watched(self) -> tuple[np.dtype[Any], ...]:
        """Types of the arrays whose largest magnitudes it tells: inputs not by row, and what it stores."""
        elements = self.inputs[: len(self.inputs) - self.by_row]
        return (*elements, *self.outputs) if self.kind == "store" else elements

    def run(
        self, first: int, inputs: Sequence[NDArray[Any]], out: Sequence[NDArray[Any]], cols: int
    ) -> NDArray[np.uint64]:
        """One pass over `inputs` (flat, equally long); `first`: number of their first element; `cols`:
        elements of a row or, of a "sum", of a grain.

        The largest bits without sign of each of the arrays that are `watched`: from those of infinity on, it
        holds an infinity or a NaN. Raises UncompiledError.
        """
        arrays = [*self.numbers, *inputs, *out]
        run = compiled(self.source, len(arrays) + 1)
        size, elements = inputs[0].size, len(inputs) - self.by_row
        assert all(array.flags.c_contiguous and array.flags.aligned for array in arrays)
        assert all(array.size == size for array in inputs[:elements])
        assert all(array.size * cols == size for array in inputs[elements:])
        largest = np.zeros(len(self.watched), np.uint64)
        places = (array.ctypes.data for array in (*arrays, largest))
        run(size, cols, first & 0xFFFFFFFF, first >> 32, *places)
        return largest

    def room(self, elements: int, cols: int) -> list[NDArray[Any]]:
        """Arrays for the results over so many elements in rows (or grains) of `cols`."""
        rows = -(-elements // max(1, cols))
        if self.kind == "store":
            return [np.empty(elements, dtype) for dtype in self.outputs]
        shape, dtype = {"sum": ((rows, LANES), np.float64), "rows": ((rows,), np.float64),
                        "count": ((BINS,), np.int64)}[self.kind]  # fmt: skip
        return [np.zeros(shape, dtype) for _ in self.outputs]


def traced(
    function: Callable[..., Sequence[Any]],
    dtypes: Sequence[np.dtype[Any]],
    kind: str,
    by_row: int = 0,
) -> Loop:
    """`function(symbols, index, index_high)` -> arrays, as a loop; raises UntraceableError.

    kind "store": the arrays are written out. "sum": those of each grain are summed over LANES lanes into
    float64 [grains, LANES]. "rows": each row is summed over ROW_LANES lanes, which are added up as
    numerics.row_sums does, into float64 [rows]. "count": each (uint32) is counted into int64 [BINS]; values
    from BINS on are left out. by_row: so many of the last inputs hold one number for each row.
    index: uint32 number of the element, modulo 2**32; index_high: what is above, of the first element.
    """
    trace, u4 = _Trace(), np.dtype(np.uint32)
    elements = len(dtypes) - by_row
    rows = [Symbol(trace, f"%x{i}_of_row", dtypes[i]) for i in range(elements, len(dtypes))]
    loaded = [Symbol(trace, trace.loaded(f"%x{i}", dtypes[i]), dtypes[i]) for i in range(elements)]
    low = trace.emit("trunc i64 %i to i32", u4)
    index = trace.emit(f"add i32 %first, {low.name}", u4)
    given = [symbol.copy() for symbol in (*loaded, *rows)]  # which in-place operations rename
    results = function(given, index, Symbol(trace, "%high", u4))
    if not all(isinstance(result, Symbol) for result in results):
        raise UntraceableError("a result that does not depend on the inputs")
    wanted = _RESULTS.get(kind)
    if wanted and any(result.dtype != wanted for result in results):
        raise UntraceableError(f"a {kind} of {', '.join(str(r.dtype) for r in results)}")
    source = text(
        kind,
        [(k, _TYPES[k], len(known)) for k, known in trace.numbers.items()],
        len(dtypes),
        [
            line
            for s in rows
            for line in load(s.name, _type(s.dtype), s.name.removesuffix("_of_row"), "%row")
        ],
        trace.lines,
        [_value(symbol) for symbol in (*loaded, *(results if kind == "store" else ()))],
        [_value(result) for result in results],
    )
    numbers = tuple(np.array(trace.numbers[k], dtype=k) for k in ("f4", "f8", "u4"))
    return Loop(source, kind, numbers, tuple(dtypes), tuple(r.dtype for r in results), by_row)


_RESULTS = {"sum": np.float64, "rows": np.float64, "count": np.uint32}


def _value(symbol: Symbol) -> Value:
    return Value(_type(symbol.dtype), symbol.name)
