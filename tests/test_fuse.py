"""A compiled loop gives the bits of the numpy function that it was traced from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from merge.formula import _REDUCED, _GrainFunction
from merge.fuse import Loop, UntraceableError, traced
from merge.nest import LANES, ROW_LANES

RNG = np.random.default_rng(0)
A = RNG.standard_normal((50, 77), dtype=np.float32)
B = RNG.standard_normal((50, 77), dtype=np.float32)
B[0, :9] = [0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, 1.0, 2.0]
A[0, :9] = [0.0, 0.0, 1e-45, 1e-45, 3e38, 3e38, 1.0, -1.0, 0.5]

EXPRESSIONS: dict[str, Callable[[Any, Any], Any]] = {
    "arithmetic": lambda a, b: (a + b) * 0.3 - a / (np.abs(b) + 1.0),
    "comparison": lambda a, b: a * (a > b) + b * (a <= b),
    "masks": lambda a, b: ((a > 0) & (b > 0) | ~(a < 0)).astype(np.float32),
    "bits": lambda a, b: (a.view(np.uint32) ^ b.view(np.uint32)) >> 3,
    "wrapping": lambda a, b: a.view(np.uint32) * 0x9E3779B9 + b.view(np.uint32),
    "narrowing": lambda a, b: (a.view(np.uint32) >> 16).astype(np.uint16),
    "double": lambda a, b: a.astype(np.float64) * b.astype(np.float64),
    "negative": lambda a, b: -a,
    "choice": lambda a, b: np.where(a > b, a, np.where(b > 1.0, 1.0, b)),
    "64 bits": lambda a, b: ((a.astype(np.float64).view(np.uint64) + 3) << 2).view(np.float64),
    "thresholds": lambda a, b: a * (np.abs(a) >= np.float32(0.5)),
}


def _run_loop(loop: Loop, kind: str, raws: list[Any], first: int) -> list[Any]:
    return _GrainFunction(lambda *_: [], kind, loop, True).by_loop((raws, first))[0]


def in_place(a: Any, b: Any) -> Any:
    total = a * 2.0
    total += b
    total /= 3.0
    return total


@pytest.mark.parametrize("name", [*EXPRESSIONS, "in_place"])
@pytest.mark.parametrize("size", [1, 7, 77 * 50])
def test_stored_results_are_numpys(name: str, size: int) -> None:
    function = EXPRESSIONS.get(name, in_place)
    a, b = A.reshape(1, -1)[:, :size], B.reshape(1, -1)[:, :size]
    loop = traced(lambda x, index, high: [function(*x)], [a.dtype, b.dtype], "store")
    with np.errstate(all="ignore"):
        expected = function(a, b)
    found = _run_loop(loop, "store", [a, b], 0)[0]
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [1, LANES - 1, LANES, LANES + 1, 77 * 50])
def test_sums_and_counts_are_numpys(size: int) -> None:
    a = A.reshape(1, -1)[:, :size]

    def squares(x: Sequence[Any], *_: Any) -> list[Any]:
        return [x[0].astype(np.float64) * x[0].astype(np.float64), x[0].astype(np.float64)]

    def tops(x: Sequence[Any], *_: Any) -> list[Any]:
        return [x[0].view(np.uint32) >> 15, x[0].view(np.uint32) >> 16]

    for kind, function in (("sum", squares), ("count", tops)):
        found = _run_loop(traced(function, [a.dtype], kind), kind, [a], 0)
        expected = [_REDUCED[kind](v) for v in function([a])]
        assert all(f.tobytes() == e.tobytes() for f, e in zip(found, expected, strict=True))
    assert (
        sum(c.sum() for c in _run_loop(traced(tops, [a.dtype], "count"), "count", [a], 0))
        <= 2 * a.size
    )


@pytest.mark.parametrize("cols", [1, 2, 5, ROW_LANES - 1, ROW_LANES, ROW_LANES + 1, 77 * 50])
def test_sums_of_rows_are_numpys_and_sums(cols: int) -> None:
    a, b = (x.reshape(-1)[: x.size // cols * cols].reshape(-1, cols) for x in (A, B))

    def terms(x: Sequence[Any], *_: Any) -> list[Any]:
        wide = [v.astype(np.float64) for v in x]
        return [wide[0] * 0.1, wide[0] * wide[1]]

    found = _run_loop(traced(terms, [a.dtype, b.dtype], "rows"), "rows", [a, b], 0)
    for sums, values in zip(found, terms([a, b]), strict=True):
        assert sums.tobytes() == _REDUCED["rows"](values).tobytes()
        exact = np.array([math.fsum(row) for row in values.tolist()])
        # each of at most cols additions rounds a sum no larger than that of the magnitudes
        assert (np.abs(sums - exact) <= cols * 2.0**-53 * np.abs(values).sum(axis=1)).all()


def test_element_numbers_run_on() -> None:
    loop = traced(lambda x, index, high: [index + 0], [np.dtype(np.float32)], "store")
    found = _run_loop(loop, "store", [A], 2**32 - 5)[0]
    assert found.ravel()[:7].tolist() == [2**32 - 5 + i for i in range(5)] + [0, 1]


def test_numbers_are_arguments_of_one_loop() -> None:
    one, other = (traced(lambda x, i, h, w=w: [x[0] * w], [A.dtype], "store") for w in (0.25, 0.75))
    assert one.source == other.source
    assert one.numbers[0] == 0.25
    assert other.numbers[0] == 0.75


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(),
        lambda x: np.sort(x),
        lambda x: x[x > 0],
        lambda x: x if x > 0 else -x,
        lambda x: np.exp(x),
        lambda x: np.where(x > 0),
        lambda x: np.cumsum(x),
        lambda x: x * np.ones(3, np.float32),
        lambda x: np.add.reduce(x),
        lambda x: np.float32(1.0),
    ],
    ids=[
        "sum",
        "sort",
        "index",
        "branch",
        "exp",
        "positions",
        "cumsum",
        "array",
        "reduce",
        "constant",
    ],
)
def test_what_is_not_element_wise_is_refused(function: Callable[[Any], Any]) -> None:
    with pytest.raises((UntraceableError, TypeError)):
        traced(lambda x, index, high: [function(x[0])], [A.dtype], "store")


def test_a_loop_that_disagrees_with_numpy_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    wrong = traced(lambda x, index, high: [x[0] * 3.0 - 7.0], [A.dtype], "store")
    function = _GrainFunction(lambda raws, counter: [raws[0] * 2.0], "store", wrong, True)
    for _ in range(2):
        assert np.array_equal(function(([A[1:]], 0))[0][0], A[1:] * 2.0)
    assert "other bits" in caplog.text


def test_a_loop_that_does_not_compile_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    broken = traced(lambda x, index, high: [x[0] * 5.0 - 8.0], [A.dtype], "store")
    source = broken.source.replace("%f4_0\n", "%no_such_name\n")
    broken = replace(broken, source=source)
    function = _GrainFunction(lambda raws, counter: [raws[0] * 2.0], "store", broken, True)
    assert np.array_equal(function(([A[1:]], 0))[0][0], A[1:] * 2.0)
    assert "without compiled loops" in caplog.text


RESULTS: dict[str, Callable[[Any], Any]] = {
    "store": lambda x: x * 0.5,
    "sum": lambda x: x.astype(np.float64),
    "rows": lambda x: x.astype(np.float64),
    "count": lambda x: x.view(np.uint32),
}


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("value", [0.0, -2.5, np.inf, -np.inf, np.nan])
def test_a_loop_tells_the_largest_magnitude_of_inputs_and_of_what_it_stores(
    value: float, kind: str
) -> None:
    x = np.full(77, 0.5, np.float32)
    y = x.copy()
    y[70] = value
    loop = traced(lambda v, index, high: [RESULTS[kind](v[0])], [x.dtype, x.dtype], kind)
    for cols in (1, 7, 77):
        largest = loop.run(0, [x, y], loop.room(77, cols), cols)
        seen = [x, y, *([x * np.float32(0.5)] if kind == "store" else [])]
        assert largest.tolist() == [np.abs(a).view(np.uint32).max() for a in seen]


@pytest.mark.parametrize("kind", ["store", "count"])
@pytest.mark.parametrize("shape", [(3850, 1), (770, 5), (50, 77), (1, 3850)])
def test_numbers_of_rows_are_numpys_repeated_along_them(kind: str, shape: tuple[int, int]) -> None:
    numbers = RNG.standard_normal((shape[0], 1), dtype=np.float32)

    def scaled(x: Sequence[Any], *_: Any) -> list[Any]:
        return [(x[0] * x[1]).view(np.uint32) >> 8 if kind == "count" else x[0] * x[1]]

    loop = traced(scaled, [A.dtype, numbers.dtype], kind, by_row=1)
    found = _run_loop(loop, kind, [A.reshape(shape), numbers], 0)[0]
    with np.errstate(over="ignore"):
        expected = _REDUCED[kind](scaled([A.reshape(shape), numbers])[0])
    assert found.tobytes() == expected.tobytes()


def test_grains_at_once_have_the_sums_that_each_has_alone() -> None:
    x = RNG.standard_normal((5, 200_000), dtype=np.float32)  # a row is a grain
    loop = traced(lambda v, index, high: [v[0].astype(np.float64)], [x.dtype], "sum")
    (at_once,) = _run_loop(loop, "sum", [x], 0)
    for i in range(5):
        assert at_once[i].tobytes() == _run_loop(loop, "sum", [x[i : i + 1]], 0)[0].tobytes()


def test_sums_of_anything_but_float64_are_refused() -> None:
    with pytest.raises(UntraceableError, match="a sum of float32"):
        traced(lambda x, index, high: [x[0] * 2.0], [A.dtype], "sum")


def test_a_loop_that_sees_no_infinities_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    blind = traced(lambda x, index, high: [x[0] * 2.0], [A.dtype], "store")
    source = blind.source.replace("and i32 %bits0, 2147483647", "and i32 %bits0, 8388607")
    assert source != blind.source
    blind = replace(blind, source=source)
    function = _GrainFunction(lambda raws, counter: [raws[0] * 2.0], "store", blind, True)
    for _ in range(2):
        assert not function(([A[1:]], 0))[1]
    assert "other bits" in caplog.text


def test_shifting_out_every_bit_leaves_zero() -> None:
    for by in (31, 32, 40):
        loop = traced(
            lambda x, index, high, by=by: [x[0] >> np.uint32(by), x[0] << np.uint32(by)],
            [np.dtype(np.uint32)],
            "store",
        )
        x = np.array([[0xFFFFFFFF, 1]], np.uint32)
        found = _run_loop(loop, "store", [x], 0)
        assert found[0].tolist() == (x >> np.uint32(by)).tolist()
        assert found[1].tolist() == (x << np.uint32(by)).tolist()
