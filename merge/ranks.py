"""Rank of each value by magnitude in its row: a radix sort, compiled, or numpy's sort.

Both give the same bits. Compiled, a value takes 7 ns where numpy takes 40.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from merge.machine import UncompiledError, compiled
from merge.nest import load
from merge.numerics import Array, vectors

DIGIT = 11  # bits; three digits hold the 31 of a magnitude
BINS = 1 << DIGIT
NARROW = 64  # columns: in shorter rows, counting digits takes longer than numpy
_log = logging.getLogger("mergetool")
_making = threading.Lock()


def magnitude_ranks(delta: Array, fuse: bool = False) -> NDArray[np.float64]:
    """Rank of each |value| in its row, 0 for the smallest to 1 for the largest, like `delta`.

    Equal magnitudes share the mean of their ranks; where a row has one value it is 1/2. A column is one
    row. fuse: by the compiled sort, where this machine can make one.
    """
    rows = vectors(delta)
    if rows.shape[1] == 1:
        return np.full(delta.shape, 0.5)
    sort = _sort() if fuse and rows.shape[1] >= NARROW else None
    return (sort or _by_numpy)(rows).reshape(delta.shape)


def _by_numpy(rows: Array) -> NDArray[np.float64]:
    last = rows.shape[1] - 1
    keys = np.abs(rows).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(last + 1, dtype=np.uint64)
    keys.sort(axis=1)  # by magnitude, then by column
    column = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)
    differs = np.diff(keys >> np.uint64(32), axis=1) != 0
    del keys
    place = np.arange(last + 1, dtype=np.int32)
    first, end = np.zeros(rows.shape, np.int32), np.full(rows.shape, last, np.int32)
    first[:, 1:] = place[1:] * differs
    np.maximum.accumulate(first, axis=1, out=first)
    np.copyto(end[:, :-1], place[:-1], where=differs)
    end = np.minimum.accumulate(end[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(rows.shape)
    np.put_along_axis(ranks, column, (first + end) / (2 * last), axis=1)
    return ranks


@cache
def _made() -> Callable[..., None] | None:
    try:
        run = compiled(_source(), 5)
    except UncompiledError as error:
        _log.warning("ranking without a compiled sort: %s", str(error).splitlines()[0])
        return None
    sample = np.resize(
        np.array([0.0, -0.0, 1.0, -1.0, 1e-40, 1e30, 0.5, -2.5], np.float32), (3, 4099)
    )
    sample *= np.resize(np.array([1.0, -1.25, 1e-3, 0.0, 1.0], np.float32), sample.shape)
    if np.array_equal(_sorted_by(run, sample), _by_numpy(sample)):
        return run
    _log.warning("a compiled sort gives other ranks than numpy on this machine; it is not used")
    return None


def _sort() -> Callable[[Array], NDArray[np.float64]] | None:
    """The compiled sort, tried out on a few rows when it is made; None where there is none."""
    with _making:
        run = _made()
    return None if run is None else lambda rows: _sorted_by(run, rows)


def _sorted_by(run: Callable[..., None], rows: Array) -> NDArray[np.float64]:
    rows = np.ascontiguousarray(rows)
    ranks, cols = np.empty(rows.shape), rows.shape[1]
    room = np.empty((2, cols), np.uint64)
    counts = np.empty(3 * BINS, np.uint32)
    places = (array.ctypes.data for array in (rows, ranks, room[0], room[1], counts))
    run(rows.size, cols, 0, 0, *places)
    return ranks


# -- the text of the sort --------------------------------------------------------------------------


def _source() -> str:
    """For each row: its magnitudes' digits are counted; then they are sorted, together with their
    columns, by one digit after the other; then each run of equals is given the mean of its ranks."""
    clear = ["%clear = getelementptr i32, ptr %counts, i64 %bin", "store i32 0, ptr %clear"]
    row = [
        *_each("bin", str(3 * BINS), clear),
        *_each("col", "%cols", _magnitude("col") + [line for d in range(3) for line in _count(d)]),
        *(line for d in range(3) for line in _totals(d)),
        *_each("first", "%cols", [*_magnitude("first"), *_packed(), *_put(0, "%item", "%a")]),
        *_each("second", "%cols", [*load("%from1", "i64", "%a", "%second"), *_put(1, "%from1", "%b")]),
        *_each("third", "%cols", [*load("%from2", "i64", "%b", "%third"), *_put(2, "%from2", "%a")]),
        *_ranked(),
    ]  # fmt: skip
    arguments = "i64 %n, i64 %cols, i32 %_0, i32 %_1" + "".join(
        f", ptr noalias %{name}" for name in ("x", "ranks", "a", "b", "counts")
    )
    counters = ["row", "bin", "col", *(f"sum{d}" for d in range(3)), "first", "second", "third"]
    return "\n".join([
        f"define void @loop({arguments}) {{",
        "entry:",
        *(f"%{name}_now = alloca i64" for name in counters),
        *(f"%before{d} = alloca i32" for d in range(3)),
        "%run_now = alloca i64",
        "%same_now = alloca i64",
        "%rows = udiv i64 %n, %cols",
        "%last = sub i64 %cols, 1",
        "%twice = shl i64 %last, 1",
        "%whole = uitofp i64 %twice to double",
        *_each("row", "%rows", ["%start = mul i64 %row, %cols", *row]),
        "ret void",
        "}",
        "",
    ])  # fmt: skip


def _each(name: str, end: str, body: Sequence[str]) -> list[str]:
    """`body` for %name from 0 to `end`; its counter is a variable that LLVM keeps in a register."""
    return [
        f"store i64 0, ptr %{name}_now",
        f"br label %{name}_head",
        f"{name}_head:",
        f"%{name} = load i64, ptr %{name}_now",
        f"%{name}_some = icmp ult i64 %{name}, {end}",
        f"br i1 %{name}_some, label %{name}_body, label %{name}_end",
        f"{name}_body:",
        *body,
        f"%{name}_next = add i64 %{name}, 1",
        f"store i64 %{name}_next, ptr %{name}_now",
        f"br label %{name}_head",
        f"{name}_end:",
    ]


def _magnitude(at: str) -> list[str]:
    """%at_key: bits without sign of value %at of the row, as i64."""
    return [
        f"%{at}_place = add i64 %start, %{at}",
        *load(f"%{at}_bits", "i32", "%x", f"%{at}_place"),
        f"%{at}_low = and i32 %{at}_bits, {0x7FFFFFFF}",
        f"%{at}_key = zext i32 %{at}_low to i64",
    ]


def _count(digit: int) -> list[str]:
    return [
        *_bin(f"c{digit}", "%col_key", digit * DIGIT, digit),
        f"%c{digit}_more = add i32 %c{digit}, 1",
        f"store i32 %c{digit}_more, ptr %c{digit}_at",
    ]


def _bin(name: str, key: str, shift: int, digit: int) -> list[str]:
    """The count of the digit of `key` that starts at bit `shift`."""
    return [
        f"%{name}_shifted = lshr i64 {key}, {shift}",
        f"%{name}_digit = and i64 %{name}_shifted, {BINS - 1}",
        f"%{name}_bin = add i64 %{name}_digit, {digit * BINS}",
        *load(f"%{name}", "i32", "%counts", f"%{name}_bin"),
    ]


def _totals(digit: int) -> list[str]:
    """Counts of a digit become the places where its values start."""
    name = f"sum{digit}"
    add = [
        f"%{name}_bin = add i64 %{name}, {digit * BINS}",
        *load(f"%{name}_count", "i32", "%counts", f"%{name}_bin"),
        f"%{name}_before = load i32, ptr %before{digit}",
        f"store i32 %{name}_before, ptr %{name}_count_at",
        f"%{name}_after = add i32 %{name}_before, %{name}_count",
        f"store i32 %{name}_after, ptr %before{digit}",
    ]
    return [f"store i32 0, ptr %before{digit}", *_each(name, str(BINS), add)]


def _packed() -> list[str]:
    """%item: the magnitude above, the column below."""
    return ["%high = shl i64 %first_key, 32", "%item = or i64 %high, %first"]


def _put(digit: int, item: str, to: str) -> list[str]:
    """`item` to the next place of its digit."""
    return [
        *_bin(f"p{digit}", item, 32 + digit * DIGIT, digit),
        f"%p{digit}_more = add i32 %p{digit}, 1",
        f"store i32 %p{digit}_more, ptr %p{digit}_at",
        f"%p{digit}_wide = zext i32 %p{digit} to i64",
        f"%p{digit}_to = getelementptr i64, ptr {to}, i64 %p{digit}_wide",
        f"store i64 {item}, ptr %p{digit}_to",
    ]


def _ranked() -> list[str]:
    """From %run on, equal magnitudes as far as %same; then their ranks, each at its column."""
    return [
        "store i64 0, ptr %run_now",
        "br label %run_head",
        "run_head:",
        "%run = load i64, ptr %run_now",
        "%run_some = icmp ult i64 %run, %cols",
        "br i1 %run_some, label %run_body, label %run_end",
        "run_body:",
        *load("%lead", "i64", "%a", "%run"),
        "%lead_key = lshr i64 %lead, 32",
        "store i64 %run, ptr %same_now",
        "br label %same_head",
        "same_head:",
        "%same = load i64, ptr %same_now",
        "%same_next = add i64 %same, 1",
        "store i64 %same_next, ptr %same_now",
        "%same_some = icmp ult i64 %same_next, %cols",
        "br i1 %same_some, label %same_body, label %same_end",
        "same_body:",
        *load("%other", "i64", "%a", "%same_next"),
        "%other_key = lshr i64 %other, 32",
        "%equal = icmp eq i64 %other_key, %lead_key",
        "br i1 %equal, label %same_head, label %same_end",
        "same_end:",
        "%both = add i64 %run, %same",
        "%wide = uitofp i64 %both to double",
        "%rank = fdiv double %wide, %whole",
        "br label %give_head",
        "give_head:",
        "%give = load i64, ptr %run_now",
        "%give_some = icmp ult i64 %give, %same_next",
        "br i1 %give_some, label %give_body, label %run_head",
        "give_body:",
        *load("%given", "i64", "%a", "%give"),
        f"%given_col = and i64 %given, {0xFFFFFFFF}",
        "%given_place = add i64 %start, %given_col",
        "%given_to = getelementptr double, ptr %ranks, i64 %given_place",
        "store double %rank, ptr %given_to",
        "%give_next = add i64 %give, 1",
        "store i64 %give_next, ptr %run_now",
        "br label %give_head",
        "run_end:",
    ]
