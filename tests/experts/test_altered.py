"""Matrices that are made as they are read: any rows are those of the whole; what is random has laws."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from dense_models import LAYERS, written
from hypothesis import given, settings
from hypothesis import strategies as st
from real import saved
from transformers import LlamaConfig

from merge.experts.altered import (
    Beside,
    Columns,
    Making,
    Middle,
    Noisy,
    Redrawn,
    Rows,
    Scaled,
    Stacked,
    Stretch,
    Zeros,
)
from merge.numerics import (
    STORAGE,
    Array,
    Counter,
    from_float32,
    grain_rows,
    log,
    normal,
    random_key,
    to_float32,
    whole_grains,
)
from merge.sources import Source, TensorInfo

VALUES = np.random.default_rng(0).normal(0.1, 0.5, (700, 900)).astype(np.float32)


def source(values: Array, dtype: str = "F32", *, stored: bool = True) -> Source:
    """`values` as tensor "w"; one that is computed wants to be read by whole grains."""
    raw = from_float32(values, dtype)
    info = TensorInfo(dtype, values.shape, file="there" if stored else "")

    def read(name: str, first: int, end: int, out: memoryview) -> None:
        assert stored or whole_grains(values.shape, first, end) == (first, end)
        np.frombuffer(out, STORAGE[dtype]).reshape(-1, values.shape[1])[:] = raw[first:end]

    return Source({"w": info}, read)


def whole(values: Array = VALUES) -> Stretch:
    return Stretch.whole(source(values), "w")


COLUMNS = Columns(random_key("columns"), 700, 0.3)
ALL: dict[str, Rows] = {
    "stretch": Stretch(source(VALUES, "BF16"), "w", 30, 640),
    "computed": Stretch(source(VALUES, stored=False), "w", 30, 640),
    "zeros": Zeros(TensorInfo("F16", (700, 900))),
    "scaled": Scaled(whole(), 0.3),
    "noisy": Noisy(whole(), 0.3, random_key("noise")),
    "redrawn rows": Redrawn(whole(), COLUMNS, 0, random_key("values")),
    "redrawn columns": Redrawn(whole(VALUES[:, :700]), COLUMNS, 1, random_key("values")),
    "stacked": Stacked(
        [whole(), Noisy(whole(), 0.1, 3), Stretch(source(VALUES, "BF16"), "w", 5, 9)]
    ),
    "middle": Middle(whole(), 500),
    "beside": Beside([whole(), Scaled(whole(), 2.0), Noisy(whole(VALUES[:, :5]), 0.1, 3)]),
}


@pytest.mark.parametrize("name", list(ALL))
@settings(max_examples=25)
@given(data=st.data())
def test_any_rows_are_those_of_the_whole(name: str, data: st.DataObject) -> None:
    rows = ALL[name]
    everything = rows.read(0, rows.info.rows)
    assert everything.shape == (rows.info.rows, rows.info.cols)
    assert everything.dtype == STORAGE[rows.info.dtype]
    first = data.draw(st.integers(0, rows.info.rows - 1))
    end = data.draw(st.integers(first + 1, rows.info.rows))
    assert np.array_equal(rows.read(first, end), everything[first:end])


@pytest.mark.parametrize("name", list(ALL))
def test_a_making_gives_whole_grains(name: str) -> None:
    making = Making()
    info = making.add(name, ALL[name])
    assert making.add(name, Zeros(info)) == info  # what has a name keeps it
    found = making.source().rows(name, 0, info.rows)
    assert np.array_equal(found, to_float32(ALL[name].read(0, info.rows), info.dtype))
    assert making.source().scratch(name, info.rows) >= grain_rows(info.shape) * info.row_bytes


def test_what_is_joined_is_what_its_parts_are() -> None:
    parts = [whole(VALUES[:4]), whole(VALUES[4:10])]
    assert np.array_equal(Stacked(parts).read(2, 7), VALUES[2:7])
    assert Stacked(parts).info.dtype == "F32"
    beside = Beside([whole(VALUES[:, :4]), whole(VALUES[:, 4:9])])
    assert np.array_equal(beside.read(3, 8), VALUES[3:8, :9])
    mixed = Beside([whole(), Stretch.whole(source(VALUES, "BF16"), "w")])
    assert mixed.info.dtype == "F32"
    assert Stacked([Stretch(source(VALUES, "BF16"), "w", 0, 2)] * 2).info.dtype == "BF16"


def test_a_middle_is_the_mean_of_all_rows() -> None:
    found = Middle(whole(VALUES[:, :3]), 2)
    assert found.info.shape == (2, 3)
    assert np.allclose(found.read(0, 2), VALUES[:, :3].astype(np.float64).mean(axis=0), atol=1e-7)


def test_what_sources_inside_hold_is_told_once_for_each() -> None:
    """Adapters keep factors, for all that is made of them."""
    one, two = (replace(source(VALUES), held=held) for held in (100, 30))
    making = Making()
    making.add("a", Stacked([Noisy(Stretch.whole(one, "w"), 0.1, 3), Stretch.whole(two, "w")]))
    making.add(
        "b", Beside([Scaled(Stretch.whole(one, "w"), 2.0), Zeros(TensorInfo("F32", (700, 1)))])
    )
    assert making.source().held == 130


def test_noise_is_standard_normal_times_its_scale() -> None:
    """630,000 numbers: mean and deviation are known to about 0.1 %, shares to 0.06 %."""
    noise = (
        Noisy(whole(), 0.5, random_key("noise")).read(0, 700).astype(np.float64) - VALUES
    ) / 0.5
    assert abs(noise.mean()) < 5e-3
    assert abs(noise.std() - 1) < 5e-3
    for z in (-2.0, -1.0, 0.5, 1.5):
        assert abs((noise < z).mean() - NormalDist().cdf(z)) < 3e-3
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 5e-3
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 5e-3


@pytest.mark.parametrize(("axis", "share"), [(0, 0.3), (1, 0.3), (0, 0.0), (0, 1.0), (1, 1.0)])
def test_what_is_drawn_anew_has_the_moments_of_what_it_replaces(axis: int, share: float) -> None:
    values = VALUES[:, :700]
    columns = Columns(random_key("columns"), 700, share)
    found = Redrawn(whole(values), columns, axis, random_key("values")).read(0, 700)
    other = found != values
    chosen = columns.chosen()
    assert chosen.sum() == columns.count == round(share * 700)
    assert np.array_equal(other.all(1 - axis), chosen)
    assert np.array_equal(other.any(1 - axis), chosen)
    if share:
        old, new = values[other].astype(np.float64), found[other].astype(np.float64)
        assert abs(new.mean() - old.mean()) < 5e-3
        assert abs(new.std() / old.std() - 1) < 5e-3


def test_moments_are_those_of_the_replaced_elements_alone() -> None:
    values = VALUES[:, :700].copy()
    columns = Columns(1, 700, 0.5)
    values[~columns.chosen()] = 1e6
    values[columns.chosen()] = 3.0
    assert (
        np.abs(Redrawn(whole(values), columns, 0, 2).read(0, 700)[columns.chosen()] - 3.0).max()
        < 1e-4
    )


def test_logarithms_and_quantiles_are_those_of_the_library() -> None:
    x = np.concatenate([np.logspace(-300, 300, 4001), np.linspace(0.4, 2.5, 4001)])
    reference = np.array([math.log(v) for v in x])
    assert np.all(np.abs(log(x) - reference) <= 4.5e-16 * np.maximum(1.0, np.abs(reference)))
    ends = np.array([0, 1, 2**32 - 1, 2**31, 2**31 - 1], np.uint32)
    random = np.concatenate([Counter.of(0, (1, 20000)).random(7)[0], ends])
    chances = (random.astype(np.float64) + 0.5) / 2.0**32
    reference = np.array([NormalDist().inv_cdf(p) for p in chances])
    assert np.all(np.abs(normal(random) - reference) <= 1e-13 * np.maximum(1.0, np.abs(reference)))


RUN = """
import sys
from pathlib import Path
from merge import pipeline
from merge.pipeline import run_recipe
pipeline.check_loads = lambda folder, **_: {}  # a process of its own
result = run_recipe(sys.argv[1], Path(sys.argv[1]).parent / "out", memory="400MiB", threads=2)
status = Path("/proc/self/status").read_text()
print(result.budget.peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def test_measured_peak_of_altered_experts_is_below_the_projected_one(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "head_dim": 256, "intermediate_size": 3000, "num_hidden_layers": 1}
    saved(tmp_path / "base", LlamaConfig(**LAYERS | wide))
    changes = {"noise_scale": 0.1, "reinitialise": 0.5, "residual_scale": 0.5}
    entry = {"source_model": "base", **changes}
    recipe = written(
        tmp_path, [entry] * 2, gate_mode="random", architecture="deepseek", shared_experts=[
            {"source_model": "base", "noise_scale": 0.1, "residual_scale": 0.5}] * 2,
    )  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(recipe)], check=True, capture_output=True, text=True
    )
    projected, measured = map(int, ran.stdout.split())
    assert measured < projected
