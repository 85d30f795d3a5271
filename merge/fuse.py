"""Plain numpy functions of equal-shaped arrays, compiled into one loop over their elements.

A method is written as numpy expressions over whole arrays, each of which passes over memory once. Here
such a function is called with symbols instead of arrays; what it does to them is written down as one
Python loop, and numba compiles that. The numbers that it uses (weights, thresholds, keys of random
numbers) become arguments, so that one compiled loop serves all tensors. Nothing is reordered or
contracted: the loop gives the bits of the numpy function, 10 times faster where that is bound by memory.

What is not element-wise raises UntraceableError; the caller then keeps to numpy.
"""

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

LANES = 1024  # partial sums of a grain: element i is added to lane i % LANES
BINS = 1 << 16  # a count statistic has so many bins; larger values are not counted
CHUNK = 2048  # elements whose bins are computed before they are counted


class UntraceableError(Exception):
    """The function does something that is not an element-wise numpy operation known here."""


_BINARY = {
    "add": "({} + {})", "subtract": "({} - {})", "multiply": "({} * {})", "divide": "({} / {})",
    "greater": "({} > {})", "greater_equal": "({} >= {})", "less": "({} < {})",
    "less_equal": "({} <= {})", "equal": "({} == {})", "not_equal": "({} != {})",
    "bitwise_and": "({} & {})", "bitwise_or": "({} | {})", "bitwise_xor": "({} ^ {})",
    "logical_and": "({} & {})", "logical_or": "({} | {})",
    "left_shift": "({} << {})", "right_shift": "({} >> {})",
}  # fmt: skip
_UNARY = {
    "absolute": "abs({})",
    "negative": "(-{})",
    "logical_not": "(not {})",
    "sqrt": "np.sqrt({})",
    "invert": "(~{})",
}


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

    def astype(self, dtype: Any, copy: bool = True) -> "Symbol":
        wanted = np.dtype(dtype)
        return Symbol(self.trace, self.trace.cast(self, wanted), wanted)

    def view(self, dtype: Any) -> "Symbol":
        wanted = np.dtype(dtype)
        if wanted.itemsize != self.dtype.itemsize:
            raise UntraceableError(f"view of {self.dtype} as {wanted}")
        return self.trace.emit(f"np.{self.dtype}({self.name}).view(np.{wanted})", wanted)

    def copy(self) -> "Symbol":
        return Symbol(self.trace, self.name, self.dtype)

    def __bool__(self) -> bool:
        raise UntraceableError("a decision that depends on the values of an array")

    def __getattr__(self, name: str) -> Any:
        raise UntraceableError(f"array.{name}")


@dataclass
class _Trace:
    """The lines of a loop's body so far, and the numbers that it takes as arguments."""

    lines: list[str] = field(default_factory=list)
    numbers: dict[str, list[Any]] = field(default_factory=lambda: {"f4": [], "f8": [], "u4": []})

    def emit(self, expression: str, dtype: np.dtype[Any]) -> Symbol:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return Symbol(self, name, dtype)

    def apply(self, ufunc: Any, inputs: Sequence[Any]) -> Symbol:
        pattern = (_BINARY if ufunc.nin == 2 else _UNARY).get(ufunc.__name__)
        if pattern is None:
            raise UntraceableError(f"numpy.{ufunc.__name__}")
        loop = ufunc.resolve_dtypes((*(_type_of(value) for value in inputs), None))
        names = [self.cast(value, dtype) for value, dtype in zip(inputs, loop, strict=False)]
        if ufunc is np.invert and loop[0] == np.bool_:
            pattern = _UNARY["logical_not"]
        expression = pattern.format(*names)
        if loop[-1] != np.bool_:
            expression = f"np.{loop[-1]}({expression})"
        return self.emit(expression, loop[-1])

    def cast(self, value: Any, dtype: np.dtype[Any]) -> str:
        """The name of `value` (a symbol or a number) as `dtype`."""
        if not isinstance(value, Symbol):
            return self.number(value, dtype)
        if value.dtype == dtype:
            return value.name
        return self.emit(f"np.{dtype}({value.name})", dtype).name

    def number(self, value: Any, dtype: np.dtype[Any]) -> str:
        if type(value) is int and dtype.kind == "u":  # part of the formula, like a shift
            return f"np.{dtype}({value})"
        if np.ndim(value) != 0 or dtype.str[1:] not in self.numbers:
            raise UntraceableError(f"an operand of shape {np.shape(value)} and type {dtype}")
        known = self.numbers[dtype.str[1:]]
        known.append(dtype.type(value))
        return f"{dtype.str[1:]}_{len(known) - 1}"


def _type_of(value: Any) -> Any:
    """What numpy's promotion looks at: a Python number adapts itself to the arrays."""
    if isinstance(value, Symbol):
        return value.dtype
    return type(value) if type(value) in (bool, int, float) else np.asarray(value).dtype


@dataclass(frozen=True)
class Loop:
    """A traced function: the text of its loop and the numbers to run it with."""

    source: str
    numbers: tuple[NDArray[Any], ...]
    outputs: tuple[np.dtype[Any], ...]

    def run(self, first: int, inputs: Sequence[NDArray[Any]], out: Sequence[NDArray[Any]]) -> None:
        """One pass over `inputs` (flat, equally long); `first`: number of their first element.

        Raises UntraceableError where it cannot be compiled here.
        """
        compiled = _compiled(self.source)
        low, high = np.uint32(first & 0xFFFFFFFF), np.uint32(first >> 32)
        try:
            compiled(inputs[0].size, low, high, *self.numbers, *inputs, *out)
        except _compiler_errors() as error:
            raise UntraceableError(f"numba cannot compile the loop: {error}") from error


def traced(
    function: Callable[..., Sequence[Any]], dtypes: Sequence[np.dtype[Any]], kind: str
) -> Loop:
    """`function(symbols, index, index_high)` -> arrays, as a loop; raises UntraceableError.

    kind "store": the arrays are written out. "sum": each is summed over LANES lanes into float64
    [LANES]. "count": each (uint32) is counted into int64 [BINS]; values from BINS on are left out.
    index: uint32 number of the element, modulo 2**32; index_high: what is above, of the first element.
    """
    trace = _Trace()
    symbols = [Symbol(trace, f"x{i}[i]", dtype) for i, dtype in enumerate(dtypes)]
    loaded = [trace.emit(symbol.name, symbol.dtype) for symbol in symbols]
    index = trace.emit("np.uint32(first + np.uint32(i))", np.dtype(np.uint32))
    results = function(loaded, index, Symbol(trace, "first_high", np.dtype(np.uint32)))
    if not all(isinstance(result, Symbol) for result in results):
        raise UntraceableError("a result that does not depend on the inputs")
    source = _source(trace, results, len(dtypes), kind)
    numbers = tuple(np.array(trace.numbers[k], dtype=k) for k in ("f4", "f8", "u4"))
    return Loop(source, numbers, tuple(r.dtype for r in results))


def _source(trace: _Trace, results: Sequence[Symbol], inputs: int, kind: str) -> str:
    arrays = [f"x{i}" for i in range(inputs)] + [f"out{i}" for i in range(len(results))]
    head = [f"def loop(n, first, first_high, f4, f8, u4, {', '.join(arrays)}):"]
    head += [
        f"    {k}_{i} = {k}[{i}]" for k, known in trace.numbers.items() for i in range(len(known))
    ]
    body = _BODIES[kind](trace.lines, [result.name for result in results])
    return "\n".join(["import numpy as np", "", "", *head, *("    " + line for line in body), ""])


def _indented(lines: Sequence[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


def _store_body(lines: Sequence[str], results: Sequence[str]) -> list[str]:
    stores = [f"out{i}[i] = {name}" for i, name in enumerate(results)]
    return ["for i in range(n):", *_indented([*lines, *stores], 1)]


def _sum_body(lines: Sequence[str], results: Sequence[str]) -> list[str]:
    adds = [f"out{i}[j] += {name}" for i, name in enumerate(results)]
    inner = ["i = np.uintp(start) + np.uintp(j)", *lines, *adds]
    return [
        f"for start in range(0, n, {LANES}):",
        f"    if start + {LANES} <= n:",
        f"        for j in range({LANES}):",
        *_indented(inner, 3),
        "    else:",
        "        for j in range(n - start):",
        *_indented(inner, 3),
    ]


def _count_body(lines: Sequence[str], results: Sequence[str]) -> list[str]:
    out: list[str] = [f"bins{i} = np.empty({CHUNK}, np.uint32)" for i in range(len(results))]
    stores = [f"bins{i}[j] = {name}" for i, name in enumerate(results)]
    out += [
        f"for start in range(0, n, {CHUNK}):",
        f"    end = min({CHUNK}, n - start)",
        "    for j in range(end):",
        *_indented(["i = np.uintp(start) + np.uintp(j)", *lines, *stores], 2),
    ]
    for i in range(len(results)):
        out += [
            "    for j in range(end):",
            f"        if bins{i}[j] < {BINS}:",
            f"            out{i}[bins{i}[j]] += 1",
        ]
    return out


_BODIES = {"store": _store_body, "sum": _sum_body, "count": _count_body}

_loops: dict[str, Any] = {}
_compiling = threading.Lock()


def available() -> bool:
    """Whether loops can be compiled here."""
    return importlib.util.find_spec("numba") is not None


def _compiled(source: str) -> Any:
    """The loop of `source`, compiled for the types of its first call; once per process."""
    found = _loops.get(source)
    if found is not None:
        return found
    with _compiling:
        if source not in _loops:
            try:
                _loops[source] = _compile(source)
            except (ImportError, OSError, RuntimeError) as error:
                raise UntraceableError(f"numba does not work here: {error}") from error
    return _loops[source]


def _compile(source: str) -> Any:
    import llvmlite.binding
    import numba

    if not _loops:  # more models than 8 would not be vectorised for fear of overlapping arrays
        llvmlite.binding.set_option("mergetool", "-runtime-memory-check-threshold=256")
    options: Any = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    file = _cached_source(source)
    if file is None:
        scope: dict[str, Any] = {}
        exec(compile(source, "<merge loop>", "exec"), scope)
        return numba.njit(**options)(scope["loop"])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # numba finds the loop again by this name
    spec.loader.exec_module(module)
    return numba.njit(cache=True, **options)(module.loop)


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What compiling, and keeping the result on a full or locked disk, can raise."""
    from numba.core.errors import NumbaError

    return (NumbaError, OSError, RuntimeError)


def _cached_source(source: str) -> Path | None:
    """The file of `source` in the user's cache, beside which numba keeps the machine code."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    file = (
        home / "mergetool" / "loops" / f"loop_{hashlib.sha256(source.encode()).hexdigest()[:24]}.py"
    )
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.is_file() or file.read_text() != source:
            handle, temporary = tempfile.mkstemp(dir=file.parent)
            with os.fdopen(handle, "w") as stream:
                stream.write(source)
            Path(temporary).replace(file)
        return file
    return None
