"""A recipe whose result is an adapter: what its merge changes of the base, layer by layer, in factors."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from merge.adapters.alone import Sum, are_known, known_sums
from merge.adapters.delta import BLOCK_GRAINS, Delta
from merge.adapters.journal import Run
from merge.adapters.modules import Modules, asked_modules
from merge.adapters.write import Report, write_adapter
from merge.budget import PER_INPUT, RESERVED, Budget, reading_bytes, threads_and_cap
from merge.carry import told_plan
from merge.errors import NonFiniteError, PlanError
from merge.lowrank import factoring_bytes, joining_bytes
from merge.numerics import FLOATS, Array, grain_rows, rows_and_cols, to_float32
from merge.plan import Operand, Plan, Step
from merge.reader import Reader
from merge.sections import AdapterSection
from merge.sources import TensorInfo
from merge.sources.model import ADAPTER, ADAPTER_WEIGHTS, Model
from merge.verify import PROVENANCE, file_digest, verify_adapter
from merge.write import MODEL, input_stamps, partial_of

BLOCK_ARRAYS = 8 + 6 * 4  # bytes an element of a block: wide, and read, widened and subtracted
BLAS = 48 << 20  # bytes: what the first matrix product takes; 38 MiB measured


def adapter_budget(plan: Plan, memory: str, threads: int | None = None) -> Budget:
    """As budget.make_budget, for a plan whose result is an adapter; raises PlanError."""
    wanted, cap = threads_and_cap(memory, threads)
    for count in range(wanted, 0, -1):
        if (peak := _peak(plan, count)) <= cap:
            return Budget(count, 0, 0, 0, peak, fuse=False)
    least = -(-_peak(plan, 1) >> 20)
    raise PlanError(
        f"--memory {memory} is too small for this adapter; {least}MiB is the least that would do"
        + (
            ""
            if _section(plan).rank
            else "; adapter.rank, the most that a layer may have, takes less"
        )
    )


def check_wanted(plan: Plan) -> None:
    """Raises PlanError where neither rank nor energy says how much is kept, and not all factors are known."""
    section = _section(plan)
    if section.rank is None and section.energy is None and not are_known(plan):
        raise PlanError(
            f"{plan.recipe.where('adapter')}: give a rank or an energy; what this merge changes is no sum of "
            "the factors of adapters"
        )


def run_adapter(
    plan: Plan,
    budget: Budget,
    out: Path,
    inputs: Sequence[Mapping[str, Any]] = (),
    *,
    restart: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda count: None,
    ask: Callable[[Model], Modules] = asked_modules,
) -> tuple[Report, dict[str, Any]]:
    """Writes the adapter and verifies it; goes on where a run was cut off. Raises PlanError where PEFT has no
    place for what changed.

    inputs: what the provenance tells of them. ask: gives the modules that transformers makes of the base.
    """
    assert plan.base is not None
    base, section, stamps = plan.models[plan.base], _section(plan), input_stamps(plan)
    beside = partial(_provenance, plan, stamps, inputs, out)
    report = write_adapter(
        deltas_of(plan), base, ask(base), out, rank=section.rank, energy=section.energy,
        drop=section.drop, threads=budget.threads,
        run=Run(plan.digest, stamps, beside, progress, restart, overwrite),
    )  # fmt: skip
    return report, verify_adapter(out)


def deltas_of(plan: Plan) -> dict[str, Delta]:
    """What the merge of `plan` changes of its base, by tensor name."""
    reader, known = Reader(plan, fuse=False), known_sums(plan)
    return {step.name: _delta(plan, reader, step, known.get(step.name)) for step in plan.steps}


def _delta(plan: Plan, reader: Reader, step: Step, known: Sum | None) -> Delta:
    origin = plan.origins.get(step.name)
    dtype = plan.recipe.out_dtype or (origin.info.written if origin else step.dtype)
    dtype = dtype if step.dtype in FLOATS else step.dtype
    tuned = partial(_rows, reader, _result(step), step)
    if origin is None or origin.info.shape != step.shape:
        return Delta(step.shape, dtype, tuned, None)

    def difference(first: int, end: int) -> Array:
        return tuned(first, end) - _rows(reader, origin, step, first, end)

    return Delta(step.shape, dtype, tuned, difference, known)


def _result(step: Step) -> Operand:
    """A step's own tensor, for a Reader."""
    return Operand(-1, step.name, TensorInfo(step.dtype, step.shape), step)


def _rows(reader: Reader, operand: Operand, step: Step, first: int, end: int) -> Array:
    rows = to_float32(reader.rows(operand, first, end), operand.info.dtype)
    if not np.isfinite(rows).all():
        raise NonFiniteError(f"{step.name}: holds NaN or infinity; repair the models")
    return rows


def _section(plan: Plan) -> AdapterSection:
    section = plan.recipe.sections.adapter
    assert section is not None
    return section


def _peak(plan: Plan, threads: int) -> int:
    """Projected bytes: for each thread a block of what is read, and the factors of one layer."""
    reserved = RESERVED + BLAS + PER_INPUT * sum(len(step.inputs) for step in plan.steps)
    reserved += sum(model.source.held for model in plan.models)
    known = known_sums(plan)
    distinct = {
        (step.shape, step.copy, tuple(o.info.dtype for o in step.inputs), step.name in known): step
        for step in plan.steps
    }
    return reserved + max(
        threads * _block_bytes(plan, step) + _factors_bytes(plan, step, known, threads)
        for step in distinct.values()
    )


def _factors_bytes(plan: Plan, step: Step, known: Mapping[str, Sum], threads: int) -> int:
    section, shape = _section(plan), rows_and_cols(step.shape)
    if step.name in known:
        return joining_bytes(shape, max(each.rank for each in known.values()))
    return factoring_bytes(shape, section.rank, threads)


def _block_bytes(plan: Plan, step: Step) -> int:
    rows, cols = rows_and_cols(step.shape)
    rows = min(rows, BLOCK_GRAINS * grain_rows(step.shape))
    return rows * cols * BLOCK_ARRAYS + reading_bytes(plan, _result(step), rows)


def _provenance(
    plan: Plan,
    stamps: Mapping[str, list[int]],
    inputs: Sequence[Mapping[str, Any]],
    out: Path,
    report: Report,
) -> dict[str, str]:
    """mergetool.json: what was merged and extracted, and the digests of inputs and files."""
    folder = partial_of(out) / MODEL
    data = {
        **told_plan(plan, inputs, stamps),
        "error": report.error,
        "files": {file: file_digest(folder / file) for file in (ADAPTER_WEIGHTS, ADAPTER)},
    }
    return {PROVENANCE: json.dumps(data, indent=1, ensure_ascii=False) + "\n"}
