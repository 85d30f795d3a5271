"""The loop over blocks at its edges: empty tensors, values that are not finite, errors in threads."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from families import stored, typed, write_model, write_recipe
from methods.cases import read_values

from merge.errors import NonFiniteError
from merge.formula import _GrainFunction, _trusted
from merge.fuse import traced
from merge.pipeline import run_recipe
from merge.stream import _Crew

NAMES = ("model.a.weight", "model.b.weight")


def ties(folder: Path, models: dict[str, dict[str, np.ndarray]], **keys: object) -> Path:
    for name, values in models.items():
        write_model(folder / name, typed(values))
    own = {name: {"weight": 1.0, "density": 0.5} for name in models if name != "base"}
    return write_recipe(
        folder / "r.yaml", models=own, base_model="base", merge_method="ties", **keys
    )


@pytest.mark.parametrize("shape", [(0,), (0, 4), (5, 0)])
def test_empty_tensors_stay_empty(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = {NAMES[0]: np.ones((3, 4), np.float32), NAMES[1]: np.ones(shape, np.float32)}
    recipe = ties(tmp_path, {"base": values, "a": values, "b": values})
    assert read_values(run_recipe(recipe, tmp_path / "out").folder)[NAMES[1]].shape == shape


def test_ties_lets_nan_pass_where_it_is_allowed(tmp_path: Path) -> None:
    good = {NAMES[0]: np.arange(12, dtype=np.float32).reshape(3, 4)}
    bad = {NAMES[0]: np.full((3, 4), np.nan, np.float32)}
    bad[NAMES[0]][0, 0] = 7.0
    recipe = ties(tmp_path, {"base": good, "a": bad, "b": good}, allow_nonfinite=True)
    run_recipe(recipe, tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"a: tensor 'model.a.weight' holds nan at \[0, 1\]"):
        run_recipe(ties(tmp_path, {"base": good, "a": bad}), tmp_path / "other")


def test_a_copied_nan_stops_the_run_too(tmp_path: Path) -> None:
    values = {NAMES[0]: np.ones((3, 4), np.float32)}
    values[NAMES[0]][2, 1] = np.inf
    write_model(tmp_path / "m", typed(values))
    recipe = write_recipe(tmp_path / "r.yaml", models={"m": None}, merge_method="passthrough")
    with pytest.raises(NonFiniteError, match=r"holds inf at \[2, 1\]"):
        run_recipe(recipe, tmp_path / "out")


@pytest.mark.parametrize("fuse", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_bad_value_is_found_in_any_grain(
    bad: float, dtype: str, fuse: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = np.ones((3, 1 << 18), np.float32)  # a row is a grain
    spoilt = good.copy()
    spoilt[2, 5] = bad
    for name, value in (("a", good), ("b", spoilt)):
        write_model(tmp_path / name, {NAMES[0]: (dtype, stored(value, dtype))})
    recipe = write_recipe(
        tmp_path / "r.yaml",
        models={"a": {"weight": 1.0}, "b": {"weight": 0.5}},
        merge_method="linear",
        out_dtype="bfloat16",  # so that a compiled loop sees the values of every type
    )
    with pytest.raises(NonFiniteError, match=rf"b: tensor '{NAMES[0]}' holds {bad} at \[2, 5\]"):
        run_recipe(recipe, tmp_path / "out", fuse=fuse)
    assert not caplog.records  # no warning that a loop is not used


@pytest.mark.parametrize("fuse", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("method", ["ties", "model_stock", "arcee_fusion", "slerp"])
@pytest.mark.parametrize("rows", [1, 24], ids=["one block", "blocks"])
def test_a_statistics_pass_sees_a_bad_value(
    rows: int, method: str, fuse: bool, tmp_path: Path
) -> None:
    good = np.ones((rows, 1 << 18), np.float32)  # a row is a grain
    good[:, ::3] = -0.5
    spoilt = good.copy()
    spoilt[rows - 1, 5] = np.nan
    for name, value in (("base", good), ("a", good * 2), ("b", spoilt)):
        write_model(tmp_path / name, {NAMES[0]: ("BF16", stored(value, "BF16"))})
    own = {
        "ties": {"a": {"weight": 1.0}, "b": {"weight": 0.5}},
        "model_stock": {"a": None, "b": None},
    }.get(method, {"b": None})
    recipe = write_recipe(
        tmp_path / "r.yaml",
        models=own,
        base_model="base",
        merge_method=method,
        parameters={"ties": {"density": 0.5}, "slerp": {"t": 0.5}}.get(method, {}),
    )
    with pytest.raises(
        NonFiniteError, match=rf"b: tensor '{NAMES[0]}' holds nan at \[{rows - 1}, 5\]"
    ):
        run_recipe(recipe, tmp_path / "out", fuse=fuse)


@pytest.mark.parametrize("fuse", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_an_overflow_is_found_in_any_grain(dtype: str, fuse: bool, tmp_path: Path) -> None:
    large = np.ones((3, 1 << 18), np.float32)
    large[2, 5] = {"F32": 3e38, "F16": 6e4, "BF16": 3e38}[dtype]
    for name in ("a", "b"):
        write_model(tmp_path / name, {NAMES[0]: (dtype, stored(large, dtype))})
    recipe = write_recipe(
        tmp_path / "r.yaml",
        models={"a": {"weight": 1.0}, "b": {"weight": 1.0}},
        merge_method="linear",
        parameters={"normalize": False},
    )
    with pytest.raises(NonFiniteError, match=rf"overflows {dtype} at \[2, 5\]"):
        run_recipe(recipe, tmp_path / "out", fuse=fuse)


def test_a_distrusted_loop_stays_distrusted() -> None:
    """A grain on which a wrong loop happens to agree does not make it right."""
    values = np.ones((2, 3), np.float32)
    wrong = traced(lambda x, i, h: [np.abs(x[0]) * 4.25], [values.dtype], "store")
    function = _GrainFunction(lambda raws, _: [raws[0] * 4.25], "store", wrong, True)
    assert function((([-values]), 0))[0][0][0, 0] == -4.25
    assert function((([values]), 0))[0][0][0, 0] == 4.25
    assert _trusted[wrong.source] is False
    assert function((([-values]), 0))[0][0][0, 0] == -4.25


def test_a_filter_that_fits_nothing_is_told(tmp_path: Path) -> None:
    values = {NAMES[0]: np.ones((3, 4), np.float32)}
    write_model(tmp_path / "m", typed(values))
    rules = [{"filter": "mpl", "value": 1.0}, {"value": 0.5}]
    recipe = write_recipe(
        tmp_path / "r.yaml", models={"m": {"weight": rules}}, merge_method="linear"
    )
    (note,) = run_recipe(recipe, tmp_path / "out").plan.notes
    assert "filter 'mpl' of weight fits no tensor" in note


def test_a_pass_goes_before_what_waits() -> None:
    """With one thread: a task that runs, one that waits, and a pass that is asked for meanwhile."""
    begun, go_on, order = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        begun.set()
        go_on.wait(60)

    with _Crew(1) as crew:
        crew.submit(first)
        crew.submit(order.append, "waits")
        begun.wait(60)
        asking = threading.Thread(target=crew.map, args=(lambda b: order.append(str(b)), [(0, 1)]))
        asking.start()
        while not crew._first:
            time.sleep(0.001)
        go_on.set()
        asking.join(60)
    assert order == ["(0, 1)", "waits"]


def test_an_error_of_a_task_is_raised_once_all_are_done() -> None:
    done: list[int] = []

    def run() -> None:
        with _Crew(2) as crew:
            crew.map(lambda block: done.append(block[0]), [(i, i + 1) for i in range(9)])
            crew.submit(int, "of a task")

    with pytest.raises(ValueError, match="of a task"):
        run()
    assert sorted(done) == list(range(9))
