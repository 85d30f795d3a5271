"""The main job, top to bottom: recipe -> plan -> stream -> write -> verify -> score."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from merge.adapters.alone import on_zeros
from merge.adapters.run import adapter_budget, check_wanted, run_adapter
from merge.ancestry import ancestry_notes
from merge.budget import (
    DEFAULT_MEMORY,
    Budget,
    keep_freed_memory,
    make_budget,
    threads_and_cap,
)
from merge.carry import CARD, carry_files, model_card, provenance
from merge.errors import SourceError
from merge.experts.checks.loading import check_loads
from merge.experts.names import former_base
from merge.experts.routers.alike import notes_on_routers
from merge.experts.telling import mixture_card
from merge.experts.xlora.writing import is_adapters, run_peft
from merge.lines import nearest
from merge.output import (
    Progress,
    adapter_inputs,
    check_disk,
    check_open_files,
    check_replaceable,
    is_adapter_there,
    is_there_already,
    usable,
)
from merge.plan import Plan, output_folder
from merge.planner import make_plan, model_labels
from merge.recipe import Recipe, load_recipe
from merge.sources.model import Model
from merge.sources.opening import is_adapter, open_model
from merge.stream import run
from merge.verify import PROVENANCE, provenance_of, verify_adapter, verify_folder
from merge.write import PartialFolder, check_own, discard_leftover, partial_of


@contextmanager
def quiet(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


@dataclass(frozen=True)
class Result:
    """A finished merge: its folder, its plan, whether it was there already, how many tensors an
    interrupted run had finished, what was verified, what is told of rows that no model had, and what there is
    to note about what was made."""

    folder: Path
    plan: Plan
    budget: Budget
    existed: bool
    taken_up: int
    verified: dict[str, Any]
    rows_made: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def plan_recipe(
    file: Path | str, *, memory: str = DEFAULT_MEMORY, offline: bool = False, peek: bool = False
) -> Plan:
    """The plan of a recipe file; opens its models. Raises RequestError.

    memory: what looking at their vocabularies may take.

    peek: of models on the hub only the headers are fetched; such a plan can be shown but not run.
    """
    return plan_parsed(load_recipe(file), memory=memory, offline=offline, peek=peek)


def plan_parsed(
    recipe: Recipe,
    *,
    memory: str = DEFAULT_MEMORY,
    offline: bool = False,
    peek: bool = False,
    opened: dict[str, Model] | None = None,
) -> Plan:
    """As plan_recipe. opened: models that stay open from plan to plan, by label; new ones are added."""
    known = {} if opened is None else opened
    for label in model_labels(recipe):
        try:
            if label not in known:
                known[label] = _opened(label, recipe, offline, peek)
        except SourceError as error:
            raise SourceError(
                f"{_where_model(recipe, label)}: {_lending(recipe, label)}{error}"
            ) from None
    models = {label: known[label] for label in model_labels(recipe)}
    plan = make_plan(recipe, models, threads_and_cap(memory, None)[1])
    if recipe.sections.adapter:
        if zeros := on_zeros(plan, recipe, models):
            plan = make_plan(recipe, zeros)
        check_wanted(plan)
    return replace(plan, notes=(*plan.notes, *ancestry_notes(plan)))


def _lending(recipe: Recipe, label: str) -> str:
    """What is wrong with a vocabulary's source that is no model, before why it is none."""
    if label != recipe.outside_source:
        return ""
    near, models = nearest(label, ["base", "union", *recipe.labels]), ", ".join(recipe.labels)
    allowed = f"base, union, one of {models} or another model"
    return f"the source of tokens is {label!r}{near}; it must be {allowed}: "


def _where_model(recipe: Recipe, label: str) -> str:
    every = (recipe, *recipe.stages.values())
    named = (each for each in every if label in (*each.labels, *each.expert_labels))
    return next(named, recipe).where_model(label)


def _opened(label: str, recipe: Recipe, offline: bool, peek: bool) -> Model:
    from merge.sources import hub

    beside = [Path(recipe.file).parent]
    whole = label
    in_stages = any(label in stage.labels for stage in recipe.stages.values())
    if recipe.sections.adapter and not in_stages and is_adapter(label, beside):
        whole = f"{recipe.sections.base_model}+{label}"
    model = open_model(
        whole,
        beside,
        partial(hub.fetch, offline=offline),
        partial(hub.peek, offline=offline) if peek else None,
        partial(hub.fetch_adapter, offline=offline),
        former_base if recipe.sections.mixture else None,
        headless=recipe.sections.saved_modules == "base" and label in recipe.expert_labels,
    )
    return replace(model, label=label)


def budget_of(
    plan: Plan, memory: str, threads: int | None = None, *, fuse: bool | None = None
) -> Budget:
    """How `plan` fits into `memory`; raises PlanError."""
    if plan.recipe.sections.adapter:
        return adapter_budget(plan, memory, threads)
    return make_budget(plan, memory, threads, fuse=fuse)


def run_recipe(
    file: Path | str,
    output: Path | None = None,
    *,
    memory: str = DEFAULT_MEMORY,
    threads: int | None = None,
    restart: bool = False,
    overwrite: bool = False,
    offline: bool = False,
    fuse: bool | None = None,
    load: bool = True,
    progress: Progress = quiet,
    about: str = "",
    planned: Callable[[Plan], None] = lambda plan: None,
) -> Result:
    """Merges, writes and verifies what the recipe in `file` asks for; goes on where a run was cut off.

    load: a mixture is also loaded with transformers before it is put in its place. about: the end of the
    model card. planned: is called with the plan before anything is written, and may raise RequestError.

    Raises RequestError before anything is written, RunError afterwards.
    """
    plan = plan_recipe(file, memory=memory, offline=offline)
    planned(plan)
    keep_freed_memory()
    budget = budget_of(plan, memory, threads, fuse=fuse)
    if plan.recipe.sections.adapter or is_adapters(plan):
        return _run_adapter(plan, budget, output, restart, overwrite, progress)
    folder = usable(output_folder(plan.recipe, output), plan)
    check_own(partial_of(folder))
    if overwrite:
        check_replaceable(folder, Path(plan.recipe.file))
    elif is_there_already(folder, plan, budget, progress):
        discard_leftover(folder)
        verified = _verified(folder, budget, progress)
        notes = tuple(notes_on_routers(plan, folder))
        return Result(folder, plan, budget, True, 0, verified, _rows_made(folder), notes)
    check_disk(plan, folder)
    check_open_files(plan)
    reads = None if plan.tokens else plan.models[plan.donor].folder  # as the base does
    check = partial(check_loads, like=reads) if load and plan.recipe.mixes else None
    card = mixture_card(plan) if plan.recipe.mixes else model_card(plan)
    verified, taken_up = written(
        plan, budget, folder, card + about, restart=restart, progress=progress, check=check
    )
    notes = (*verified.pop("notes", ()), *notes_on_routers(plan, folder))
    return Result(folder, plan, budget, False, taken_up, verified, _rows_made(folder), notes)


def written(
    plan: Plan,
    budget: Budget,
    folder: Path,
    card: str,
    *,
    restart: bool,
    progress: Progress,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], int]:
    """Writes the plan's model with this card into `folder`, verified and whole; (what was verified, how many
    tensors an interrupted run had finished). Raises RunError.

    check: looks at the model before it is put in its place, as check_loads does: names that transformers does
    not know stay random there.
    """
    with PartialFolder(folder, plan, threads=budget.threads, restart=restart) as growing:
        pending = list(growing.pending())
        size = sum(s.nbytes + sum(o.info.nbytes for o in s.inputs) for s in pending)
        with progress("merge", size) as count:
            run(plan, budget, growing, pending, count)
        carry_files(plan, growing.model)
        growing.close_files()
        growing.write_text(CARD, card)
        growing.write_text(PROVENANCE, provenance(plan, growing.digests, growing.inputs))
        verified = _verified(growing.model, budget, progress, read_back=growing.offsets())
        if check:
            verified |= check(growing.model)
        growing.publish()
    return verified | {"folder": str(folder)}, len(plan.steps) - len(pending)


def _run_adapter(
    plan: Plan,
    budget: Budget,
    output: Path | None,
    restart: bool,
    overwrite: bool,
    progress: Progress,
) -> Result:
    """As run_recipe, where the recipe says that the result is an adapter, or adapters for PEFT."""
    folder = usable(output_folder(plan.recipe, output), plan)
    check_own(partial_of(folder))
    if overwrite:
        check_replaceable(folder, Path(plan.recipe.file))
    elif is_adapter_there(folder, plan, budget.threads, progress):
        discard_leftover(folder)
        return Result(folder, plan, budget, True, 0, verify_adapter(folder))
    check_open_files(plan)
    inputs = adapter_inputs(plan, budget.threads, progress)
    if is_adapters(plan):
        check_disk(plan, folder)
        with progress("copy", 2 * plan.write_bytes) as count:
            verified = run_peft(plan, folder, inputs, restart=restart, progress=count)
        return Result(folder, plan, budget, False, 0, verified)
    size = 2 * sum(4 * step.rows * step.cols for step in plan.steps)
    with progress("extract", size) as count:
        report, verified = run_adapter(
            plan, budget, folder, inputs, restart=restart, overwrite=overwrite, progress=count
        )
    verified |= {"layers": len(report.adapted), "error": report.error}
    return Result(folder, plan, budget, False, 0, verified)


def _rows_made(folder: Path) -> tuple[dict[str, Any], ...]:
    """For each tensor how many rows were made how, and their median error; the single errors stay there."""
    told = (provenance_of(folder) or {}).get("rows_made", ())
    return tuple({key: made[key] for key in made if key != "errors"} for made in told)


def _verified(
    folder: Path, budget: Budget, progress: Progress, *, read_back: Mapping[str, int] | None = None
) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with progress("verify", size) as count:
        return verify_folder(folder, threads=budget.threads, read_back=read_back, progress=count)
