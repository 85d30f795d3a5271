"""The main job, top to bottom: recipe -> plan -> stream -> write -> verify -> score."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
import shutil
from typing import Any, Protocol

from merge.agreement import canonical
from merge.budget import DEFAULT_MEMORY, Budget, keep_freed_memory, make_budget
from merge.carry import CARD, carry_files, model_card, provenance
from merge.errors import OutputError, PlanError
from merge.plan import Plan, make_plan, model_labels, output_folder
from merge.recipe import Recipe, load_recipe
from merge.sources.model import open_model
from merge.stream import run
from merge.verify import PROVENANCE, provenance_of, verify
from merge.write import PartialFolder, input_stamps


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


def plan_recipe(file: Path | str, *, offline: bool = False) -> Plan:
    """The plan of a recipe file; opens its models. Raises RequestError."""
    recipe = load_recipe(file)
    return make_plan(recipe, [_opened(label, recipe, offline) for label in model_labels(recipe)])


def _opened(label: str, recipe: Recipe, offline: bool) -> Any:
    from merge.sources.hub import fetch

    beside = Path(recipe.file).parent
    return open_model(label, [beside], lambda repo, revision: fetch(repo, revision, offline=offline))


def run_recipe(
    file: Path | str,
    output: Path | None = None,
    *,
    memory: str = DEFAULT_MEMORY,
    threads: int | None = None,
    restart: bool = False,
    overwrite: bool = False,
    offline: bool = False,
    progress: Progress = quiet,
) -> Result:
    """Merges, writes and verifies what the recipe in `file` asks for; goes on where a run was cut off.

    Raises RequestError before anything is written, RunError afterwards.
    """
    keep_freed_memory()
    plan = plan_recipe(file, offline=offline)
    folder = output_folder(plan.recipe, output)
    budget = make_budget(plan, memory, threads)
    if _is_there_already(folder, plan, overwrite):
        shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
        return Result(folder, plan, budget, True, _verified(folder, budget, progress))
    check_disk(plan, folder)
    with PartialFolder(folder, plan, restart=restart) as partial:
        pending = list(partial.pending())
        size = sum(s.nbytes + sum(o.info.nbytes for o in s.inputs) for s in pending)
        with progress("merge", size) as count:
            run(plan, budget, partial, pending, count)
        partial.close_files()
        carry_files(plan, partial.model)
        partial.write_text(CARD, model_card(plan))
        partial.write_text(PROVENANCE, provenance(plan, partial.digests, input_stamps(plan)))
        verified = _verified(partial.model, budget, progress)
        partial.publish()
    return Result(folder, plan, budget, False, verified | {"folder": str(folder)})


def _verified(folder: Path, budget: Budget, progress: Progress) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with progress("verify", size) as count:
        return verify(folder, threads=budget.threads, progress=count)


def _is_there_already(folder: Path, plan: Plan, overwrite: bool) -> bool:
    """Whether `folder` is this very merge; raises OutputError when it is something else."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; choose another output")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return False
    made = provenance_of(folder)
    if made is None:
        raise OutputError(f"{folder}: exists and was not made by mergetool; choose another output, or give --overwrite to replace it")
    if made["plan"] != plan.digest or canonical(made.get("input_sizes")) != canonical(_input_sizes(plan)):
        raise OutputError(f"{folder}: holds a finished merge of another recipe; choose another output, or give --overwrite to replace it")
    return True


def _input_sizes(plan: Plan) -> dict[str, dict[str, int]]:
    return {m.public_name: {f.name: f.stat().st_size for f in m.files()} for m in plan.models}


def check_disk(plan: Plan, folder: Path) -> None:
    """Raises PlanError when the disk under `folder` cannot hold the output."""
    partial = folder.with_name(folder.name + ".partial") / "model"
    there = sum(f.stat().st_blocks * 512 for f in partial.glob("*.safetensors")) if partial.is_dir() else 0
    missing = plan.write_bytes - there - free_bytes(folder)
    if missing > 0:
        raise PlanError(
            f"{folder}: the merge takes {plan.write_bytes / 1e9:.2f} GB and the disk has "
            f"{free_bytes(folder) / 1e9:.2f} GB free; free {missing / 1e9:.2f} GB or choose another output"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk on which `folder` lies or will lie."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
