"""Conversions, sums, random numbers and digests."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from merge.nest import LANES
from merge.numerics import (
    Counter,
    combined_digest,
    exp,
    first_nonfinite,
    from_float32,
    grain_digest,
    grain_rows,
    pairwise,
    random_key,
    row_sums,
    rows_and_cols,
    to_float32,
)

bits32 = hnp.arrays(np.uint32, st.integers(1, 50), elements=st.integers(0, 2**32 - 1))


@given(bits32)
def test_rounding_to_bfloat16_is_torchs(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(from_float32(values, "BF16"), expected)


def test_every_bfloat16_and_float16_is_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        expected = torch.from_numpy(every.view(np.int16).copy()).view(kind).float().numpy()
        raw = every if dtype == "BF16" else every.view(np.float16)
        found = to_float32(raw, dtype)
        finite = ~np.isnan(expected)
        assert np.array_equal(found[finite], expected[finite])
        assert np.isnan(found[~finite]).all()


def test_numpys_nan_survives_rounding() -> None:
    assert np.isnan(to_float32(from_float32(np.array([np.nan], np.float32), "BF16"), "BF16"))[0]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_nonfinite_value_is_found(dtype: str, bad: float) -> None:
    values = np.linspace(-3, 3, 1000, dtype=np.float32).reshape(10, 100)
    raw = values.astype(np.float64) if dtype == "F64" else from_float32(values, dtype)
    assert first_nonfinite(raw, dtype) is None
    values[4, 7] = values[8, 1] = bad
    raw = values.astype(np.float64) if dtype == "F64" else from_float32(values, dtype)
    assert first_nonfinite(raw, dtype) == 407


@given(st.lists(st.integers(0, 10**6), max_size=4))
def test_rows_times_columns_is_the_size_and_grains_are_whole_rows(shape: list[int]) -> None:
    rows, cols = rows_and_cols(shape)
    assert rows * cols == int(np.prod(shape, dtype=object))
    assert grain_rows(shape) >= 1


def test_folding_and_pairwise_sums_are_sums() -> None:
    values = np.arange(LANES, dtype=np.float64)
    assert row_sums(values[None])[0] == values.sum()
    for count in (1, 2, 3, 7, 64):
        assert pairwise([np.array([float(i)]) for i in range(count)])[0] == sum(range(count))


def test_random_numbers_are_uniform_and_unrelated() -> None:
    a = Counter.of(0, (1, 1 << 20)).random(random_key(0, "x", 0))
    b = Counter.of(0, (1, 1 << 20)).random(random_key(0, "x", 1))
    for bit in range(32):
        share = ((a >> bit) & 1).mean()
        assert abs(share - 0.5) < 5 * 0.5 / 2**10  # five standard deviations of 2**20 coins
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / 2**10
    lagged = np.corrcoef(a.ravel()[:-1], a.ravel()[1:])[0, 1]
    assert abs(lagged) < 5 / 2**10
    histogram = np.bincount((a >> 22).ravel(), minlength=1024)
    chi2 = ((histogram - 1024) ** 2 / 1024).sum()
    assert abs(chi2 - 1023) < 5 * np.sqrt(2 * 1023)


def test_random_numbers_depend_on_the_element_alone() -> None:
    key = random_key(3, "tensor", 1)
    whole = Counter.of(0, (8, 100)).random(key)
    assert np.array_equal(whole[3:5], Counter.of(300, (2, 100)).random(key))
    beyond = Counter.of(2**32 + 300, (2, 100)).random(key)
    assert not np.array_equal(whole[3:5], beyond)


def test_keys_are_the_same_everywhere() -> None:
    assert random_key(17, "model.norm.weight", 2) == 0xB33DB67EC19E81D2


def test_digest_changes_with_any_bit() -> None:
    raw = np.arange(1000, dtype=np.uint16)
    before = combined_digest([grain_digest(raw)])
    for position in (0, 500, 999):
        changed = raw.copy()
        changed[position] ^= 1
        assert combined_digest([grain_digest(changed)]) != before


def test_exp_is_within_two_units_of_the_exact_one() -> None:
    x = np.concatenate(
        [np.linspace(-700, 700, 20_001), np.random.default_rng(0).standard_normal(20_000)]
    )
    exact = np.array([math.exp(value) for value in x.tolist()])
    assert np.abs(exp(x) - exact).max() <= 2 * np.spacing(exact).max()
    assert (np.abs(exp(x) - exact) <= 2 * np.spacing(exact)).all()
    assert exp(np.array([0.0])).tolist() == [1.0]


@pytest.mark.parametrize("cols", [1, 2, 3, 1000, 1025])
def test_row_sums_are_sums_of_rows(cols: int) -> None:
    values = np.random.default_rng(cols).standard_normal((7, cols))
    before = values.copy()
    exact = [math.fsum(row) for row in values.tolist()]
    assert np.allclose(row_sums(values), exact, rtol=0, atol=16 * 2.0**-53 * np.sqrt(cols))
    assert np.array_equal(values, before)
    assert row_sums(values).tobytes() == row_sums(np.asfortranarray(values)).tobytes()
