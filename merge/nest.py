"""The text of a compiled loop, in LLVM's language: rows, parts of a row, elements of a part.

What is done for one element is given as lines; they find it at %i, as number %j of its part and in row
%row. What becomes of the results is the kind of the loop (see fuse.traced).
"""

from collections.abc import Sequence
from dataclasses import dataclass

LANES = 1024  # partial sums of a grain: element i is added to lane i % LANES
BINS = 1 << 16  # a count statistic has so many bins; larger values are not counted
ROW_LANES = 64  # of a row: element i is added to lane i % ROW_LANES
CHUNK = 2048  # elements whose bins are computed before they are counted
_UNSIGNED = {"float": "i32", "double": "i64"}
_DECLARATIONS = [
    f"declare {t} @llvm.{name}.{f}({t})"
    for name in ("fabs", "sqrt")
    for t, f in (("float", "f32"), ("double", "f64"))
] + [f"declare i{bits} @llvm.umax.i{bits}(i{bits}, i{bits})" for bits in (16, 32, 64)]


@dataclass(frozen=True)
class Value:
    """The name of a value of the loop and its type, as LLVM writes both."""

    type: str
    name: str

    def __str__(self) -> str:
        return f"{self.type} {self.name}"


@dataclass(frozen=True)
class _Kind:
    """What surrounds the lines of an element, from the outermost on, and how many elements a part has."""

    part: str = "%cols"
    room: Sequence[str] = ()
    row: Sequence[str] = ()
    element: Sequence[str] = ()
    after_part: Sequence[str] = ()
    after_row: Sequence[str] = ("br label %row_done",)


def text(
    kind: str,
    numbers: Sequence[tuple[str, str, int]],
    inputs: int,
    of_row: Sequence[str],
    element: Sequence[str],
    watched: Sequence[Value],
    results: Sequence[Value],
) -> str:
    """A function loop(elements, those of a row, number of the first, its high part, places in memory).

    numbers: name, type and count of each array of numbers that the lines use as %NAME_0 and so on. inputs:
    arrays %x0 and so on. of_row: lines of a row; element: of an element. watched: values of which the
    largest bits without sign, of all elements, are written to %largest. The places are those of numbers,
    inputs, results (%out0 and so on) and %largest.
    """
    shape = _KINDS[kind](results)
    places = [name for name, _, _ in numbers] + [f"x{i}" for i in range(inputs)]
    places += [*(f"out{i}" for i in range(len(results))), "largest"]
    arguments = ", ".join(f"ptr noalias %{name}" for name in places)
    return "\n".join([
        f"define void @loop(i64 %n, i64 %cols, i32 %first, i32 %high, {arguments}) {{",
        "entry:",
        *(line for name, t, count in numbers for i in range(count) for line in load(
            f"%{name}_{i}", t, f"%{name}", str(i))),
        *shape.room,
        *(line for i, value in enumerate(watched) for line in _unseen(i, value)),
        "%n_some = icmp sgt i64 %n, 0",
        "br i1 %n_some, label %new_row, label %done",
        "new_row:",
        "%row = phi i64 [ 0, %entry ], [ %row_next, %row_done ]",
        "%at = phi i64 [ 0, %entry ], [ %end, %row_done ]",
        "%whole_row = add i64 %at, %cols",
        "%end = call i64 @llvm.umin.i64(i64 %whole_row, i64 %n)",
        *of_row,
        *shape.row,
        "br label %part",
        "part:",
        "%start = phi i64 [ %at, %new_row ], [ %start_next, %part_done ]",
        "%left = sub i64 %end, %start",
        f"%count = call i64 @llvm.umin.i64(i64 %left, i64 {shape.part})",
        "br label %inner",
        "inner:",
        "%j = phi i64 [ 0, %part ], [ %j_next, %inner ]",
        "%i = add i64 %start, %j",
        *element,
        *(line for i, value in enumerate(watched) for line in _seen(i, value)),
        *shape.element,
        *_again("inner", "%j", "%count", "filled"),
        "filled:",
        *shape.after_part,
        "br label %part_done",
        "part_done:",
        f"%start_next = add i64 %start, {shape.part}",
        "%start_more = icmp slt i64 %start_next, %end",
        "br i1 %start_more, label %part, label %summed",
        "summed:",
        *shape.after_row,
        "row_done:",
        "%row_next = add i64 %row, 1",
        "%row_more = icmp slt i64 %end, %n",
        "br i1 %row_more, label %new_row, label %done",
        "done:",
        *(line for i, value in enumerate(watched) for line in _told(i, value)),
        "ret void",
        "}",
        *_DECLARATIONS,
        "declare i64 @llvm.umin.i64(i64, i64)",
        "",
    ])  # fmt: skip


def load(name: str, t: str, array: str, at: str) -> list[str]:
    """`name`: the value at a place of an array."""
    return [
        f"{name}_at = getelementptr {t}, ptr {array}, i64 {at}",
        f"{name} = load {t}, ptr {name}_at",
    ]


# -- the largest magnitudes ------------------------------------------------------------------------


def _unseen(i: int, value: Value) -> list[str]:
    """Variables, which LLVM keeps in registers."""
    bits = _UNSIGNED.get(value.type, value.type)
    return [f"%most{i} = alloca {bits}", f"store {bits} 0, ptr %most{i}"]


def _seen(i: int, value: Value) -> list[str]:
    bits = _UNSIGNED.get(value.type, value.type)
    lines, name = [], value.name
    if bits != value.type:
        lines, name = [f"%bits{i} = bitcast {value} to {bits}"], f"%bits{i}"
    return [
        *lines,
        f"%magnitude{i} = and {bits} {name}, {(1 << int(bits[1:]) - 1) - 1}",
        f"%before{i} = load {bits}, ptr %most{i}",
        f"%now{i} = call {bits} @llvm.umax.{bits}({bits} %before{i}, {bits} %magnitude{i})",
        f"store {bits} %now{i}, ptr %most{i}",
    ]


def _told(i: int, value: Value) -> list[str]:
    bits = _UNSIGNED.get(value.type, value.type)
    lines, name = [f"%last{i} = load {bits}, ptr %most{i}"], f"%last{i}"
    if bits != "i64":
        lines, name = [*lines, f"%wide{i} = zext {bits} %last{i} to i64"], f"%wide{i}"
    return [*lines, *_store(f"%told{i}", Value("i64", name), "%largest", str(i))]


# -- the kinds -------------------------------------------------------------------------------------


def _storing(results: Sequence[Value]) -> _Kind:
    """Each element of a result at its place."""
    lines = [_store(f"%o{i}", value, f"%out{i}", "%i") for i, value in enumerate(results)]
    return _Kind(element=[line for each in lines for line in each])


def _summing(results: Sequence[Value]) -> _Kind:
    """LANES elements of a grain at a time, each added to its lane; `cols` are the elements of a grain."""
    lanes = [f"%lanes{i}" for i in range(len(results))]
    row = [f"%row_lanes = mul i64 %row, {LANES}"]
    row += [f"{a} = getelementptr double, ptr %out{i}, i64 %row_lanes" for i, a in enumerate(lanes)]
    return _Kind(str(LANES), row=row, element=_to_lanes(results, lanes))


def _summing_rows(results: Sequence[Value]) -> _Kind:
    """ROW_LANES elements of a row at a time, each added to its lane; then the lanes are halved."""
    lanes = [f"%lanes{i}" for i in range(len(results))]
    totals: list[str] = []
    for i, array in enumerate(lanes):
        totals += [f"%total{i} = load double, ptr {array}"]
        totals += _store(f"%o{i}", Value("double", f"%total{i}"), f"%out{i}", "%row")
    return _Kind(
        str(ROW_LANES),
        room=[
            *(f"{array} = alloca double, i64 {ROW_LANES}" for array in lanes),
            f"%width = call i64 @llvm.umin.i64(i64 %cols, i64 {ROW_LANES})",
        ],
        row=[f"store [{ROW_LANES} x double] zeroinitializer, ptr {array}" for array in lanes],
        element=_to_lanes(results, lanes),
        after_row=[
            "br label %halve",
            *_halved(lanes),
            "halves_done:",
            *totals,
            "br label %row_done",
        ],
    )


def _counting(results: Sequence[Value]) -> _Kind:
    """CHUNK elements at a time: their bins, then one more in each bin."""
    element: list[str] = []
    after: list[str] = []
    for i, value in enumerate(results):
        element += _store(f"%b{i}", value, f"%bins{i}", "%j")
        after += [
            f"br label %count{i}",
            f"count{i}:",
            f"%k{i} = phi i64 [ 0, %{f'counted{i - 1}' if i else 'filled'} ], [ %k{i}_next, %next{i} ]",
            *load(f"%bin{i}", "i32", f"%bins{i}", f"%k{i}"),
            f"%known{i} = icmp ult i32 %bin{i}, {BINS}",
            f"br i1 %known{i}, label %add{i}, label %next{i}",
            f"add{i}:",
            f"%place{i} = zext i32 %bin{i} to i64",
            *load(f"%seen{i}", "i64", f"%out{i}", f"%place{i}"),
            f"%one_more{i} = add i64 %seen{i}, 1",
            f"store i64 %one_more{i}, ptr %seen{i}_at",
            f"br label %next{i}",
            f"next{i}:",
            *_again(f"count{i}", f"%k{i}", "%count", f"counted{i}"),
            f"counted{i}:",
        ]
    room = [f"%bins{i} = alloca i32, i64 {CHUNK}" for i in range(len(results))]
    return _Kind(str(CHUNK), room=room, element=element, after_part=after)


_KINDS = {
    "store": _storing,
    "sum": _summing,
    "rows": _summing_rows,
    "count": _counting,
}  # fmt: skip


def _to_lanes(results: Sequence[Value], lanes: Sequence[str]) -> list[str]:
    """Element %j of a part, added to number %j of `lanes` (float64 arrays)."""
    lines: list[str] = []
    for i, (value, array) in enumerate(zip(results, lanes, strict=True)):
        lines += _plus(f"%sum{i}", array, "%j", value.name)
    return lines


def _halved(lanes: Sequence[str]) -> list[str]:
    """The first %width lanes added up into number 0, from block halve on to block halves_done."""
    lines = ["%other = add i64 %k, %half"]
    for i, array in enumerate(lanes):
        lines += load(f"%right{i}", "double", array, "%other")
        lines += _plus(f"%left{i}", array, "%k", f"%right{i}")
    return [
        "halve:",
        "%alive = phi i64 [ %width, %summed ], [ %half, %halved ]",
        "%rounded = add i64 %alive, 1",
        "%half = lshr i64 %rounded, 1",
        "%pairs = sub i64 %alive, %half",
        "%k_some = icmp sgt i64 %alive, 1",
        "br i1 %k_some, label %pair, label %halves_done",
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
        *load(name, "double", array, at),
        f"{name}_more = fadd double {name}, {value}",
        f"store double {name}_more, ptr {name}_at",
    ]


def _again(label: str, name: str, end: str, after: str) -> list[str]:
    return [
        f"{name}_next = add i64 {name}, 1",
        f"{name}_more = icmp slt i64 {name}_next, {end}",
        f"br i1 {name}_more, label %{label}, label %{after}",
    ]


def _store(name: str, value: Value, array: str, at: str) -> list[str]:
    """`value` at its place of an array."""
    return [
        f"{name} = getelementptr {value.type}, ptr {array}, i64 {at}",
        f"store {value}, ptr {name}",
    ]
