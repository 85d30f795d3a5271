"""Is the output folder a place for this merge: free, large enough, or this very merge already?"""

import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from merge.agreement import canonical
from merge.budget import Budget
from merge.carry import carried_digests, input_sizes, told_inputs, versions_of
from merge.errors import OutputError, PlanError
from merge.plan import Operand, Plan
from merge.reader import Reader
from merge.search import LOCK
from merge.verify import provenance_of
from merge.write import input_stamps, layout, partial_of

SPARE_FILES = 64  # of the interpreter, libraries, journal and lock


class Progress(Protocol):
    """A stage of long work: called with its name and size in bytes, gives a context whose value is
    called with every number of bytes done."""

    def __call__(self, stage: str, total: int) -> AbstractContextManager[Callable[[int], None]]: ...


def usable(folder: Path, plan: Plan) -> Path:
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
    if whole.exists() and whole.is_mount():
        raise OutputError(f"{folder}: is a mount point; choose a folder in it")
    if (whole / LOCK).exists():
        what = (
            "holds a search (mergetool evolve or sweep goes on with it, mergetool report shows it)"
        )
        raise OutputError(f"{folder}: {what}; choose another output")
    for model in plan.models:
        for read in (model.folder, *(file.parent for file in model.beside)):
            if read.resolve() in (whole, *whole.parents):
                what = f"is or lies in the folder of {model.label}"
                raise OutputError(f"{folder}: {what}; choose another output")
            if whole in read.resolve().parents:
                what = f"the folder of {model.label} lies in it"
                raise OutputError(f"{folder}: {what}; choose another output")
    return folder


def check_replaceable(folder: Path, recipe: Path) -> None:
    """Raises OutputError when --overwrite would delete something else than a model."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    whole = folder.resolve()
    for place, what in (
        (Path.cwd(), "the current folder"),
        (recipe.resolve().parent, "the recipe"),
    ):
        if whole in (place, *place.parents):
            raise OutputError(f"{folder}: holds {what}; choose another output")
    if not is_replaceable(folder):
        raise OutputError(
            f"{folder}: holds no model, and --overwrite replaces nothing else; choose another output"
        )


def is_replaceable(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, which --overwrite replaces."""
    configs = (folder / "config.json", folder / "adapter_config.json")
    is_model = any(map(Path.is_file, configs)) and any(folder.glob("*.safetensors"))
    return is_model or provenance_of(folder) is not None


def _or_overwrite(folder: Path) -> str:
    """What else can be done about a folder that is taken."""
    return ", or give --overwrite to replace it" if is_replaceable(folder) else ""


def is_there_already(folder: Path, plan: Plan, budget: Budget, progress: Progress) -> bool:
    """Whether `folder` is this very merge of these very inputs; OutputError when it is something else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    made = provenance_of(folder)
    if made is None:
        raise OutputError(
            f"{folder}: exists and was not made by mergetool; choose another output{_or_overwrite(folder)}"
        )
    same = made["plan"] == plan.digest and canonical(made.get("input_sizes")) == canonical(
        input_sizes(plan, input_stamps(plan))
    )
    files = made.get("files")
    carried = isinstance(files, dict) and carried_digests(plan).items() <= files.items()
    operands = [operand for step in plan.steps for operand in step.inputs]

    def inputs() -> list[dict[str, Any]]:
        found = _digested(plan, operands, budget.threads, progress, fuse=budget.fuse)
        return told_inputs(plan, found)

    found = inputs() if same and carried else []
    if found and made.get("inputs") == found:
        return True
    if found and _only_computed_otherwise(plan, made, found):
        raise OutputError(
            f"{folder}: is this merge, made by {_shown(made['versions'])}, and {_shown(versions_of(plan))} "
            "compute some of its inputs otherwise; keep it, choose another output, or give --overwrite to "
            "make it anew"
        )
    raise OutputError(
        f"{folder}: holds a finished merge of another recipe or of other models; choose "
        f"another output, or give --overwrite to replace it"
    )


def _only_computed_otherwise(
    plan: Plan, made: Mapping[str, Any], found: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether an earlier merge differs in nothing but what other versions have computed on the way."""
    before, versions = made.get("inputs"), made.get("versions")
    if versions == versions_of(plan) or not isinstance(versions, dict):
        return False
    stored = [i for i, model in enumerate(plan.models) if not model.computed]
    if not isinstance(before, list) or len(before) != len(found):
        return False
    return all(before[i] == found[i] for i in stored)


def _shown(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def is_adapter_there(folder: Path, plan: Plan, threads: int, progress: Progress) -> bool:
    """As is_there_already, for a plan whose result is an adapter."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    made = provenance_of(folder)
    same = made is not None and made["plan"] == plan.digest
    if same and made and made.get("inputs") == adapter_inputs(plan, threads, progress):
        return True
    raise OutputError(
        f"{folder}: exists and is not this adapter; choose another output{_or_overwrite(folder)}"
    )


def adapter_inputs(plan: Plan, threads: int, progress: Progress) -> list[dict[str, Any]]:
    """As carry.told_inputs, of what is merged and what it is compared with."""
    origins = [plan.origins[step.name] for step in plan.steps if step.name in plan.origins]
    operands = [operand for step in plan.steps for operand in step.inputs]
    return told_inputs(plan, _digested(plan, [*origins, *operands], threads, progress, fuse=False))


def _digested(
    plan: Plan, operands: Sequence[Operand], threads: int, progress: Progress, *, fuse: bool
) -> list[tuple[Operand, str]]:
    """Digests of inputs as they are now: another model of the same name and size is another merge."""
    reader = Reader(plan, fuse=fuse)

    def digest(operand: Operand) -> tuple[Operand, str]:
        found = reader.digest(operand)
        count(operand.info.nbytes)
        return operand, found

    size = sum(operand.info.nbytes for operand in operands)
    with progress("compare", size) as count, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(digest, operands))


def check_disk(plan: Plan, folder: Path) -> None:
    """Raises PlanError when the disk under `folder` cannot hold the output."""
    there = sum(f.stat().st_blocks * 512 for f in partial_of(folder).glob("model/*.safetensors"))
    missing = plan.write_bytes - there - free_bytes(folder)
    if missing > 0:
        raise PlanError(
            f"{folder}: the merge takes {shown_bytes(plan.write_bytes)} and the disk has "
            f"{shown_bytes(free_bytes(folder))} free; free {shown_bytes(missing)} or choose another output"
        )


def check_open_files(plan: Plan) -> None:
    """Allows itself as many open files as the system does; PlanError where that is too few."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    needed = sum(len(model.files()) for model in plan.models) + len(layout(plan)) + SPARE_FILES
    if needed > most != resource.RLIM_INFINITY:
        raise PlanError(
            f"the merge keeps {needed} files open and the system allows {most}; "
            "raise the limit (ulimit -n) or shard_size"
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
