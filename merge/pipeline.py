"""The main job, top to bottom: recipe -> plan -> stream -> write -> verify -> score."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from merge.agreement import canonical
from merge.budget import DEFAULT_MEMORY, Budget, keep_freed_memory, make_budget
from merge.carry import CARD, carry_files, model_card, provenance, told_inputs
from merge.errors import OutputError, PlanError
from merge.plan import Operand, Plan, make_plan, model_labels, output_folder
from merge.recipe import Recipe, load_recipe
from merge.sources.model import Model, locate, open_model, read_json
from merge.stream import StepDigests, run
from merge.verify import PROVENANCE, provenance_of, stored_digest, verify_folder
from merge.write import PartialFolder, check_own, input_stamps, partial_of


class Progress(Protocol):
    """A stage of long work: called with its name and size in bytes, gives a function that counts."""

    def __call__(self, stage: str, total: int) -> Any: ...


@contextmanager
def quiet(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


@dataclass(frozen=True)
class Result:
    """A finished merge: its folder, its plan, whether it was there already, what was verified."""

    folder: Path
    plan: Plan
    budget: Budget
    existed: bool
    verified: dict[str, Any]


def plan_recipe(file: Path | str, *, offline: bool = False, peek: bool = False) -> Plan:
    """The plan of a recipe file; opens its models. Raises RequestError.

    peek: of models on the hub only the headers are fetched; such a plan can be shown but not run.
    """
    recipe = load_recipe(file)
    models = [_opened(label, recipe, offline, peek) for label in model_labels(recipe)]
    return make_plan(recipe, models)


def _opened(label: str, recipe: Recipe, offline: bool, peek: bool) -> Model:
    from merge.sources import hub

    beside = [Path(recipe.file).parent]
    fetching = partial(hub.fetch, offline=offline)
    return open_model(label, beside, fetching, partial(hub.peek, offline=offline) if peek else None)


def open_for_scoring(name: str, *, offline: bool = False) -> Path:
    """The folder of the model that `name` says: a folder, zoo:NAME or a hub id, which is fetched."""
    from merge.sources import hub

    folder, _ = locate(name, fetch=partial(hub.fetch, offline=offline))
    read_json(folder / "config.json")
    return folder


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
    progress: Progress = quiet,
) -> Result:
    """Merges, writes and verifies what the recipe in `file` asks for; goes on where a run was cut off.

    Raises RequestError before anything is written, RunError afterwards.
    """
    keep_freed_memory()
    plan = plan_recipe(file, offline=offline)
    budget = make_budget(plan, memory, threads, fuse=fuse)
    folder = _usable(output_folder(plan.recipe, output), plan)
    check_own(partial_of(folder))
    if not overwrite and _is_there_already(folder, plan, budget, progress):
        shutil.rmtree(partial_of(folder), ignore_errors=True)
        return Result(folder, plan, budget, True, _verified(folder, budget, progress))
    check_disk(plan, folder)
    with PartialFolder(folder, plan, restart=restart) as growing:
        pending = list(growing.pending())
        size = sum(s.nbytes + sum(o.info.nbytes for o in s.inputs) for s in pending)
        with progress("merge", size) as count:
            run(plan, budget, growing, pending, count)
        growing.close_files()
        carry_files(plan, growing.model)
        growing.write_text(CARD, model_card(plan))
        growing.write_text(PROVENANCE, provenance(plan, growing.digests, input_stamps(plan)))
        verified = _verified(growing.model, budget, progress)
        growing.publish()
    return Result(folder, plan, budget, False, verified | {"folder": str(folder)})


def _verified(folder: Path, budget: Budget, progress: Progress) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with progress("verify", size) as count:
        return verify_folder(folder, threads=budget.threads, progress=count)


def _usable(folder: Path, plan: Plan) -> Path:
    """`folder`, links followed; raises OutputError where no output can go."""
    try:
        if folder.is_symlink() or folder.name in ("", ".."):
            folder = folder.resolve()
        whole = folder.resolve()
        partial_of(whole).exists()
    except (OSError, ValueError) as error:  # a name that is too long, or none
        reason = getattr(error, "strerror", None) or "has no name"
        raise OutputError(
            f"{folder}: is no place for a model ({reason}); choose another output"
        ) from None
    for part in (whole, *whole.parents):
        if part.exists() and not part.is_dir():
            raise OutputError(f"{part}: is a file; choose another output")
    for model in plan.models:
        if model.folder.resolve() in (whole, *whole.parents):
            raise OutputError(
                f"{folder}: is or lies in the folder of {model.label}; choose another output"
            )
        if whole in model.folder.resolve().parents:
            raise OutputError(
                f"{folder}: the folder of {model.label} lies in it; choose another output"
            )
    return folder


def _is_there_already(folder: Path, plan: Plan, budget: Budget, progress: Progress) -> bool:
    """Whether `folder` is this very merge of these very inputs; OutputError when it is something else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    made = provenance_of(folder)
    if made is None:
        raise OutputError(
            f"{folder}: exists and was not made by mergetool; choose another output, or give "
            f"--overwrite to replace it"
        )
    same = made["plan"] == plan.digest and canonical(made.get("input_sizes")) == canonical(
        _input_sizes(plan)
    )
    if not same or made.get("inputs") != told_inputs(plan, _input_digests(plan, budget, progress)):
        raise OutputError(
            f"{folder}: holds a finished merge of another recipe or of other models; choose "
            f"another output, or give --overwrite to replace it"
        )
    return True


def _input_digests(plan: Plan, budget: Budget, progress: Progress) -> dict[str, StepDigests]:
    """Digests of all inputs as they are now: another model of the same name and size is another merge."""

    def digest(operand: Operand) -> str:
        info = operand.info
        descriptor = os.open(info.file, os.O_RDONLY)
        try:
            found = stored_digest(descriptor, info.offset, info.shape, info.dtype)
        finally:
            os.close(descriptor)
        count(info.nbytes)
        return found or ""

    with progress("compare", plan.read_bytes) as count, ThreadPoolExecutor(budget.threads) as pool:
        found = [list(pool.map(digest, step.inputs)) for step in plan.steps]
    return {s.name: StepDigests("", tuple(f)) for s, f in zip(plan.steps, found, strict=True)}


def _input_sizes(plan: Plan) -> dict[str, dict[str, int]]:
    return {m.public_name: {f.name: f.stat().st_size for f in m.files()} for m in plan.models}


def check_disk(plan: Plan, folder: Path) -> None:
    """Raises PlanError when the disk under `folder` cannot hold the output."""
    there = sum(f.stat().st_blocks * 512 for f in partial_of(folder).glob("model/*.safetensors"))
    missing = plan.write_bytes - there - free_bytes(folder)
    if missing > 0:
        raise PlanError(
            f"{folder}: the merge takes {shown_bytes(plan.write_bytes)} and the disk has "
            f"{shown_bytes(free_bytes(folder))} free; free {shown_bytes(missing)} or choose another output"
        )


def shown_bytes(size: int) -> str:
    """`size` in the unit that suits it."""
    for unit, divisor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= divisor // 10:
            return f"{size / divisor:.2f} {unit}"
    return f"{size} bytes"


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk on which `folder` lies or will lie."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
