"""Laws that mergekit 0.1.5 breaks (reproduced there) and that every method here obeys.

Of its other faults, gradients after the last layer are in test_against_mergekit, small task vectors of
model_stock and the share that DARE keeps in test_battery, weights that sum to zero in test_plan.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import drawn
from methods.cases import CASES, NAME, Case, merged, needs_base, write_case
from methods.references import REFERENCES
from methods.test_battery import every_case, family, run
from numpy.typing import NDArray

from merge.errors import NonFiniteError
from merge.methods import all_methods
from merge.methods.fusion import divergence, softmax_terms
from merge.numerics import from_float32, to_float32
from merge.ranks import magnitude_ranks

METHODS = all_methods()
ONE_EACH = list({case.method: case for case in CASES}.values())


def merge_of(case: Case, models: list[NDArray[Any]], base: Any = None, **keys: Any) -> Any:
    """The merged tensor of float32 models (or of the type `stored`), as float64."""
    folder = Path(tempfile.mkdtemp())
    values = [{NAME: model} for model in models]
    origin = {NAME: np.zeros_like(models[0]) if base is None else base}
    recipe = write_case(folder, case, values, origin, keys.pop("stored", "F32"), **keys)
    return merged(recipe)[0][NAME]


# -- 1: signed divisors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [m.name for m in METHODS.values() if {"normalize", "lambda"} <= m.parameters.keys()]
)
def test_normalizing_keeps_the_sign_of_a_weight(method: str) -> None:
    """There -0.5 becomes +1."""
    delta = drawn(1, {NAME: (8, 8)})[NAME]
    case = Case(method, 1, {"weight": [-0.5]}, {"normalize": True})
    assert np.array_equal(merge_of(case, [delta]), -delta)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties", "della"])
def test_opposite_weights_do_not_amplify(method: str) -> None:
    """There [1, -0.99] divides by 0.01: task vectors 138 times the largest one."""
    deltas = [drawn(seed, {NAME: (40, 40)})[NAME] for seed in (1, 2)]
    case = Case(method, 2, {"weight": [1.0, -0.99]}, {"normalize": True})
    assert np.abs(merge_of(case, deltas)).max() <= max(np.abs(d).max() for d in deltas)


# -- 2 and 6: arithmetic in the precision of the input -----------------------------------------------


@every_case
def test_bfloat16_is_the_float32_result_rounded_once(case: Case) -> None:
    """There every operation rounds: TIES is off by 7.2 % of the task vectors, this by 0.75 %."""
    keys = {"out_dtype": "float32"}
    if case.method == "passthrough" and "scale" not in case.own:
        keys = {}  # copied
    wide = run(case, (37, 23), "BF16", keys=keys)[0]
    narrow = run(case, (37, 23), "BF16")[0]
    rounded = to_float32(from_float32(wide.astype(np.float32), "BF16"), "BF16")
    assert np.array_equal(narrow, rounded)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_lengths_are_kept_to_float32(method: str) -> None:
    """Half way from a to 2 a lies 1.5 a; there inner products in bfloat16 give 0.2 to 0.4 % less."""
    own = {} if method == "karcher" else {"weight": [0.5, 0.5]}
    model = drawn(1, {NAME: (64, 4096)})[NAME]
    model = to_float32(from_float32(model, "BF16"), "BF16")
    found = merge_of(Case(method, 2, own), [model, 2 * model], stored="BF16", out_dtype="float32")
    # the coefficients and their sum are rounded to float32
    assert np.allclose(found, 1.5 * model, rtol=4 * 2.0**-24, atol=0)


# -- 3 and 7: constants that ordinary task vectors are smaller than ------------------------------------

HOMOGENEOUS = [
    case
    for case in CASES
    if needs_base(case)
    and case.method not in ("nearswap", "ram", "ramplus_tl")  # they name a size
    and "uniform_below" not in case.shared
]


@pytest.mark.parametrize("case", HOMOGENEOUS, ids=lambda c: c.id)
def test_small_task_vectors_merge_like_large_ones(case: Case) -> None:
    """Scaled by a power of two, all else is the same bits; there sce forgets its weights below a
    summed energy of 1e-6, and model_stock clamps the product of two norms to that."""
    deltas = [drawn(seed, {NAME: (37, 23)})[NAME] for seed in range(1, case.models + 1)]
    small = np.float32(2.0**-30)
    expected = merge_of(case, deltas) * small
    assert np.array_equal(merge_of(case, [d * small for d in deltas]), expected)


def test_sces_uniform_weights_are_there_for_compatibility() -> None:
    """What compat: mergekit selects, on task vectors of an ordinary size."""
    deltas = [size * drawn(seed, {NAME: (37, 23)})[NAME] for seed, size in ((1, 5e-4), (2, 1e-4))]
    models = [d.astype(np.float32) for d in deltas]
    found = merge_of(Case("sce", 2), models, compat="mergekit")
    both = np.sign(models[0]) == np.sign(models[1])
    assert np.allclose(found[both], ((models[0] + models[1]) / 2)[both], rtol=1e-6, atol=0)
    ours = merge_of(Case("sce", 2), models)
    assert np.abs(ours - models[0])[both].max() < 0.2 * np.abs(found - models[0])[both].max()


# -- 4: DARE's rescaling -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_divides_by_the_density_whatever_the_sum_of_the_tensor(method: str) -> None:
    """There float16 sums of magnitudes above 65504 overflow to infinity."""
    case = Case(method, 1, {"weight": [1.0], "density": [0.5]})
    found = merge_of(case, [np.full((400, 1000), 2.0, np.float32)], stored="F16")
    assert set(np.unique(found)) == {0.0, 4.0}


# -- 5: DELLA's ranks ----------------------------------------------------------------------------------


def test_della_tells_all_magnitudes_of_a_row_apart() -> None:
    """There ranks are bfloat16: 704 different ones of 4096."""
    row = np.random.default_rng(0).permutation(4096).astype(np.float32)[None] + 1
    assert np.array_equal(np.sort(magnitude_ranks(row)[0]), np.arange(4096) / 4095)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 1), ()])
def test_della_takes_tensors_of_one_value_or_column(shape: tuple[int, ...]) -> None:
    """There one value is divided by a range of ranks of 0."""
    case = Case("della_linear", 1, {"weight": [1.0], "density": [0.5], "epsilon": [0.25]})
    found = merge_of(case, [np.ones(shape, np.float32)])
    assert np.isfinite(found).all()
    if found.size == 1:
        assert found.item() in (0.0, 2.0)


def test_della_keeps_by_rank_and_keeps_the_mean() -> None:
    """Over 1000 equal rows, each column's share and mean within 5 standard deviations."""
    delta = np.tile(np.arange(1, 101, dtype=np.float32), (1000, 1))
    case = Case("della_linear", 1, {"weight": [1.0], "density": [0.5], "epsilon": [0.3]})
    found = merge_of(case, [delta])
    chance = 0.2 + 0.6 * np.arange(100) / 99
    deviation = np.sqrt(chance * (1 - chance) / 1000)
    assert (np.abs((found != 0).mean(axis=0) - chance) < 5 * deviation).all()
    assert (np.abs(found.mean(axis=0) / delta[0] - 1) < 5 * deviation / chance).all()


# -- 8: NaN ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda c: c.method)
def test_nan_in_any_model_stops_every_method(case: Case) -> None:
    base, models = family((9, 9), case.models)
    models[-1][NAME][4, 5] = np.nan
    values = [model[NAME] for model in models]
    with pytest.raises(NonFiniteError, match=rf"m{case.models - 1}: .* holds nan at \[4, 5\]"):
        merge_of(case, values, base[NAME])


# -- 9: Arcee Fusion ---------------------------------------------------------------------------------------


def test_fusion_is_exact_beyond_a_million_values_and_keeps_the_type() -> None:
    """There the quartiles of more come from a random sample, and the result is float32."""
    base, models = family((1100, 1000), 1)
    values = [to_float32(from_float32(m[NAME], "BF16"), "BF16") for m in (base, models[0])]
    folder = Path(tempfile.mkdtemp())
    recipe = write_case(folder, Case("arcee_fusion", 2), [{NAME: v} for v in values], {}, "BF16")
    found, result = merged(recipe)
    assert result.plan.steps[0].dtype == "BF16"
    expected = REFERENCES["arcee_fusion"]([v.astype(np.float64) for v in values], None, NAME)
    assert np.array_equal(found[NAME], expected)


def divergence_of(model: Any, base: Any) -> Any:
    return divergence(np.array([term.sum(axis=1) for term in softmax_terms([base, model])]))


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 30.0])
def test_fusions_divergence_is_not_rounding(size: float) -> None:
    """There, in float32, that of a small change is noise. Here against sums without rounding."""
    base, (model,) = family((3, 500), 1, size=size)
    found = divergence_of(model[NAME], base[NAME])
    for row, a, b in zip(found, model[NAME].tolist(), base[NAME].tolist(), strict=True):
        total = math.fsum(math.exp(v) for v in a)
        chances = [math.exp(v) / total for v in a]
        mean = math.fsum(p * (v - w) for p, v, w in zip(chances, a, b, strict=True))
        rest = [w - v + mean for v, w in zip(a, b, strict=True)]
        # KL = log sum p exp(-(d - mean d)), which loses nothing to cancellation as log1p
        terms = [p * (math.expm1(c) - c) for p, c in zip(chances, rest, strict=True)]
        exact = math.log1p(math.fsum(terms))
        # what cancels are logarithms of about 6, in float64
        assert abs(row - exact) <= 1e-12 * exact + 8 * 6 * 2.0**-53


def test_fusions_divergence_is_that_of_values_within_350() -> None:
    """Where float64 holds every exponential; beyond, there is no infinity and nothing is negative."""
    values = np.random.default_rng(0).permutation(np.geomspace(1.0, 3e38, 600)).reshape(2, 3, 100)
    values *= np.random.default_rng(1).choice([-1.0, 1.0], values.shape)
    model, base = values.astype(np.float32)
    model[0], base[0], model[1, 1:], base[1, 1:] = 1e4, -1e4, -1e4, 1e4
    found = divergence_of(model, base)
    assert np.isfinite(found).all()
    assert found[0] <= 2 * np.spacing(
        700.0
    )  # what cancels: 700, and the logarithm of its exponential
    assert (found[1:] > 0).all()
    assert np.array_equal(found, divergence_of(model.clip(-350, 350), base.clip(-350, 350)))


# -- 13: seeds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_masks_do_not_depend_on_other_tensors_and_their_seed_is_written_down(method: str) -> None:
    """There one generator serves all tensors in turn, and without a seed in the recipe no run repeats."""
    base, (model,) = family((50, 40), 1)
    found = []
    for others in ((), ("a.weight", "model.embed_tokens.weight")):
        values = [v | dict.fromkeys(others, v[NAME]) for v in (base, model)]
        folder = Path(tempfile.mkdtemp())
        case = Case(method, 1, {"weight": [1.0], "density": [0.5]})
        outcome, result = merged(write_case(folder, case, values[1:], values[0], "F32"))
        found.append(outcome[NAME])
        told = json.loads((result.folder / "mergetool.json").read_text())
        assert '"seed": 0' in json.dumps(told)
    assert np.array_equal(*found)
    assert (found[0] == base[NAME]).mean() > 0.3
