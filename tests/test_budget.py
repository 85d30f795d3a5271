"""What a plan projects is what a run keeps to."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from families import stored, write_model, write_recipe
from methods.cases import CASES, NAME, Case, needs_base, write_case
from numpy.typing import NDArray

from merge.budget import make_budget
from merge.errors import PlanError
from merge.pipeline import plan_recipe

RUN = """
import sys
from pathlib import Path
from merge.pipeline import run_recipe
recipe, memory, fuse = sys.argv[1:]
result = run_recipe(recipe, Path(recipe).parent / "out", memory=memory, fuse=fuse == "fused")
status = Path("/proc/self/status").read_text()  # getrusage would tell the peak of the test's process
print(result.budget.peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""
EMBEDDING = "model.embed_tokens.weight"
SHAPE = (4096, 4096)  # 32 MiB in bfloat16: held inputs, blocks and arrays all count
ONE_EACH = list({case.method: case for case in CASES}.values())
BY_ROWS = [Case("model_stock", 3, {}, {"filter_wise": True})]
BY_ROWS += [case for case in CASES if case.based and "nuslerp_flatten" in case.shared]


@pytest.fixture(scope="module")
def values() -> list[NDArray[np.uint16]]:
    random = np.random.default_rng(0)
    return [stored(random.standard_normal(SHAPE, dtype=np.float32), "BF16") for _ in range(4)]


def recipe_of(folder: Path, case: Case, values: list[NDArray[np.uint16]]) -> Path:
    recipe = write_case(folder, case, [], {}, "F32")
    names = [f"m{i}" for i in range(case.models)] + (["base"] if needs_base(case) else [])
    for name, value in zip(names, values, strict=False):
        write_model(folder / name, {NAME: ("BF16", value)})
    return recipe


def measured_peak(recipe: Path, memory: str, fuse: str) -> tuple[int, int]:
    """Projected and measured, in bytes."""
    command = [sys.executable, "-c", RUN, str(recipe), memory, fuse]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    projected, measured = map(int, done.stdout.split())
    return projected, measured


@pytest.mark.parametrize("case", ONE_EACH + BY_ROWS, ids=lambda c: c.id)
@pytest.mark.parametrize(
    ("memory", "fuse"), [("2GiB", "numpy"), ("512MiB", "fused"), ("300MiB", "numpy")]
)
def test_measured_peak_is_below_the_projected_one(
    case: Case, memory: str, fuse: str, values: list[NDArray[np.uint16]], tmp_path: Path
) -> None:
    projected, measured = measured_peak(recipe_of(tmp_path, case, values), memory, fuse)
    assert measured <= projected


@pytest.mark.parametrize("fuse", ["numpy", "fused"])
def test_measured_peak_of_a_merge_of_merges_is_below_the_projected_one(
    fuse: str, values: list[NDArray[np.uint16]], tmp_path: Path
) -> None:
    ties = next(case for case in CASES if case.method == "ties")
    inner = recipe_of(tmp_path, ties, values).read_text()
    outer = inner.replace("model: m0", "model: x")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: x\n{inner}---\n{outer}")
    command = [sys.executable, "-c", RUN, str(recipe), "512MiB", fuse]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    projected, measured = map(int, done.stdout.split())
    assert measured <= projected


@pytest.mark.parametrize("shape", [(2 << 20, 8), (4, 4 << 20)], ids=["short rows", "long rows"])
@pytest.mark.parametrize("fuse", ["numpy", "fused"])
def test_peak_holds_for_numbers_of_rows(shape: tuple[int, int], fuse: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = [stored(random.standard_normal(shape, dtype=np.float32), "BF16") for _ in range(2)]
    recipe = recipe_of(tmp_path, Case("arcee_fusion", 2), values)
    projected, measured = measured_peak(recipe, "2GiB", fuse)
    assert measured <= projected


def test_the_smallest_cap_named_is_the_smallest_that_works(
    values: list[NDArray[np.uint16]], tmp_path: Path
) -> None:
    plan = plan_recipe(recipe_of(tmp_path, ONE_EACH[-1], values))
    with pytest.raises(
        PlanError, match=r"--memory 8MiB is too small for this merge; \d+MiB"
    ) as error:
        make_budget(plan, "8MiB")
    least = int(str(error.value).split("; ")[1].split("MiB")[0])
    assert make_budget(plan, f"{least}MiB").peak <= least << 20
    with pytest.raises(PlanError):
        make_budget(plan, f"{least - 1}MiB")


def test_peak_never_exceeds_the_cap_and_more_memory_is_used(
    values: list[NDArray[np.uint16]], tmp_path: Path
) -> None:
    plan = plan_recipe(recipe_of(tmp_path, next(c for c in CASES if c.method == "ties"), values))
    before = 0
    for memory in (256, 300, 400, 600, 1000, 4000):
        budget = make_budget(plan, f"{memory}MiB", threads=2)
        assert budget.peak <= memory << 20
        assert budget.threads * max(budget.block, 1) + budget.hold >= before
        before = budget.threads * max(budget.block, 1) + budget.hold


@pytest.mark.parametrize("fuse", ["numpy", "fused"])
def test_measured_peak_with_other_tokens_is_below_the_projected_one(
    fuse: str, values: list[NDArray[np.uint16]], tmp_path: Path
) -> None:
    """Rows are picked from all over an embedding; vocabularies of 4096 tokens are read for it."""
    order = np.random.default_rng(1).permutation(SHAPE[0])
    for number, name in enumerate(("base", "m0", "m1")):
        write_model(tmp_path / name, {EMBEDDING: ("BF16", values[number])})
        texts = [f"t{i}" for i in (order if number else sorted(order))]
        texts[-8:] = [f"<{name}{i}>" for i in range(8)]
        model = {
            "type": "WordLevel",
            "unk_token": texts[0],
            "vocab": {t: i for i, t in enumerate(texts)},
        }
        (tmp_path / name / "tokenizer.json").write_text(
            json.dumps({"added_tokens": [], "model": model})
        )
    ties = next(case for case in CASES if case.method == "ties")
    recipe = write_recipe(
        tmp_path / "r.yaml", models={f"m{i}": {"weight": 0.5, "density": 0.5} for i in (0, 1)},
        merge_method=ties.method, base_model="base", tokenizer={"source": "base"},
    )  # fmt: skip
    projected, measured = measured_peak(recipe, "512MiB", fuse)
    assert measured <= projected
