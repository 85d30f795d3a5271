"""The laws that every registered method obeys."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import contents, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.cases import CASES, NAME, Case, merged, parameters_of, read_values, write_case
from methods.references import REFERENCES
from numpy.typing import NDArray

import merge.methods.nuslerp
from merge.errors import PlanError
from merge.methods import all_methods
from merge.ranks import magnitude_ranks

GOLDEN = Path(__file__).with_name("golden.json")
EPSILON = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # half a unit in the last place
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def family(shape: tuple[int, ...], models: int, dtype: str = "F32", size: float = 0.1) -> Any:
    """Values of a base and of models near it, rounded to `dtype` already."""
    base = drawn(0, {NAME: shape})
    tuned = []
    for seed in range(1, models + 1):
        delta = drawn(seed, {NAME: shape})[NAME]
        tuned.append({NAME: base[NAME] + np.float32(size) * delta})
    return base, tuned


def run(
    case: Case, shape: tuple[int, ...], dtype: str = "F32", **options: Any
) -> tuple[NDArray[Any], Any, Path]:
    base, models = family(shape, case.models)
    folder = Path(tempfile.mkdtemp())
    keys = options.pop("keys", {})
    recipe = write_case(folder, case, models, base, dtype, **keys)
    values, result = merged(recipe, **options)
    return values[NAME], result, folder


def test_every_method_has_a_case_and_a_reference() -> None:
    assert {case.method for case in CASES} == set(all_methods()) == set(REFERENCES)


@every_case
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("fuse", [False, True])
def test_equals_its_paper_in_float64(case: Case, dtype: str, fuse: bool) -> None:
    found, result, folder = run(case, (37, 23), dtype, fuse=fuse)
    step = result.plan.steps[0]
    x = [read_values(folder / f"m{i}")[NAME] for i in range(case.models)]
    base = read_values(folder / "base")[NAME] if step.base else None
    expected = REFERENCES[case.method](x, base, NAME, **parameters_of(step))
    # one rounding to the output, and float32 arithmetic on values up to the largest operand
    largest = max(np.abs(v).max() for v in [*x, expected])
    tolerance = EPSILON[dtype] * np.abs(expected) + 16 * EPSILON["F32"] * largest
    assert (np.abs(found - expected) <= tolerance).all(), np.abs(found - expected).max()


@every_case
@given(rows=st.integers(1, 700), cols=st.sampled_from([1, 3, 1000, 1024, 4099]), data=st.data())
@settings(max_examples=4)
def test_bits_do_not_depend_on_blocks_threads_or_compiling(
    case: Case, rows: int, cols: int, data: Any
) -> None:
    folder = Path(tempfile.mkdtemp())
    base, models = family((rows, cols), case.models)
    recipe = write_case(folder, case, models, base, data.draw(st.sampled_from(["F32", "BF16"])))
    found = set()
    for i, (threads, memory, fuse) in enumerate(
        [(1, "4GiB", False), (3, "4GiB", True), (2, "1GiB", False)]
    ):
        _, result = merged(recipe, into=f"out{i}", threads=threads, memory=memory, fuse=fuse)
        found.add(json.dumps(contents(result.folder)))
    assert len(found) == 1


@every_case
def test_smallest_blocks_read_again_give_the_same_bits(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One grain a block and no held inputs, against blocks of many grains held between passes."""
    import merge.budget

    _, large, folder = run(case, (600, 1000), threads=2)
    monkeypatch.setattr(merge.budget, "BLOCK", 1)
    monkeypatch.setattr(merge.budget, "held_bytes", lambda step: 1 << 60)
    _, small = merged(folder / "recipe.yaml", into="small", threads=2)
    assert small.budget.hold == 0
    assert contents(small.folder) == contents(large.folder)


PLAINEST = {c.method: c for c in sorted(CASES, key=lambda c: (-len(c.shared), len(c.own)))}


@pytest.mark.parametrize("case", PLAINEST.values(), ids=lambda c: c.id)
def test_methods_are_compiled(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each becomes one loop, whose bits are numpy's; memory is planned for that."""
    import merge.formula

    trusted: dict[str, bool] = {}
    monkeypatch.setattr(merge.formula, "_trusted", trusted)
    run(case, (600, 1000), fuse=True)
    assert trusted
    assert all(trusted.values())


def _is_average(case: Case) -> bool:
    if case.method == "passthrough":
        return "scale" not in case.own
    if case.method == "linear":
        return case.shared.get("normalize", True)
    return True


@pytest.mark.parametrize("case", filter(_is_average, CASES), ids=lambda c: c.id)
def test_equal_models_come_back_unchanged(case: Case) -> None:
    """Where coefficients add up to 1, models that are all the base give the base to the bit."""
    base = drawn(0, {NAME: (40, 8)})
    folder = Path(tempfile.mkdtemp())
    recipe = write_case(folder, case, [base] * case.models, base, "BF16")
    found, _ = merged(recipe)
    assert np.array_equal(found[NAME], read_values(folder / "m0")[NAME])


WEIGHED = [m.name for m in all_methods().values() if "weight" in m.parameters and m.models[0] == 1]


@pytest.mark.parametrize("method", WEIGHED)
@pytest.mark.parametrize("fuse", [False, True])
def test_one_model_of_weight_1_and_density_1_comes_back(method: str, fuse: bool) -> None:
    case = Case(method, 1, {"weight": [1.0]})
    found, _, folder = run(case, (40, 9), "BF16", fuse=fuse)
    # base + (model - base) is within a float32 rounding of the model, which bfloat16 absorbs
    assert np.array_equal(found, read_values(folder / "m0")[NAME])


@pytest.mark.parametrize(("t", "model"), [(0.0, "m0"), (1.0, "m1")])
def test_slerp_ends_at_its_models(t: float, model: str) -> None:
    found, _, folder = run(Case("slerp", 2, {}, {"t": t}), (40, 9), "BF16")
    assert np.array_equal(found, read_values(folder / model)[NAME])


HAND = [[1, 2, 3, 4], [5, 6, 7, 8], [-1, -2, -3, -4], [0, 0, 0, 0]]
STEP_A = [[4, -3, 2, 1], [0, 0, 0, 0], [8, 0, 0, 0], [1, 1, 1, 1]]
STEP_B = [[2, 5, -2, 0], [6, 0, 0, 0], [-4, 0, 0, 0], [1, 1, 1, 1]]
WORKED = {
    # of a's 16 values the two largest, 8 and 4, go and four stay: 3, 2 and, being equal, all the 1s
    "breadcrumbs": (
        {"weight": [1.0, 0.0], "density": [0.25, 0.25], "gamma": [0.125, 0.125]}, {},
        [[0, -3, 2, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    ),
    # trimmed to the 3 largest of 16 (k = floor(.2 * 16) = 3): a keeps 8, 4, -3; b keeps 6, 5, -4
    "ties": (
        {"weight": [1.0, 1.0], "density": [0.2, 0.2]}, {},
        [[4, 5, 0, 0], [6, 0, 0, 0], [8, 0, 0, 0], [0, 0, 0, 0]],
    ),
    # shared but for a's (0, 3) and b's (1, 0), which stay whole
    "ram": ({}, {}, [[3, 1, 0, 1], [6, 0, 0, 0], [2, 0, 0, 0], [1, 1, 1, 1]]),
    # each shares 8 of its changes and has 1 alone: 1 + .5 min(8 / 1, 2) = 2 times that one
    "ramplus_tl": (
        {}, {"r": 0.5, "alpha": 2.0},
        [[3, 1, 0, 2], [12, 0, 0, 0], [2, 0, 0, 0], [1, 1, 1, 1]],
    ),
    # they differ in 6 places, most by 12, 8 and 6; there -3, 0 and -4 are in the minority
    "sce": (
        {}, {"select_topk": 0.5}, [[0, 5, 0, 0], [6, 0, 0, 0], [8, 0, 0, 0], [0, 0, 0, 0]],
    ),
    "task_arithmetic": (
        {"weight": [1.0, 0.5]}, {},
        [[5, -0.5, 1, 1], [3, 0, 0, 0], [6, 0, 0, 0], [1.5, 1.5, 1.5, 1.5]],
    ),
    "linear": (
        {"weight": [1.0, 1.0]}, {},
        [[3, 1, 0, 0.5], [3, 0, 0, 0], [2, 0, 0, 0], [1, 1, 1, 1]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", WORKED)
@pytest.mark.parametrize("fuse", [False, True])
def test_hand_worked(method: str, fuse: bool) -> None:
    own, shared, expected = WORKED[method]
    base = {NAME: np.array(HAND, np.float32)}
    models = [{NAME: base[NAME] + np.array(step, np.float32)} for step in (STEP_A, STEP_B)]
    folder = Path(tempfile.mkdtemp())
    recipe = write_case(folder, Case(method, 2, own, shared), models, base, "F32")
    found, _ = merged(recipe, fuse=fuse)
    assert np.array_equal(found[NAME] - base[NAME], np.array(expected))


def test_slerp_hand_worked() -> None:
    """Orthogonal vectors, half way: both by sin(45)/sin(90)."""
    a, b = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
    a[0, 0], b[1, 1] = 2.0, 2.0
    folder = Path(tempfile.mkdtemp())
    recipe = write_case(folder, Case("slerp", 2, {}, {"t": 0.5}), [{NAME: a}, {NAME: b}], {}, "F32")
    found, _ = merged(recipe)
    assert found[NAME][0, 0] == found[NAME][1, 1] == np.float32(np.sqrt(2))


def test_model_stock_hand_worked() -> None:
    """Task vectors at right angles leave the base, equal ones give their models."""
    base = {NAME: np.zeros((4, 4), np.float32)}
    a, b = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
    a[0, 0], b[1, 1] = 2.0, 3.0
    for models, expected in (([a, b], base[NAME]), ([a, a], a), ([a, a * 0.5], a * 0.75)):
        folder = Path(tempfile.mkdtemp())
        case = Case("model_stock", 2)
        found, _ = merged(write_case(folder, case, [{NAME: m} for m in models], base, "F32"))
        assert np.allclose(found[NAME], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_model_stock_keeps_small_task_vectors(size: float) -> None:
    """mergekit clamps the norms at 1e-6, so that small equal task vectors shrink."""
    base, (model,) = family((10, 10), 1, size=size)
    folder = Path(tempfile.mkdtemp())
    recipe = write_case(folder, Case("model_stock", 2), [model, model], base, "F32")
    found, _ = merged(recipe)
    assert np.abs(found[NAME] - model[NAME]).max() <= 2.0**-22 * np.abs(base[NAME]).max()


def test_della_ranks_hand_worked() -> None:
    """Within a row, equal magnitudes by the mean of their ranks; a column is one vector."""
    delta = np.array([[3, -1, 2, 2], [0, 0, 0, 0], [-4, 3, -2, 1]], np.float32)
    third = 1 / 3
    expected = [[1, 0, 0.5, 0.5], [0.5] * 4, [1, 2 * third, third, 0]]
    assert np.allclose(magnitude_ranks(delta), expected, rtol=1e-15, atol=0)
    assert magnitude_ranks(delta[:1].T).tolist() == np.array(expected[:1]).T.tolist()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_ranks_by_the_compiled_sort_are_those_by_numpy(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 700))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    delta = rng.integers(0, 2**32, (rows, cols), np.uint32)
    delta &= np.uint32(data.draw(st.sampled_from([0xFFFFFFFF, 0xFFFF0000, 0xC0000001, 0x7FF])))
    found = magnitude_ranks(delta.view(np.float32), fuse=True)
    assert np.array_equal(found, magnitude_ranks(delta.view(np.float32)))


def test_arcee_fusion_hand_worked() -> None:
    """Rows alike: quartiles 1, 2, 3 times their divergence, so that 10 is above 2 + 1.5 (3 - 1)."""
    base, step = np.zeros((4, 4), np.float32), np.tile(np.float32([1, 2, -3, 10]), (4, 1))
    folder = Path(tempfile.mkdtemp())
    models = [{NAME: base}, {NAME: step}]
    found, _ = merged(write_case(folder, Case("arcee_fusion", 2), models, {}, "F32"))
    assert found[NAME].tolist() == [[0, 0, 0, 10]] * 4


def by_rows(case: Case, a: list[Any], b: list[Any], size: int = 4) -> NDArray[Any]:
    models = [{NAME: np.array(rows, np.float32)} for rows in (a, b)]
    base = {NAME: np.zeros((len(a), size), np.float32)}
    return merged(write_case(Path(tempfile.mkdtemp()), case, models, base, "F32"))[0][NAME]


def test_model_stock_by_rows_hand_worked() -> None:
    """A row in which the models agree is taken, one at right angles or unchanged in one stays."""
    case = Case("model_stock", 2, {}, {"filter_wise": True})
    a, b = [[1, 2, 0, 0], [3, 0, 0, 0], [1, 1, 1, 1]], [[1, 2, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]]
    assert by_rows(case, a, b).tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_nuslerp_by_rows_hand_worked() -> None:
    """Each row on its own arc: a quarter turn, none at all, and a straight line to 0."""
    case = Case("nuslerp", 2, {"weight": [0.5, 0.5]}, {"nuslerp_flatten": False})
    a, b = [[2, 0, 0, 0], [1, 1, 1, 1], [4, 0, 0, 0]], [[0, 2, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]]
    half = float(np.float32(np.sqrt(2)))
    expected = [[half, half, 0, 0], [2, 2, 2, 2], [2, 0, 0, 0]]
    assert np.allclose(by_rows(case, a, b), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("columns", [1 << 15, 64])
def test_nuslerp_by_columns_is_by_rows_of_the_transpose(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many columns a pass takes."""
    monkeypatch.setattr(merge.methods.nuslerp, "COLUMNS", columns)
    own, rows = {"weight": [0.6, 0.2]}, {"nuslerp_flatten": False}
    base, models = family((300, 1100), 2)
    turned = [{NAME: np.ascontiguousarray(m[NAME].T)} for m in models]
    found = []
    for shared, values in ((rows | {"nuslerp_row_wise": True}, models), (rows, turned)):
        recipe = write_case(
            Path(tempfile.mkdtemp()), Case("nuslerp", 2, own, shared), values, base, "F32"
        )
        found.append(merged(recipe)[0][NAME])
    # coefficients rounded to float32, of products that are summed differently
    assert np.allclose(found[0], found[1].T, rtol=0, atol=4 * 2.0**-24 * np.abs(found[0]).max())


def test_columns_far_smaller_than_others_keep_their_angle() -> None:
    """Orthogonal columns, the second 2**-20 the size of the first: half way, each by sqrt(1/2)."""
    a, b = ([[2.0, 2.0**-20], [0.0, 0.0]], [[0.0, 0.0], [2.0, 2.0**-20]])
    by_columns = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    found = by_rows(Case("nuslerp", 2, {"weight": [1.0, 1.0]}, by_columns), a, b, size=2)
    assert np.allclose(found, np.sqrt(0.5) * (np.array(a) + b), rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    ("method", "own", "by_vectors"),
    [
        ("nuslerp", {"weight": [0.6, 0.2]}, {"nuslerp_flatten": False}),
        ("nuslerp", {"weight": [0.6, 0.2]}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {}, {"filter_wise": True}),
    ],
)
def test_a_vector_is_one_row(method: str, own: Any, by_vectors: Any) -> None:
    found = [run(Case(method, 2, own, shared), (500_000,))[0] for shared in (by_vectors, {})]
    assert np.array_equal(*found)


def test_della_refuses_what_is_no_probability() -> None:
    for density, epsilon in ((0.1, 0.15), (0.9, 0.15), (0.15, 0.15)):
        own = {"weight": [1.0], "density": [density], "epsilon": [epsilon]}
        with pytest.raises(PlanError, match="choose a smaller epsilon"):
            run(Case("della", 1, own), (4, 4))


def test_karcher_hand_worked() -> None:
    """The mean of the three axes is their diagonal; a tensor of zeros has no say."""
    axes = [np.zeros((4, 4), np.float32) for _ in range(4)]
    for i in range(3):
        axes[i][0, i] = i + 1.0
    for count in (3, 4):
        folder = Path(tempfile.mkdtemp())
        models = [{NAME: axis} for axis in axes[:count]]
        found, _ = merged(write_case(folder, Case("karcher", count), models, {}, "F32"))
        assert np.allclose(found[NAME][0, :3], 2.0 / np.sqrt(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_directions_at_right_angles_hand_worked(method: str) -> None:
    """Half way between two axes, on a base and without one; equal lengths stay."""
    a, b, base = (np.zeros((4, 4), np.float32) for _ in range(3))
    a[0, 0], b[1, 1], base[2, 2] = 2.0, 2.0, 7.0
    for based in (False, True):
        case = Case(method, 2, {"weight": [0.5, 0.5]}, based=based)
        models = [{NAME: m + base * based} for m in (a, b)]
        folder = Path(tempfile.mkdtemp())
        found, _ = merged(write_case(folder, case, models, {NAME: base}, "F32"))
        half = np.float32(np.sqrt(2))
        assert np.allclose(found[NAME], (a + b) / 2 * half + base * based, rtol=1e-6, atol=0)


def test_nuslerp_of_opposite_or_zero_models_is_a_straight_line() -> None:
    a, zero = np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32)
    for other in (-a, zero):
        case = Case("nuslerp", 2, {"weight": [0.75, 0.25]})
        folder = Path(tempfile.mkdtemp())
        found, _ = merged(write_case(folder, case, [{NAME: a}, {NAME: other}], {}, "F32"))
        assert np.array_equal(found[NAME], 0.75 * a + 0.25 * other)


def test_nearswap_hand_worked() -> None:
    base = {NAME: np.zeros((1, 4), np.float32)}
    model = {NAME: np.array([[0.25, -0.25, 3.0, -3.0]], np.float32)}
    folder = Path(tempfile.mkdtemp())
    case = Case("nearswap", 1, {}, {"t": 0.5})
    found, _ = merged(write_case(folder, case, [model], base, "F32"))
    assert found[NAME].tolist() == [[0.25, -0.25, 0.5, -0.5]]


def test_passthrough_copies_bits_and_scales() -> None:
    found, _, folder = run(Case("passthrough", 1), (4, 4), "F16")
    assert np.array_equal(found, read_values(folder / "m0")[NAME])
    found, _, folder = run(Case("passthrough", 1, {"scale": [0.5]}), (4, 4), "F16")
    assert np.array_equal(found, read_values(folder / "m0")[NAME] / 2)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_wanted_share_and_the_mean(method: str) -> None:
    """Of 400,000 values 30 % are kept within 5 standard deviations; kept ones grow by 1/density."""
    base = {NAME: np.zeros((400, 1000), np.float32)}
    models = [{NAME: np.ones((400, 1000), np.float32)}]
    folder = Path(tempfile.mkdtemp())
    case = Case(method, 1, {"weight": [1.0], "density": [0.3]}, {"seed": 1})
    found, _ = merged(write_case(folder, case, models, base, "F32"))
    kept = found[NAME] != 0
    assert set(np.unique(found[NAME])) == {0.0, float(np.float32(1 / 0.3))}
    assert abs(kept.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / kept.size)


def test_dare_masks_differ_between_models_tensors_and_seeds() -> None:
    base = {n: np.zeros((100, 100), np.float32) for n in (NAME, "other.weight")}
    ones = {n: np.ones((100, 100), np.float32) for n in base}
    masks = []
    for seed in (0, 1):
        folder = Path(tempfile.mkdtemp())
        case = Case(
            "dare_linear", 2, {"weight": [1.0, 10.0], "density": [0.5, 0.5]}, {"seed": seed}
        )
        found, _ = merged(write_case(folder, case, [ones, ones], base, "F32"))
        for name in base:
            masks += [found[name] % 20 != 0, found[name] >= 20]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            # independent masks agree in half of 10,000 places, give or take 5 standard deviations
            assert abs((a == b).mean() - 0.5) < 0.025


@every_case
def test_golden_digest(case: Case, request: pytest.FixtureRequest) -> None:
    """The bytes of a tensor do not change from version to version; --update-golden records them."""
    _, result, _ = run(case, (50, 31), "BF16")
    outputs = json.loads((result.folder / "mergetool.json").read_text())["outputs"]
    digest = hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()
    known = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps(known | {case.id: digest}, indent=1, sort_keys=True) + "\n")
        return
    assert known.get(case.id) == digest
