"""A report of a merge: its figures are those of whole tensors in float64, on any threads."""

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser, opened
from families import drawn, family, shapes, stored, typed, write_model, write_recipe
from numpy.typing import NDArray
from ran import Ran
from safetensors.numpy import load_file

from merge import formula
from merge.errors import NonFiniteError, PlanError, RequestError
from merge.pipeline import plan_recipe, run_recipe
from merge.report import merge_page, merging
from merge.report.figures import Comparison
from merge.report.merge_page import _largest_first, report_on
from merge.report.merged import planned
from merge.report.merging import measured, modules_of
from merge.shipped import shipped

Command = Callable[..., Ran]
Tensors = Mapping[str, NDArray[Any]]
EXACT = 1e-12  # relative: sums of float64 in another order


def compared(recipe: Path, **how: Any) -> Comparison:
    return measured(plan_recipe(recipe), "2GiB", **how)


def loaded(folder: Path) -> dict[str, NDArray[np.float64]]:
    return {
        name: v.astype(np.float64) for name, v in load_file(folder / "model.safetensors").items()
    }


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base and three models; the third leaves half of the values as they are."""
    found = family(tmp_path, "a", "b", "c")
    base, half = (load_file(found[name] / "model.safetensors") for name in ("base", "c"))
    for name, values in half.items():
        values.reshape(-1)[::2] = base[name].reshape(-1)[::2]
    write_model(found["c"], typed(half))
    return found


def ties(folder: Path, models: Mapping[str, Path], **keys: Any) -> Path:
    tuned = {str(path): {} for name, path in models.items() if name != "base"}
    method = {"merge_method": "ties", "parameters": {"density": 0.5, "weight": 1.0}}
    return write_recipe(
        folder / "recipe.yaml", base_model=str(models["base"]), models=tuned, **{**method, **keys}
    )


# -- figures ------------------------------------------------------------------------------------------


def test_task_vectors_are_compared_as_whole_tensors_would_be(
    models: dict[str, Path], tmp_path: Path
) -> None:
    found = compared(ties(tmp_path, models))
    base, *tuned = (loaded(models[name]) for name in ("base", "a", "b", "c"))
    assert found.base == "base"
    assert sorted(tensor.name for tensor in found.tensors) == sorted(base)
    for tensor in found.tensors:
        deltas = {n: t[tensor.name] - base[tensor.name] for n, t in zip("abc", tuned, strict=True)}
        for name, delta in deltas.items():
            size = tensor.sizes[name]
            assert np.isclose(size.norm, np.linalg.norm(delta), rtol=EXACT)
            whole = np.linalg.norm(delta) / np.linalg.norm(base[tensor.name])
            assert np.isclose(size.relative, whole, rtol=EXACT)
        for (one, other), pair in tensor.pairs.items():
            product = deltas[one] * deltas[other]
            assert np.isclose(pair.cosine, cosine(deltas[one], deltas[other]), rtol=EXACT)
            assert pair.both == np.count_nonzero(product)
            assert pair.opposed == np.count_nonzero(product < 0)
        signs = np.sign(np.stack(list(deltas.values())))
        assert tensor.shared.values == np.count_nonzero((signs != 0).sum(axis=0) >= 2)
        mixed = (signs > 0).any(axis=0) & (signs < 0).any(axis=0)
        assert tensor.shared.opposed == np.count_nonzero(mixed)


def test_figures_of_the_whole_are_those_of_all_values_as_one(
    models: dict[str, Path], tmp_path: Path
) -> None:
    found = compared(ties(tmp_path, models))
    base, a, b = (
        np.concatenate([v.ravel() for v in loaded(models[name]).values()])
        for name in ("base", "a", "b")
    )
    assert np.isclose(
        found.size("a").relative, np.linalg.norm(a - base) / np.linalg.norm(base), rtol=EXACT
    )
    assert np.isclose(found.pair(("a", "b")).cosine, cosine(a - base, b - base), rtol=EXACT)
    assert np.isclose(
        found.pair(("a", "b")).conflict, ((a - base) * (b - base) < 0).mean(), rtol=EXACT
    )


def test_without_a_base_weights_are_compared_and_distances_from_their_mean(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tuned = {str(models[name]): {"weight": 1.0} for name in "abc"}
    found = compared(write_recipe(tmp_path / "r.yaml", models=tuned, merge_method="linear"))
    whole = {name: loaded(models[name]) for name in "abc"}
    assert found.base is None
    for tensor in found.tensors:
        values = {name: tensors[tensor.name] for name, tensors in whole.items()}
        mean = sum(values.values()) / 3
        for name, value in values.items():
            away = float(np.linalg.norm(value - mean) / np.linalg.norm(mean))
            assert np.isclose(tensor.sizes[name].relative, away, rtol=1e-6)  # cancellation
        for (one, other), pair in tensor.pairs.items():
            assert np.isclose(pair.cosine, cosine(values[one], values[other]), rtol=EXACT)


def test_task_vectors_and_weights_have_no_sum(models: dict[str, Path], tmp_path: Path) -> None:
    for folder in models.values():
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 2}))
    based, bare = (
        {"sources": [{"model": str(models[n]), "layer_range": [i, i + 1]} for n in "ab"]}
        for i in range(2)
    )
    slices = {"slices": [{**based, "base_model": str(models["base"])}, bare]}
    recipe = {"merge_method": "nuslerp", "parameters": {"weight": 0.5}, **slices}
    (tmp_path / "mixed.yaml").write_text(json.dumps(recipe))
    found = compared(tmp_path / "mixed.yaml")
    with_base, without = found.parts
    assert (with_base.base, without.base) == ("base", None)
    assert {t.name for part in found.parts for t in part.tensors} == set(shapes())
    names = [t.name for t in with_base.tensors]
    assert set(names) == {name for name in shapes() if "embed" in name or ".0." in name}
    base, a, b = (
        np.concatenate([loaded(models[model])[name].ravel() for name in names])
        for model in ("base", "a", "b")
    )
    report = report_on(found)
    size, (pair,) = report.data["models"]["a"], report.data["pairs"]
    assert np.isclose(size["norm"], np.linalg.norm(a - base), rtol=EXACT)
    assert np.isclose(pair["cosine"], cosine(a - base, b - base), rtol=EXACT)
    rest = [t.name for t in without.tensors]
    a, b = (np.concatenate([loaded(models[m])[name].ravel() for name in rest]) for m in "ab")
    size, (pair,) = report.data["without_base"]["models"]["a"], report.data["without_base"]["pairs"]
    assert np.isclose(size["norm"], np.linalg.norm(a - b) / 2, rtol=1e-6)  # cancellation
    assert np.isclose(pair["cosine"], cosine(a, b), rtol=EXACT)
    assert [p.name for p in report.pictures] == [
        *("sizes", "cosines", "signs"),
        *("sizes-without-base", "cosines-without-base", "signs-without-base"),
    ]
    assert f"In {len(names)} tensors task vectors are compared" in report.page
    assert f"In {len(rest)} tensors there is no base, so the weights themselves" in report.page


def test_equal_models_agree_and_opposite_ones_conflict(tmp_path: Path) -> None:
    found = family(tmp_path, "a")
    base, tuned = (load_file(found[name] / "model.safetensors") for name in ("base", "a"))
    other_way = {name: 2 * base[name] - tuned[name] for name in base}
    found |= {
        "same": write_model(tmp_path / "same", typed(tuned)),
        "not": write_model(tmp_path / "not", typed(other_way)),
    }
    both = compared(ties(tmp_path, found))
    assert both.pair(("a", "same")).cosine == pytest.approx(1.0, abs=EXACT)
    assert both.pair(("a", "same")).conflict == 0
    assert both.pair(("a", "not")).cosine == pytest.approx(-1.0, abs=1e-6)
    assert both.pair(("a", "not")).conflict > 0.999
    assert both.shared().conflict > 0.999


def test_an_unchanged_model_has_no_direction(tmp_path: Path) -> None:
    found = family(tmp_path, "a")
    copy = write_model(tmp_path / "copy", typed(load_file(found["base"] / "model.safetensors")))
    both = compared(ties(tmp_path, found | {"copy": copy}))
    assert both.size("copy").norm == 0
    assert np.isnan(both.pair(("a", "copy")).cosine)
    assert np.isnan(both.pair(("a", "copy")).conflict)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_is_read_as_it_is_stored(dtype: str, tmp_path: Path) -> None:
    def widened(values: NDArray[Any]) -> NDArray[np.float64]:
        raw = stored(values, dtype)
        wide = (raw.astype("<u4") << 16).view("<f4") if dtype == "BF16" else raw
        return wide.astype(np.float64)

    halves = {name: drawn(seed) for seed, name in enumerate(("base", "a", "b"))}
    models = {n: write_model(tmp_path / n, typed(values, dtype)) for n, values in halves.items()}
    for tensor in compared(ties(tmp_path, models)).tensors:
        base, a, b = (widened(halves[name][tensor.name]) for name in ("base", "a", "b"))
        whole = np.linalg.norm(a - base) / np.linalg.norm(base)
        assert np.isclose(tensor.sizes["a"].relative, whole, rtol=EXACT)
        assert np.isclose(tensor.pairs["a", "b"].cosine, cosine(a - base, b - base), rtol=EXACT)


def test_threads_change_no_bit(tmp_path: Path) -> None:
    like = {f"model.layers.{i}.mlp.up_proj.weight": (600, 700) for i in range(3)}  # two grains each
    recipe = ties(tmp_path, family(tmp_path, "a", "b", like=like))
    assert compared(recipe, threads=1) == compared(recipe, threads=4)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_compiled_loop_gives_the_same_bits(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = {f"model.layers.{i}.mlp.up_proj.weight": (600, 700) for i in range(2)}
    recipe = ties(tmp_path, family(tmp_path, "a", "b", "c", like=like, dtype=dtype))
    by_numpy = compared(recipe)
    monkeypatch.setattr(formula, "_trusted", {})
    monkeypatch.setattr(merging, "worth_fusing", lambda plan: True)
    assert compared(recipe) == by_numpy
    assert formula._trusted
    assert all(formula._trusted.values())


def test_rows_of_a_merge_within_the_merge_are_compared_as_if_written(tmp_path: Path) -> None:
    found = family(tmp_path, "a", "b", "c")
    inner = {
        "name": "inner", "merge_method": "linear", "dtype": "float32",
        "models": [{"model": str(found[n]), "parameters": {"weight": 0.5}} for n in "ab"],
    }  # fmt: skip
    outer = {
        "merge_method": "task_arithmetic", "base_model": str(found["base"]), "dtype": "float32",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in ("inner", str(found["c"]))],
    }  # fmt: skip
    file = tmp_path / "two.yaml"
    file.write_text(f"{json.dumps(inner)}\n---\n{json.dumps(outer)}\n")
    (tmp_path / "one.yaml").write_text(json.dumps({k: v for k, v in inner.items() if k != "name"}))
    run_recipe(tmp_path / "one.yaml", tmp_path / "inner")
    (tmp_path / "plain.yaml").write_text(
        json.dumps(outer).replace('"inner"', json.dumps(str(tmp_path / "inner")))
    )
    one, two = compared(tmp_path / "plain.yaml"), compared(file)
    assert [t.sizes for t in one.tensors] == [t.sizes for t in two.tensors]
    assert [t.pairs for t in one.tensors] == [t.pairs for t in two.tensors]


# -- places -------------------------------------------------------------------------------------------


def test_modules_have_short_names_that_are_their_own() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.10.mlp.gate.weight",
        "model.layers.10.self_attn.gate.weight",
        "model.layers.10.mlp.experts.3.w1.weight",
        "model.layers.10.mlp.experts.11.w1.weight",
    ]
    assert list(modules_of(names).values()) == [
        ("", "embed_tokens"), ("0", "q_proj"), ("0", "q_proj.bias"), ("10", "mlp.gate"),
        ("10", "self_attn.gate"), ("10", "w1"), ("10", "w1"),
    ]  # fmt: skip
    both = modules_of(["encoder.block.0.q.weight", "decoder.block.0.q.weight"])
    assert [layer for layer, _ in both.values()] == ["encoder.block 0", "decoder.block 0"]


def test_pairs_without_a_value_come_last() -> None:
    pairs = {("a", "b"): math.nan, ("a", "c"): 0.1, ("b", "c"): 0.5}
    assert _largest_first(pairs) == [("b", "c"), ("a", "c"), ("a", "b")]


def test_modules_beyond_what_a_picture_holds_are_told(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compared(ties(tmp_path, models))
    count = len({tensor.module for tensor in found.tensors})
    monkeypatch.setattr(merge_page, "MOST_ROWS", 2)
    told = [picture.told for picture in report_on(found).pictures]
    assert all(f"2 of {count} modules are shown" in each for each in told)


# -- memory -------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from click.testing import CliRunner
from merge.cli import main
from merge.pipeline import plan_recipe
from merge.report import merging
recipe, threads, fuse = sys.argv[1:]
merging.worth_fusing = lambda plan: fuse == "fused"
told = ["report", recipe, "--threads", threads, "--memory", "1GiB", "-o", recipe + ".report"]
done = CliRunner().invoke(main, told)
assert done.exit_code == 0, done.output
plan = plan_recipe(recipe)
status = Path("/proc/self/status").read_text()
peak = merging.peak_bytes(plan, plan.steps, int(threads), fuse=fuse == "fused")
print(peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.parametrize(("threads", "fuse"), [(1, "numpy"), (2, "fused")])
def test_measured_peak_is_below_the_projected_one(threads: int, fuse: str, tmp_path: Path) -> None:
    name, shape = "model.layers.0.mlp.up_proj.weight", (2048, 2048)  # 8 MiB in bfloat16
    random = np.random.default_rng(0)
    found = {
        model: write_model(
            tmp_path / model,
            {
                name.replace("0", str(i)): (
                    "BF16",
                    stored(random.standard_normal(shape, "f4"), "BF16"),
                )
                for i in range(2)
            },
        )
        for model in ("base", "a", "b", "c", "d", "e")
    }
    command = [sys.executable, "-c", RUN, str(ties(tmp_path, found)), str(threads), fuse]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    projected, peak = map(int, done.stdout.split())
    assert peak < projected < 2 * peak


def test_too_little_memory_is_refused_with_what_would_do(
    models: dict[str, Path], tmp_path: Path
) -> None:
    plan = plan_recipe(ties(tmp_path, models))
    with pytest.raises(PlanError, match="is the least that would do") as refused:
        measured(plan, "20MiB")
    least = str(refused.value).split("; ")[1].split()[0]
    assert measured(plan, least).tensors


# -- the command --------------------------------------------------------------------------------------


def test_a_merged_model_is_told_as_its_recipe_is(
    models: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    recipe = ties(tmp_path, models, out_dtype="bfloat16")
    run_recipe(recipe, tmp_path / "merged")
    tables = []
    for what, page in ((recipe, "one"), (tmp_path / "merged", "two")):
        assert command("report", what, "--output", page).code == 0
        tables.append((Path(page) / "tensors.csv").read_text())
    assert tables[0] == tables[1]
    write_model(models["b"], typed(drawn(9)))
    found = command("report", tmp_path / "merged", "--output", "three")
    assert found.code == 2
    assert "was merged of other tensors than b now has; put those back" in found.error
    assert not Path("three").exists()


def test_a_merged_model_away_from_its_parents_says_what_to_give(
    models: dict[str, Path], tmp_path: Path
) -> None:
    run_recipe(ties(tmp_path, models), tmp_path / "elsewhere" / "merged")
    with pytest.raises(RequestError, match="give the recipe instead"):
        planned(str(tmp_path / "elsewhere" / "merged"), "512MiB", offline=True)


def test_what_nothing_can_be_told_of_is_refused(tmp_path: Path, command: Command) -> None:
    assert "neither study.db nor mergetool.json" in command("report", tmp_path).error
    assert "nothing in it is merged" in command("report", "frankenmerge").error
    assert "is a mixture" in command("report", "mixture-of-loras").error
    assert "evolve" in command("report", "evolve-quickstart").error
    assert "no such file" in command("report", "nothing-of-this-name").error


def test_nan_is_named_and_nothing_is_written(models: dict[str, Path], tmp_path: Path) -> None:
    broken = load_file(models["b"] / "model.safetensors")
    broken["model.norm.weight"][3] = np.nan
    write_model(models["b"], typed(broken))
    with pytest.raises(NonFiniteError, match=r"'model.norm.weight' holds nan at \[3\]"):
        compared(ties(tmp_path, models))


def test_adapters_are_compared_by_what_they_change(command: Command) -> None:
    ran = command("report", "merge-adapters", "--json", "--output", "page")
    told = json.loads(ran.out)
    assert told["base_model"]
    assert all(model["norm"] > 0 for model in told["models"].values())
    assert Path("page/pictures/cosines.png").is_file()


def test_tables_have_every_tensor_and_pair(
    models: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    told = json.loads(command("report", ties(tmp_path, models), "--json", "-o", "page").out)
    rows = list(csv.DictReader(io.StringIO(Path("page/tensors.csv").read_text())))
    assert sorted(row["tensor"] for row in rows) == sorted(shapes())
    for row, tensor in zip(rows, told["tensors"], strict=True):
        assert float(row["relative a"]) == tensor["models"]["a"]["relative"]
        for pair in tensor["pairs"]:
            assert float(row["cosine " + " × ".join(pair["models"])]) == pair["cosine"]


@pytest.mark.skipif(browser() is None, reason="no browser; TEST_BROWSER names one")
def test_a_browser_shows_it_and_asks_nobody(command: Command) -> None:
    program: Any = browser()
    assert command("report", shipped("recipes/quickstart.yaml"), "--output", "page").code == 0
    with opened(program) as page:
        page.open(Path("page/index.html"))
        assert page.said == []
        asked = [url for url in page.requests if not url.startswith("data:")]
        assert asked == [Path("page/index.html").absolute().as_uri()]
        sizes = page.ask("[...document.querySelectorAll('figure svg')].map(s => s.clientHeight)")
        assert len(sizes) == 3
        assert all(height > 200 for height in sizes)
