"""Arithmetic that gives the same bits whatever the block size, thread count or order of completion.

Three rules make it so. Everything is computed in float32 by separate element-wise operations and
rounded once, at the end. What is summed over a tensor is summed as integers, or as float64 partial
sums over a *grain* - a run of whole rows that depends on the tensor's shape alone - combined by
pairwise halving. Random numbers are an integer hash of what they are for, never a stateful generator.

bfloat16 has no numpy type: it travels as uint16 and is widened and rounded here.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Array = NDArray[np.float32]
Raw = NDArray[Any]

GRAIN_ELEMENTS = (
    1 << 18
)  # 1 MiB of float32: smaller pays for numpy calls, larger leaves the L2 cache

STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
# bits without sign; those of NaN are larger
INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}


def rows_and_cols(shape: Sequence[int]) -> tuple[int, int]:
    """The two-dimensional view that the engine works on: all but the last axis are rows.

    A vector [n] is n rows of one column, so that it can be split; a scalar is one row of one.
    """
    if len(shape) <= 1:
        return (shape[0] if shape else 1), 1
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    return rows, shape[-1]


def grain_rows(shape: Sequence[int]) -> int:
    """Rows of one grain: about GRAIN_ELEMENTS elements, at least one row; from the shape alone."""
    return max(1, GRAIN_ELEMENTS // max(1, rows_and_cols(shape)[1]))


def grains(
    shape: Sequence[int], first: int = 0, end: int | None = None
) -> Iterator[tuple[int, int]]:
    """(first row, end row) of every grain of a tensor from row `first`, which starts one, to `end`."""
    step, end = grain_rows(shape), rows_and_cols(shape)[0] if end is None else end
    return ((start, min(start + step, end)) for start in range(first, end, step))


def whole_grains(shape: Sequence[int], first: int, end: int) -> tuple[int, int]:
    """The rows of all grains that rows [first, end) lie in."""
    step = grain_rows(shape)
    return first // step * step, min(-(-end // step) * step, rows_and_cols(shape)[0])


def to_float32(raw: Raw, dtype: str) -> Array:
    """`raw`, as stored in `dtype`, widened (float64: rounded) to a float32 array of its own."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def from_float32(value: Array, dtype: str) -> Raw:
    """`value` rounded to nearest even into `dtype`, as stored. A NaN must be numpy's own."""
    if dtype == "BF16":
        bits = value.view(np.uint32)
        return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):  # what overflows is looked for in the result
        return value.astype(STORAGE[dtype], copy=False)


def first_nonfinite(raw: Raw, dtype: str) -> int | None:
    """Position (in row-major order) of the first NaN or infinity, or None."""
    if dtype not in INFINITY or largest_magnitude(raw) < INFINITY[dtype]:
        return None
    bits = raw.view(f"u{raw.itemsize}")
    bad = bits & ((1 << 8 * raw.itemsize - 1) - 1) >= INFINITY[dtype]
    return int(np.argmax(bad.ravel()))


def largest_magnitude(values: Raw) -> int:
    """Bits without the sign of the stored value farthest from zero, as an unsigned integer: the
    largest of the positive ones as signed numbers, of the negative ones as unsigned."""
    if not values.size:
        return 0
    size = values.itemsize
    positive, negative = values.view(f"i{size}").max(), values.view(f"u{size}").max()
    return max(int(positive), int(negative) - (1 << 8 * size - 1))


def vectors(values: Raw) -> Raw:
    """What a row-wise method takes as its vectors, one a row: the rows of a matrix; the values of a
    single column (so the engine sees a tensor [n]) are one vector."""
    return values.reshape(1, -1) if values.shape[1] == 1 else values


def row_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of each row by halving, an order that no machine changes; the odd one out waits a round."""
    while values.shape[1] > 1:
        half = (values.shape[1] + 1) // 2
        left = values[:, :half].copy()
        left[:, : values.shape[1] - half] += values[:, half:]
        values = left
    return values[:, 0]


WHOLE = 1.5 * 2.0**52  # added to a number rounds it to a whole one, in the lowest bits
LN2 = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # log(2); n times the first is exact


def exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e**x for x from -700 to 700, within 2 units in the last place, of the same bits on every machine
    (numpy.exp is another function on another processor): 2**n times a series around 0."""
    shifted = x * (1.0 / math.log(2.0)) + WHOLE
    n = shifted - WHOLE
    rest = x - n * LN2[0]
    rest -= n * LN2[1]
    square = rest * rest
    out = _powers(square, 13)
    out *= rest
    out += _powers(square, 12) * square
    out += 1.0
    out *= ((shifted.view(np.uint64) + 1023) << 52).view(
        np.float64
    )  # the exponent's bits: n + bias
    return out


def _powers(square: NDArray[np.float64], last: int) -> NDArray[np.float64]:
    """The terms x**k / k! of every other power, 1 or 2 to `last`, divided by the first power; from x**2.
    Of odd and of even powers these are two chains, of which none waits for the other."""
    out = square * (1.0 / math.factorial(last))
    out += 1.0 / math.factorial(last - 2)
    for k in range(last - 4, 0, -2):
        out *= square
        out += 1.0 / math.factorial(k)
    return out


def log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive numbers, within 2 units in the last place of the larger of it and 1, of
    the same bits on every machine: 2 artanh((m - 1) / (m + 1)) as a series, m within sqrt(2) of 1."""
    m, exponent = np.frexp(x)
    low = m < math.sqrt(0.5)
    m[low] *= 2.0
    n = exponent - low.astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    out = np.full_like(square, 1.0 / 21.0)
    for k in range(19, 0, -2):
        out *= square
        out += 1.0 / k
    out *= 2.0 * s
    out += n * LN2[1]
    out += n * LN2[0]
    return out


# Wichura's algorithm AS 241 (1988): quotients of polynomials, highest power first, for the middle of the
# normal distribution and for its tails down to 1e-11
MIDDLE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
TAIL = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177,
     1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959,
     1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966,
     0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187,
     1.0),
)  # fmt: skip
NORMAL_BYTES = 48  # alive for each number while they are drawn, with the result; 39 measured


def normal(random: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Standard normal numbers for uniform 32-bit integers, of the same bits on every machine: the inverse
    of the distribution at (random + 1/2) / 2**32, so none is beyond 6.4."""
    chance = random.astype(np.float64)
    chance += 0.5
    chance /= 2.0**32
    out = chance - 0.5
    tail = np.abs(out) > 0.425
    ends = chance[tail]
    np.minimum(ends, 1.0 - ends, out=ends)
    far = np.copysign(_quotient(TAIL, np.sqrt(-log(ends)) - 1.6), out[tail])
    np.multiply(out, out, out=chance)
    np.subtract(0.180625, chance, out=chance)
    out *= _quotient(MIDDLE, chance)
    out[tail] = far
    return out


def _quotient(
    parts: tuple[tuple[float, ...], tuple[float, ...]], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One polynomial of `x` by another."""
    above, below = (np.full_like(x, factors[0]) for factors in parts)
    for out, factors in ((above, parts[0]), (below, parts[1])):
        for factor in factors[1:]:
            out *= x
            out += factor
    above /= below
    return above


def pairwise(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sum of `parts` in an order that depends on their number alone."""
    level = list(parts)
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        level = [a + b for a, b in zip(level[0:-1:2], level[1::2], strict=True)] + odd
    return level[0]


def random_key(*what: str | int) -> int:
    """64 bits that stand for `what` (seed, tensor, model, ...), the same on every machine."""
    text = "\x1f".join(map(str, what)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Counter:
    """Numbers of the elements of a grain: `index` uint32 modulo 2**32, `high` what is above in the
    first of them (in a tensor beyond 2**32 elements a grain may straddle: a few numbers recur)."""

    index: NDArray[np.uint32]
    high: np.uint32

    @classmethod
    def of(cls, first: int, shape: tuple[int, ...]) -> "Counter":
        start = first & 0xFFFFFFFF
        index = np.arange(start, start + shape[0] * shape[1], dtype=np.uint64).astype(np.uint32)
        return cls(index.reshape(shape), np.uint32(first >> 32))

    def random(self, key: int) -> NDArray[np.uint32]:
        """Uniform 32-bit integers of the stream `key`, one per element: the number hashed by
        multiply-xorshift rounds with parts of the key in between."""
        x: Any = self.index ^ np.uint32(key & 0xFFFFFFFF)
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) + (np.uint32(key >> 32) ^ self.high)
        x = (x ^ (x >> 16)) * 0x846CA68B
        x = (x ^ (x >> 15)) * 0x2C1B3C6D
        scrambled: NDArray[np.uint32] = x ^ (x >> 16)
        return scrambled


def grain_digest(raw: Raw) -> bytes:
    """XXH3-128 of the bytes of one grain: a checksum against accidents, at memory speed."""
    return xxhash.xxh3_128_digest(raw.data if raw.flags.c_contiguous else raw.tobytes())


def combined_digest(parts: Iterable[bytes]) -> str:
    """Hexadecimal digest of a tensor from the digests of its grains, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(parts))
