"""What is known of the parents is not measured again, and changes no bit."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import drawn
from methods.cases import CASES, NAME, Case, write_case
from numpy.typing import NDArray

from merge.budget import Budget, make_budget
from merge.formula import Formula
from merge.methods import all_methods
from merge.numerics import Raw, to_float32
from merge.pipeline import plan_parsed, plan_recipe
from merge.plan import Plan, Step
from merge.recipe import parse_recipe
from merge.search.live import LiveModel, Shells
from merge.search.measured import ENTRY, Measured
from merge.stream import StepDigests, run

MEASURING = [case for case in CASES if all_methods()[case.method].statistics]
ROOM = 1 << 20


class Rows:
    """The values of a plan's tensors, as float32."""

    def __init__(self) -> None:
        self.found: dict[str, NDArray[np.float32]] = {}

    def place(self, step: Step, first: int, end: int) -> None:
        return None

    def write(self, step: Step, first_row: int, rows: Raw, digests: Sequence[bytes]) -> None:
        whole = self.found.setdefault(
            step.name, np.full((step.rows, step.cols), np.nan, np.float32)
        )
        whole[first_row : first_row + len(rows)] = to_float32(rows, step.dtype)

    def finished(self, step: Step, digests: StepDigests) -> None: ...


def made(plan: Plan, budget: Budget, measured: Measured) -> dict[str, NDArray[np.float32]]:
    rows = Rows()
    known = measured.of(plan, ROOM)
    run(plan, budget, rows, plan.steps, in_place=rows.place, memory=known)
    return rows.found


def otherwise(step: Step) -> Step:
    """The step with other values of everything that its statistics do not depend on."""
    measured_by = step.method.measures_by(step.parameters)
    free = {
        n for n in step.parameters if step.method.arguments({n: 0}).keys().isdisjoint(measured_by)
    }
    return replace(
        step,
        parameters={n: _other(v) if n in free else v for n, v in step.parameters.items()},
    )


def _other(value: Any) -> Any:
    if isinstance(value, list):
        return [_other(v) * (0.5 + 0.1 * i) for i, v in enumerate(value)]
    if isinstance(value, bool):
        return not value
    return 0.9 * value if isinstance(value, float) else value


def plan_of(folder: Path, case: Case, shape: tuple[int, int], dtype: str = "F32") -> Plan:
    values = [drawn(seed, {NAME: shape}) for seed in range(case.models + 1)]
    return plan_recipe(write_case(folder, case, values[1:], values[0], dtype))


@pytest.fixture
def passes(noted: Callable[..., list[str]]) -> list[str]:
    """The tensors over which statistics were measured, once for each pass."""
    return noted(Formula, "measuring", lambda formula: formula.step.name)


@pytest.mark.parametrize("case", MEASURING, ids=lambda case: case.id)
def test_other_weights_measure_nothing_and_give_the_bits_of_measuring(
    case: Case, tmp_path: Path, passes: list[str]
) -> None:
    plan = plan_of(tmp_path, case, (9, 7))
    other = replace(plan, steps=tuple(map(otherwise, plan.steps)))
    budget, measured = make_budget(plan, threads=1), Measured()
    made(plan, budget, measured)
    measured_once = len(passes)
    found = made(other, budget, measured)
    assert len(passes) == measured_once
    assert found[NAME].tobytes() == made(other, budget, Measured())[NAME].tobytes()


@pytest.mark.parametrize("method", ["slerp", "ties", "arcee_fusion"])
@pytest.mark.parametrize("fuse", [False, True])
def test_so_it_is_in_blocks_and_threads(
    method: str, fuse: bool, tmp_path: Path, passes: list[str]
) -> None:
    case = next(case for case in MEASURING if case.method == method)
    plan = plan_of(tmp_path, case, (300, 1000), "BF16")
    other = replace(plan, steps=tuple(map(otherwise, plan.steps)))
    budget, measured = make_budget(plan, threads=2, fuse=fuse), Measured()
    made(plan, replace(budget, block=0), measured)
    measured_once = len(passes)
    found = made(other, replace(budget, block=0), measured)
    assert len(passes) == measured_once > 0
    assert found[NAME].tobytes() == made(other, budget, Measured())[NAME].tobytes()


def test_what_statistics_depend_on_is_measured_again(tmp_path: Path, passes: list[str]) -> None:
    """Another density; another model in the place of one; no base."""
    case = Case("ties", 3, {"weight": [0.5, 0.3, 0.2], "density": [0.5, 0.7, 0.3]})
    plan = plan_of(tmp_path, case, (9, 7))
    budget, measured = make_budget(plan, threads=1), Measured()
    made(plan, budget, measured)
    (step,) = plan.steps
    first, second, third = step.operands
    for changed in (
        replace(step, parameters={**step.parameters, "density": [0.5, 0.7, 0.31]}),
        replace(step, operands=(first, third, second)),
        replace(step, base=first, operands=(second, third, second)),
    ):
        before = len(passes)
        other = replace(plan, steps=(changed,))
        found = made(other, budget, measured)
        assert len(passes) > before
        assert found[NAME].tobytes() == made(other, budget, Measured())[NAME].tobytes()
    measured.of(plan, 0)
    before = len(passes)
    made(plan, budget, measured)
    assert len(passes) > before, "there was no room to know it still"


METHODS: dict[str, dict[str, Any]] = {
    "slerp": {"base_model": "zoo:reverser"},
    "nuslerp": {"base_model": "zoo:base"},
    "multislerp": {},
    "karcher": {"parameters": {"max_iter": 2}},
    "model_stock": {"base_model": "zoo:base"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_live_model_is_the_same_whatever_was_known_before(method: str, passes: list[str]) -> None:
    shells, opened = Shells(torch.float32, "cpu"), {}  # type: ignore[var-annotated]

    def planned(t: float, dtype: str) -> Plan:
        models = [{"model": f"zoo:{name}"} for name in ("reverser", "sorter")]
        recipe: dict[str, Any] = {"merge_method": method, "models": models, "out_dtype": dtype}
        if method == "slerp":
            recipe["parameters"] = {"t": t}
        if "weight" in all_methods()[method].parameters:
            for model, weight in zip(models, (t, 1 - t), strict=True):
                model["parameters"] = {"weight": weight}  # type: ignore[assignment]
        text = yaml.safe_dump(recipe | METHODS[method])
        return plan_parsed(parse_recipe(text, "recipe.yaml"), opened=opened)

    first, second = planned(0.3, "float32"), planned(0.6, "bfloat16")
    shells.of(first).become(first, make_budget(first))
    measured = len(passes)
    shell = shells.of(second)
    shell.become(second, make_budget(second))
    assert len(passes) == measured >= len(first.steps)
    found = {name: value.clone() for name, value in shell.parameters.items()}
    LiveModel(shell.model, shell.tokenizer, shell.parameters).become(second, make_budget(second))
    assert len(passes) > measured
    assert all(torch.equal(found[name], value) for name, value in shell.parameters.items())


def test_no_more_is_kept_than_there_is_room_for_and_the_last_ones_are() -> None:
    size = ENTRY + 1000  # with about 150 bytes around the numbers
    measured, numbers = Measured(), np.zeros(105)
    for i in range(20):
        measured.keep(str(i), numbers, 5 * size)
        measured.known("0")
    kept = [i for i in range(20) if measured.known(str(i)) is not None]
    assert kept[0] == 0
    assert kept[1:] == list(range(20 - len(kept) + 1, 20))
    assert len(kept) in (4, 5)
    measured.keep("large", np.zeros(2000), 5 * size)
    assert measured.known("large") is None
    assert [i for i in range(20) if measured.known(str(i)) is not None] == kept
