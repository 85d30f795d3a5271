"""Plain numpy functions of equal-shaped arrays, compiled into one loop over their elements.

A method is written as numpy expressions over whole arrays, each of which passes over memory once. Here
such a function is called with symbols instead of arrays; what it does to them is written down as the
body of one loop in LLVM's language, which LLVM compiles for this processor (in about a tenth of a
second). The numbers that it uses (weights, thresholds, keys of random numbers) become arguments, so
that one compiled loop serves all tensors. Nothing is reordered or contracted: the loop gives the bits
of the numpy function, 10 times faster where that is bound by memory.

What is not element-wise raises UntraceableError; the caller then keeps to numpy.
"""

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

LANES = 1024  # partial sums of a grain: element i is added to lane i % LANES
BINS = 1 << 16  # a count statistic has so many bins; larger values are not counted
ROW_LANES = 64  # of a row: element i is added to lane i % ROW_LANES
CHUNK = 2048  # elements whose bins are computed before they are counted


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
_DECLARATIONS = [
    f"declare {t} @llvm.{name}.{f}({t})"
    for name in ("fabs", "sqrt")
    for t, f in (("float", "f32"), ("double", "f64"))
] + [f"declare i{bits} @llvm.umax.i{bits}(i{bits}, i{bits})" for bits in (16, 32, 64)]


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
    """A traced function: the text of its loop and the numbers to run it with."""

    source: str
    numbers: tuple[NDArray[Any], ...]
    inputs: tuple[np.dtype[Any], ...]
    outputs: tuple[np.dtype[Any], ...]

    def run(
        self,
        first: int,
        inputs: Sequence[NDArray[Any]],
        out: Sequence[NDArray[Any]],
        cols: int = 1,
    ) -> NDArray[np.uint64]:
        """One pass over `inputs` (flat, equally long); `first`: number of their first element; `cols`:
        elements of a row, where rows matter.

        Of a "store" loop, the result is the largest bits without sign of each input and each output:
        from those of infinity on, it holds an infinity or a NaN. Raises UntraceableError where the loop
        cannot be compiled here.
        """
        arrays = [*self.numbers, *inputs, *out]
        run = compiled(self.source, len(arrays) + 1)
        assert all(array.flags.c_contiguous and array.flags.aligned for array in arrays)
        assert all(array.size == inputs[0].size for array in inputs)
        largest = np.zeros(len(inputs) + len(out), np.uint64)
        places = (array.ctypes.data for array in (*arrays, largest))
        run(inputs[0].size, cols, first & 0xFFFFFFFF, first >> 32, *places)
        return largest


def traced(
    function: Callable[..., Sequence[Any]], dtypes: Sequence[np.dtype[Any]], kind: str
) -> Loop:
    """`function(symbols, index, index_high)` -> arrays, as a loop; raises UntraceableError.

    kind "store": the arrays are written out. "sum": each is summed over LANES lanes into float64
    [LANES]. "rows": each row is summed over ROW_LANES lanes, which numerics.row_sums adds up, into
    float64 [rows]. "count": each (uint32) is counted into int64 [BINS]; values from BINS on are left out.
    index: uint32 number of the element, modulo 2**32; index_high: what is above, of the first element.
    """
    trace, u4 = _Trace(), np.dtype(np.uint32)
    loaded = [Symbol(trace, _load(trace, f"%x{i}", dtype), dtype) for i, dtype in enumerate(dtypes)]
    low = trace.emit("trunc i64 %i to i32", u4)
    index = trace.emit(f"add i32 %first, {low.name}", u4)
    results = function(loaded, index, Symbol(trace, "%high", u4))
    if not all(isinstance(result, Symbol) for result in results):
        raise UntraceableError("a result that does not depend on the inputs")
    numbers = tuple(np.array(trace.numbers[k], dtype=k) for k in ("f4", "f8", "u4"))
    source = _source(trace, loaded, results, kind)
    return Loop(source, numbers, tuple(dtypes), tuple(r.dtype for r in results))


def _load(trace: _Trace, array: str, dtype: "np.dtype[Any]") -> str:
    t = _type(dtype)
    place = trace.emit(f"getelementptr {t}, ptr {array}, i64 %i", dtype)
    return trace.emit(f"load {t}, ptr {place.name}", dtype).name


# -- the text of a loop ----------------------------------------------------------------------------


def _source(trace: _Trace, loaded: Sequence[Symbol], results: Sequence[Symbol], kind: str) -> str:
    """A function of (elements, those of a row, number of the first, its high part, places in memory)."""
    places = ["f4", "f8", "u4", *(f"x{i}" for i in range(len(loaded)))]
    places += [*(f"out{i}" for i in range(len(results))), "largest"]
    arguments = ", ".join(f"ptr noalias %{name}" for name in places)
    lines = [
        f"define void @loop(i64 %n, i64 %cols, i32 %first, i32 %high, {arguments}) {{",
        "entry:",
    ]
    for k, known in trace.numbers.items():
        t = _TYPES[k]
        for i in range(len(known)):
            lines += [f"%{k}_at_{i} = getelementptr {t}, ptr %{k}, i64 {i}"]
            lines += [f"%{k}_{i} = load {t}, ptr %{k}_at_{i}"]
    body = {"store": _store_body, "sum": _sum_body, "rows": _row_body, "count": _count_body}
    lines += [*body[kind](trace, loaded, results), "done:", "ret void", "}"]
    return "\n".join([*lines, *_DECLARATIONS, ""])


def _store_body(trace: _Trace, loaded: Sequence[Symbol], results: Sequence[Symbol]) -> list[str]:
    """All elements in turn; on the way, the largest magnitudes of what is loaded and stored."""
    lines, phis, ends = list(trace.lines), [], []
    for i, result in enumerate(results):
        lines += _store(f"%o{i}", _typed(result), f"%out{i}", "%i")
    for i, symbol in enumerate([*loaded, *results]):
        bits = 8 * symbol.dtype.itemsize
        t, name = f"i{bits}", symbol.name
        if symbol.dtype.kind == "f":
            lines += [f"%bits{i} = bitcast {_typed(symbol)} to {t}"]
            name = f"%bits{i}"
        lines += [f"%magnitude{i} = and {t} {name}, {(1 << bits - 1) - 1}"]
        lines += [f"%now{i} = call {t} @llvm.umax.{t}({t} %before{i}, {t} %magnitude{i})"]
        phis += [f"%before{i} = phi {t} [ 0, %entry ], [ %now{i}, %loop ]"]
        ends += [f"%wide{i} = zext {t} %now{i} to i64"] if bits < 64 else []
        value = f"i64 %wide{i}" if bits < 64 else f"i64 %now{i}"
        ends += _store(f"%l{i}", value, "%largest", str(i))
    return [
        *_counting("loop", "%i", "%n", phis),
        *lines,
        *_again("loop", "%i", "%n", "after"),
        "after:",
        *ends,
        "br label %done",
    ]


def _sum_body(trace: _Trace, loaded: Sequence[Symbol], results: Sequence[Symbol]) -> list[str]:
    """LANES elements at a time, each added to its lane."""
    lanes = [f"%out{i}" for i in range(len(results))]
    return _in_parts(LANES, _to_lanes(trace, results, lanes), [])


def _to_lanes(trace: _Trace, results: Sequence[Symbol], lanes: Sequence[str]) -> list[str]:
    """Element %j of a part, added to number %j of `lanes` (float64 arrays)."""
    lines = ["%i = add i64 %start, %j", *trace.lines]
    for i, (result, array) in enumerate(zip(results, lanes, strict=True)):
        if result.dtype != np.float64:
            raise UntraceableError(f"sums of type {result.dtype}")
        lines += _plus(f"%sum{i}", array, "%j", result.name)
    return lines


def _row_body(trace: _Trace, loaded: Sequence[Symbol], results: Sequence[Symbol]) -> list[str]:
    """ROW_LANES elements of a row at a time, each added to its lane; then the lanes are halved."""
    lanes = [f"%lanes{i}" for i in range(len(results))]
    row = "%row = phi i64 [ 0, %entry ], [ %row_next, %summed ]"
    place = ("%at", "new_row")
    totals: list[str] = []
    for i, array in enumerate(lanes):
        totals += [f"%total{i} = load double, ptr {array}"]
        totals += _store(f"%o{i}", f"double %total{i}", f"%out{i}", "%row")
    return [
        *(f"{array} = alloca double, i64 {ROW_LANES}" for array in lanes),
        f"%narrow = icmp slt i64 %cols, {ROW_LANES}",
        f"%width = select i1 %narrow, i64 %cols, i64 {ROW_LANES}",
        *_counting("new_row", "%at", "%n", [row], "summed"),
        *(f"store [{ROW_LANES} x double] zeroinitializer, ptr {array}" for array in lanes),
        "%end = add i64 %at, %cols",
        "br label %part",
        *_parts(ROW_LANES, _to_lanes(trace, results, lanes), [], place, "%end", "halve"),
        *_halved(lanes),
        "summed:",
        *totals,
        "%row_next = add i64 %row, 1",
        "%at_next = add i64 %at, %cols",
        "%at_more = icmp slt i64 %at_next, %n",
        "br i1 %at_more, label %new_row, label %done",
    ]


def _halved(lanes: Sequence[str]) -> list[str]:
    """The first %width lanes added up into number 0, from block part_done on to block summed."""
    lines = ["%other = add i64 %k, %half"]
    for i, array in enumerate(lanes):
        lines += [f"%q{i} = getelementptr double, ptr {array}, i64 %other"]
        lines += [f"%right{i} = load double, ptr %q{i}"]
        lines += _plus(f"%left{i}", array, "%k", f"%right{i}")
    return [
        "halve:",
        "%alive = phi i64 [ %width, %part_done ], [ %half, %halved ]",
        "%rounded = add i64 %alive, 1",
        "%half = lshr i64 %rounded, 1",
        "%pairs = sub i64 %alive, %half",
        "%k_some = icmp sgt i64 %alive, 1",
        "br i1 %k_some, label %pair, label %summed",
        "pair:",
        "%k = phi i64 [ 0, %halve ], [ %k_next, %pair ]",
        *lines,
        *_again("pair", "%k", "%pairs", "halved"),
        "halved:",
        "br label %halve",
    ]


def _plus(name: str, array: str, at: str, value: str) -> list[str]:
    """`value` added to a place of a float64 array."""
    return [
        f"{name}_at = getelementptr double, ptr {array}, i64 {at}",
        f"{name} = load double, ptr {name}_at",
        f"{name}_more = fadd double {name}, {value}",
        f"store double {name}_more, ptr {name}_at",
    ]


def _count_body(trace: _Trace, loaded: Sequence[Symbol], results: Sequence[Symbol]) -> list[str]:
    """CHUNK elements at a time: their bins, then one more in each bin."""
    lines = ["%i = add i64 %start, %j", *trace.lines]
    counts: list[str] = []
    room = [f"%bins{i} = alloca i32, i64 {CHUNK}" for i in range(len(results))]
    for i, result in enumerate(results):
        if result.dtype != np.uint32:
            raise UntraceableError(f"bins of type {result.dtype}")
        lines += _store(f"%b{i}", _typed(result), f"%bins{i}", "%j")
        counts += [
            f"br label %count{i}",
            f"count{i}:",
            f"%k{i} = phi i64 [ 0, %{f'counted{i - 1}' if i else 'filled'} ], [ %k{i}_next, %next{i} ]",
            f"%q{i} = getelementptr i32, ptr %bins{i}, i64 %k{i}",
            f"%bin{i} = load i32, ptr %q{i}",
            f"%known{i} = icmp ult i32 %bin{i}, {BINS}",
            f"br i1 %known{i}, label %add{i}, label %next{i}",
            f"add{i}:",
            f"%place{i} = zext i32 %bin{i} to i64",
            f"%c{i} = getelementptr i64, ptr %out{i}, i64 %place{i}",
            f"%seen{i} = load i64, ptr %c{i}",
            f"%one_more{i} = add i64 %seen{i}, 1",
            f"store i64 %one_more{i}, ptr %c{i}",
            f"br label %next{i}",
            f"next{i}:",
            *_again(f"count{i}", f"%k{i}", "%count", f"counted{i}"),
            f"counted{i}:",
        ]
    return [*room, *_in_parts(CHUNK, lines, counts)]


def _in_parts(size: int, lines: Sequence[str], then: Sequence[str]) -> list[str]:
    """_parts of all elements."""
    return [
        "%start_some = icmp sgt i64 %n, 0",
        "br i1 %start_some, label %part, label %done",
        *_parts(size, lines, then, ("0", "entry"), "%n", "done"),
    ]


def _parts(
    size: int,
    lines: Sequence[str],
    then: Sequence[str],
    first: tuple[str, str],
    end: str,
    done: str,
) -> list[str]:
    """`lines` for %j below %count, the elements of a part from %start on; `then` after each part.

    From block part on, entered from block first[1], for the elements from first[0] to `end`; then `done`.
    """
    return [
        "part:",
        f"%start = phi i64 [ {first[0]}, %{first[1]} ], [ %start_next, %part_done ]",
        f"%left = sub i64 {end}, %start",
        f"%short = icmp slt i64 %left, {size}",
        f"%count = select i1 %short, i64 %left, i64 {size}",
        "br label %inner",
        "inner:",
        "%j = phi i64 [ 0, %part ], [ %j_next, %inner ]",
        *lines,
        *_again("inner", "%j", "%count", "filled"),
        "filled:",
        *then,
        "br label %part_done",
        "part_done:",
        f"%start_next = add i64 %start, {size}",
        f"%start_more = icmp slt i64 %start_next, {end}",
        f"br i1 %start_more, label %part, label %{done}",
    ]


def _counting(label: str, name: str, end: str, phis: Sequence[str], back: str = "") -> list[str]:
    """The head of a loop with a counter; nothing is done where there is nothing to count."""
    return [
        f"{name}_some = icmp sgt i64 {end}, 0",
        f"br i1 {name}_some, label %{label}, label %done",
        f"{label}:",
        f"{name} = phi i64 [ 0, %entry ], [ {name}_next, %{back or label} ]",
        *phis,
    ]


def _again(label: str, name: str, end: str, after: str) -> list[str]:
    return [
        f"{name}_next = add i64 {name}, 1",
        f"{name}_more = icmp slt i64 {name}_next, {end}",
        f"br i1 {name}_more, label %{label}, label %{after}",
    ]


def _store(name: str, value: str, array: str, at: str) -> list[str]:
    """`value` ("type name") at its place of an array."""
    t = value.split()[0]
    return [f"{name} = getelementptr {t}, ptr {array}, i64 {at}", f"store {value}, ptr {name}"]


# -- compiling -------------------------------------------------------------------------------------

_compiling = threading.Lock()
_loops: dict[str, Callable[..., None]] = {}
_engines: list[Any] = []  # they own the machine code


def available() -> bool:
    """Whether loops can be compiled here."""
    return importlib.util.find_spec("llvmlite") is not None


def compiled(source: str, places: int) -> Callable[..., None]:
    """The loop of `source` as machine code that takes so many places in memory; once per process."""
    found = _loops.get(source)
    if found is not None:
        return found
    with _compiling:
        if source not in _loops:
            try:
                _loops[source] = _compile(source, places)
            except (ImportError, OSError, RuntimeError) as error:
                raise UntraceableError(f"LLVM cannot compile the loop: {error}") from error
    return _loops[source]


def _compile(source: str, places: int) -> Callable[..., None]:
    from llvmlite import binding

    if not _engines:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=_features(), opt=3
    )
    module = binding.parse_assembly(source)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.loop_interleaving = options.loop_unrolling = True
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    numbers = (ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint32)
    of = ctypes.CFUNCTYPE(None, *numbers, *[ctypes.c_void_p] * places)
    return of(engine.get_function_address("loop"))


def _features() -> str:
    """What this processor can do. Registers of 512 bits are used where it has them; LLVM takes halves of
    them, with which arcee_fusion takes 7.0 ns a value, not 5.3."""
    from llvmlite import binding

    found = binding.get_host_cpu_features()
    whole = ",-prefer-256-bit" if found.get("avx512f") else ""
    return f"{found.flatten()}{whole}"
