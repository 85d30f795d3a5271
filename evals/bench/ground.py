"""Where a benchmark stands: its folder and models, its recipes, and `mergetool` as a command."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .measure import BenchError
from .models import SHAPES, write_model

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("base", "tune-a", "tune-b", "tune-c")
WEIGHTS = (0.5, 0.3, 0.2)
MARK = "finished.json"  # lies in a folder whose models are whole
FORMAT = 1  # of the models; raise it when the same shape gets other bytes


def environment() -> dict[str, str]:
    """This process's, with the checkout's packages first, kept compiled as those of an installed one are."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONDONTWRITEBYTECODE": ""}
    return dict(os.environ) | ours


def mergetool(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "merge.cli", *arguments]


def ask_plan(recipe: Path, *options: str) -> dict[str, Any]:
    """What `mergetool plan --json` says; raises BenchError."""
    answer: dict[str, Any] = json.loads(_child(mergetool("plan", str(recipe), "--json", *options)))
    return answer


def ask_comparison(a: Path, b: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(
        _child([sys.executable, "-m", "evals.bench.compare", str(a), str(b)])
    )
    return answer


def _child(command: Sequence[str]) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise BenchError(f"{' '.join(command[1:4])} failed: {''.join(last)}")
    return done.stdout


@contextmanager
def bench_folder(folder: Path | None, shape: str, keep: bool) -> Iterator[Path]:
    """A folder of our own for one shape, in `folder` or a temporary one; removed unless kept."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="mergetool-bench-") as made:
            yield Path(made)
        return
    place = folder.expanduser().absolute() / f"mergetool-bench-{shape}"
    if place.exists() and not keep:
        raise BenchError(f"{place}: exists; give --keep to use and keep it, or remove it")
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    finally:
        if not keep:
            shutil.rmtree(place)


def prepare_models(
    place: Path, shape_name: str, names: Sequence[str] = MODELS, *, sparse: bool, outputs: int
) -> list[Path]:
    """Folders of the models, the base first; whole ones are used again, others made anew.

    sparse: zeros that take no room. outputs: how many models the disk has to hold besides.
    """
    folders = [place / name for name in names]
    mark = place / MARK
    facts = {"format": FORMAT, "shape": shape_name, "models": list(names), "sparse": sparse}
    is_whole = mark.is_file() and json.loads(mark.read_text()) == facts
    size = SHAPES[shape_name].nbytes
    check_disk(place, size * (outputs + (0 if is_whole or sparse else len(names))))
    if is_whole:
        return folders
    mark.unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        write_model(folder, SHAPES[shape_name])
    if not sparse:
        print(f"writing {len(names)} models of {size / 1e9:.2f} GB", file=sys.stderr)
        arguments = [shape_name, *(str(folder) for folder in folders)]
        _child([sys.executable, "-m", "evals.bench.weights", *arguments])
    mark.write_text(json.dumps(facts))
    return folders


def check_disk(place: Path, needed: int) -> None:
    """Says how many bytes are needed and free; raises BenchError where they do not fit."""
    free = shutil.disk_usage(place).free
    print(f"{place}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free", file=sys.stderr)
    if needed * 1.02 > free:
        raise BenchError(f"{place}: too little room; name another disk with --folder")


def weight_files(folders: Sequence[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


@dataclass(frozen=True)
class Task:
    """What a method merges: `tunes` fine-tunes, on their base or the first as base, or without one; with
    parameters of each model (a place for its weight) and of all."""

    base: Literal["", "base", "first"]
    tunes: int
    own: str = ""
    shared: str = ""


WEIGHT, DENSITY = "weight: {weight}", "weight: {weight}, density: 0.5"
TASKS: Mapping[str, Task] = {
    "linear": Task("", 3, WEIGHT),
    "slerp": Task("first", 2, shared="t: 0.4"),
    "nuslerp": Task("", 2, WEIGHT),
    "multislerp": Task("", 3, WEIGHT),
    "karcher": Task("", 3),
    "task_arithmetic": Task("base", 3, WEIGHT),
    "ties": Task("base", 3, DENSITY),
    "dare_linear": Task("base", 3, DENSITY),
    "dare_ties": Task("base", 3, DENSITY),
    "della_linear": Task("base", 3, DENSITY),
    "della": Task("base", 3, DENSITY),
    "breadcrumbs": Task("base", 3, DENSITY),
    "breadcrumbs_ties": Task("base", 3, DENSITY),
    "sce": Task("base", 3, shared="select_topk: 0.5"),
    "ram": Task("base", 3),
    "ramplus_tl": Task("base", 3),
    "model_stock": Task("base", 3),
    "nearswap": Task("base", 1, shared="t: 0.001"),
    "arcee_fusion": Task("base", 1),
    "passthrough": Task("", 1),
}


def models_read(method: str, models: Sequence[Path]) -> list[Path]:
    """The models that the recipe of `method` reads; models: the base, then the fine-tunes."""
    task = TASKS[method]
    return [*models[: task.base == "base"], *models[1 : 1 + task.tunes]]


def recipe_text(method: str, models: Sequence[Path]) -> str:
    """A recipe that mergetool and mergekit read alike. models: the base, then three fine-tunes."""
    task, (base, *tunes) = TASKS[method], models
    lines = {"": [], "base": [f"base_model: {base}"], "first": [f"base_model: {tunes[0]}"]}[
        task.base
    ]
    lines += ["models:"]
    weights = (1.0, 1.0, 1.0) if method == "ties" else WEIGHTS
    for model, weight in zip(tunes[: task.tunes], weights, strict=False):
        lines += [f"  - model: {model}"]
        if task.own:
            lines += [f"    parameters: {{{task.own.format(weight=weight)}}}"]
    if task.shared:
        lines += [f"parameters: {{{task.shared}}}"]
    return _recipe(method, lines)


def _recipe(method: str, lines: Sequence[str]) -> str:
    dtypes = ["dtype: bfloat16", "out_dtype: bfloat16"]
    return "\n".join([f"merge_method: {method}", *lines, *dtypes]) + "\n"
