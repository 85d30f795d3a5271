"""Laws of factors: nearly as good as the singular value decomposition allows, and honest about it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from merge.lowrank import Factors, factors_of_product, factors_of_rows
from merge.numerics import grain_rows

SHAPES = [(90, 20), (20, 90), (90, 70), (70, 90), (400, 60), (1, 9), (9, 1)]
SPECTRA: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "falling": lambda n: 1 / (n + 1.0),
    "planted": lambda n: np.where(n < 5, 1.0, 0.01),
    "of rank 3": lambda n: np.where(n < 3, 1.0, 0.0),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and subspaces narrower than the matrix, in matrices that a test can decompose."""
    monkeypatch.setattr("merge.numerics.GRAIN_ELEMENTS", 128)
    monkeypatch.setattr("merge.lowrank.EXACT", 24)
    monkeypatch.setattr("merge.lowrank.FIRST_WIDTH", 4)


def matrix(shape: tuple[int, int], spectrum: str) -> NDArray[np.float32]:
    random = np.random.default_rng(shape[0])
    u, _, v = np.linalg.svd(random.standard_normal(shape), full_matrices=False)
    return ((u * SPECTRA[spectrum](np.arange(len(v)))) @ v).astype(np.float32)


def least_errors(d: NDArray[Any]) -> NDArray[Any]:
    """The least relative error that is possible for each rank from 0."""
    squares = np.append(np.cumsum(np.linalg.svd(d.astype(float))[1][::-1] ** 2)[::-1], 0.0)
    return np.sqrt(squares / squares[0])


def measured(d: NDArray[Any], found: Factors) -> float:
    missing = d.astype(float) - found.b.astype(float) @ found.a.astype(float)
    return float(np.linalg.norm(missing) / np.linalg.norm(d.astype(float)))


def of(d: NDArray[np.float32], **wanted: Any) -> Factors:
    grain = grain_rows(d.shape)

    def read(first: int, end: int) -> NDArray[np.float32]:
        assert first % grain == 0
        assert end % grain == 0 or end == len(d)
        return d[first:end]

    return factors_of_rows(read, d.shape, **wanted)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_nearly_the_best_and_their_error_is_measured(
    shape: tuple[int, int], spectrum: str
) -> None:
    """Within a hundredth of the least error: subspace iteration is not run to its end. Below that, the
    factors are rounded to float32, half of 2**-23 each."""
    d = matrix(shape, spectrum)
    least = least_errors(d)
    for rank in (1, 3, 20, 10_000):
        found = of(d, rank=rank)
        kept = min(rank, *shape)
        assert found.b.shape == (shape[0], kept)
        assert found.a.shape == (kept, shape[1])
        assert found.error <= 1.01 * least[kept] + 2**-23
        assert found.error == pytest.approx(measured(d, found), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_an_energy_is_kept_with_the_least_rank(shape: tuple[int, int], energy: float) -> None:
    d = matrix(shape, "falling")
    found = of(d, energy=energy)
    assert found.error <= np.sqrt(1 - energy) + 2**-23
    least = least_errors(d)
    if found.rank > 1 and energy < 1:
        assert least[found.rank - 1] > np.sqrt(1 - energy) * (1 - 1e-3)
    assert of(d, energy=energy, rank=2).rank == min(2, found.rank)


def test_the_same_bits_come_out_for_any_number_of_threads() -> None:
    d = matrix((400, 60), "falling")
    one, three = (of(d, rank=10, threads=threads) for threads in (1, 3))
    assert one.b.tobytes() == three.b.tobytes()
    assert one.a.tobytes() == three.a.tobytes()
    assert one.error == three.error


@pytest.mark.parametrize("wanted", [{"rank": 2}, {"energy": 0.9}])
def test_nothing_has_factors_of_nothing(wanted: dict[str, Any]) -> None:
    found = of(np.zeros((30, 20), np.float32), **wanted)
    assert found.error == 0
    assert not (found.b @ found.a).any()


def pairs() -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    random = np.random.default_rng(5)
    b = [random.standard_normal((60, rank)).astype("<f4") for rank in (4, 7)]
    a = [random.standard_normal((rank, 40)).astype("<f4") for rank in (4, 7)]
    return list(zip(b, a, strict=True))


def test_products_side_by_side_are_their_sum() -> None:
    for wanted in ({}, {"rank": 11}, {"rank": 64}):
        found = factors_of_product(pairs(), **wanted)
        assert found.error == 0
        assert np.array_equal(found.b, np.hstack([b for b, _ in pairs()]))
        assert np.array_equal(found.a, np.vstack([a for _, a in pairs()]))


@pytest.mark.parametrize("wanted", [{"rank": 3}, {"rank": 10}, {"energy": 0.8}, {"energy": 1.0}])
def test_a_sum_of_products_is_cut_at_its_least_singular_values(wanted: dict[str, Any]) -> None:
    """To the rounding of float32 factors, which is all that is missing at full energy."""
    d = sum(b.astype(float) @ a.astype(float) for b, a in pairs())
    found = factors_of_product(pairs(), **wanted)
    assert found.error == pytest.approx(measured(d, found), rel=1e-6, abs=1e-15)
    assert found.error == pytest.approx(least_errors(d)[found.rank], abs=2**-23)
    if "energy" in wanted:
        assert found.error <= np.sqrt(1 - wanted["energy"]) + 2**-23
        assert least_errors(d)[found.rank - 1] > np.sqrt(1 - wanted["energy"])
