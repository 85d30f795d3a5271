"""Factors of experts side by side, read by rows: what they are, of the same bits however they are read."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from merge.experts.lora.factors import Layer, Update, source_of, stacked
from merge.numerics import grains
from merge.sources import Source, TensorInfo
from merge.sources.lora import Product

Values = dict[str, NDArray[np.float32]]


def source(values: Values) -> Source:
    def read(name: str, first: int, end: int, out: memoryview) -> None:
        rows = values[name].reshape(len(values[name]), -1)[first:end]
        np.frombuffer(out, "<f4").reshape(rows.shape)[:] = rows

    return Source({n: TensorInfo("F32", v.shape, file="here") for n, v in values.items()}, read)


def layer(
    outs: int, ins: int, ranks: dict[int, int], *, dora: tuple[int, ...] = (), experts: int = 4,
    transposed: bool = False,
) -> tuple[Layer, Values, dict[int, Values]]:  # fmt: skip
    """A layer, its weight, and what each expert's adapter holds."""
    random = np.random.default_rng(3)

    def draw(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape).astype("f4")

    base = {"w": draw(ins, outs) if transposed else draw(outs, ins)}
    held = {
        i: {"a": draw(rank, ins), "b": draw(outs, rank), "m": draw(outs)}
        for i, rank in ranks.items()
    }
    updates = {
        i: Update(source(held[i]), Product("a", "b", 0.5 + i, transposed, "m" if i in dora else ""))
        for i in ranks
    }
    return Layer("x", "w", source(base), updates, experts), base, held


def whole(found: Source, name: str) -> NDArray[np.float32]:
    return found.rows(name, 0, found.tensors[name].rows)


def stretch(weight: NDArray[Any], held: Values, scale: float) -> NDArray[np.float64]:
    changed = weight + scale * held["b"].astype("f8") @ held["a"].astype("f8")
    norms: NDArray[np.float64] = np.linalg.norm(changed, axis=1)
    return held["m"] / norms


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_stand_side_by_side(transposed: bool) -> None:
    made, base, held = layer(6, 5, {0: 2, 2: 3}, dora=(2,), transposed=transposed)
    found = source_of([made])
    assert made.ranks == [2, 0, 3, 0]
    assert {n: i.shape for n, i in found.tensors.items()} == {
        "x.lora_A": (5, 5), "x.lora_B": (6, 5), "x.dora": (4, 6),
    }  # fmt: skip
    weight = base["w"].T if transposed else base["w"]
    c = stretch(weight, held[2], 2.5)
    np.testing.assert_array_equal(whole(found, "x.lora_A"), np.vstack([held[0]["a"], held[2]["a"]]))
    wanted = np.hstack([0.5 * held[0]["b"], 2.5 * c[:, None] * held[2]["b"]])
    np.testing.assert_allclose(whole(found, "x.lora_B"), wanted, rtol=1e-6)
    rows = whole(found, "x.dora")
    np.testing.assert_allclose(rows[2], c - 1, rtol=1e-6, atol=1e-7)
    assert not rows[[0, 1, 3]].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_bits_do_not_depend_on_what_is_read_at_once(transposed: bool) -> None:
    ranks = {0: 70, 1: 130, 3: 150}
    made, _, _ = layer(1500, 800, ranks, dora=(1, 3), transposed=transposed)
    found = source_of([made])
    for name, info in found.tensors.items():
        pieces = list(grains(info.shape))
        assert len(pieces) > 1 or name == "x.dora"
        parts = np.concatenate([found.rows(name, *piece) for piece in pieces])
        assert parts.tobytes() == whole(found, name).tobytes(), name


def test_memory_does_not_grow_with_the_number_of_experts() -> None:
    peaks, told = [], []
    for count in (4, 24):
        made, _, _ = layer(
            2048, 512, dict.fromkeys(range(count), 16), dora=tuple(range(count)), experts=count
        )
        found = source_of([made])
        info = found.tensors["x.lora_B"]
        first, end = next(iter(grains(info.shape)))
        out = np.empty((end - first, info.cols), "f4")
        tracemalloc.start()
        found.read("x.lora_B", first, end, out.reshape(-1).view("u1").data)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        told.append(found.scratch("x.lora_B", end - first))
    assert peaks[1] <= 1.1 * peaks[0]
    assert told[1] <= 1.1 * told[0]
    assert all(peak <= most for peak, most in zip(peaks, told, strict=True))


def test_layers_that_read_one_vector_are_one() -> None:
    one, _, _ = layer(6, 5, {0: 2})
    two, _, _ = layer(3, 5, {0: 4})
    parts = [each.updates[0].factors() for each in (one, two)]
    both = stacked(parts)
    b, a = both.load()
    pairs = [part.load() for part in parts]
    assert both.rank == 6
    np.testing.assert_allclose(b @ a, np.vstack([b @ a for b, a in pairs]), rtol=1e-5, atol=1e-5)
