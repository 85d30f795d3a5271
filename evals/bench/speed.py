"""Wall time, processor time and memory of whole commands: the floor, mergetool, mergekit."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .cache import available_memory, warm
from .ground import (
    TASKS,
    ask_comparison,
    ask_plan,
    bench_folder,
    environment,
    mergetool,
    models_read,
    prepare_models,
    recipe_text,
    weight_files,
)
from .measure import BenchError, Usage, run_measured
from .models import SHAPES
from .peer import command, peer_environment, prepare_peer
from .report import Row, as_json, report

METHODS = tuple(TASKS)
COMPARED = ("linear", "slerp")  # nothing random, and one formula for both tools
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `rounds` None: mergekit runs once, the others 3 times."""

    small: bool
    folder: Path | None
    keep: bool
    methods: tuple[str, ...]
    peer: bool
    peer_folder: Path
    peer_flags: tuple[str, ...]
    rounds: int | None
    threads: int | None
    json: Path | None

    def rounds_of(self, tool: str) -> int:
        return self.rounds or (1 if tool == "mergekit" else 3)


def run_speed(options: Options) -> int:
    """Runs everything, prints the table and writes the JSON; 1 where a command failed."""
    shape = "small" if options.small else "1b"
    with bench_folder(options.folder, shape, options.keep) as place:
        peer_versions = prepare_peer(options.peer_folder) if options.peer else None
        models = prepare_models(place, shape, sparse=False, outputs=2)
        facts = machine_facts(shape)
        if peer_versions:
            facts["mergekit"] = {"versions": peer_versions, "flags": list(options.peer_flags)}
        bench = _Bench(options, place, models)
        rows = [bench.row(method) for method in options.methods]
    facts |= {"threads_of_floor": bench.threads, "inputs_in_page_cache": bench.resident}
    print(report(facts, rows, bars=not options.small))
    if options.json:
        options.json.write_text(as_json(facts, rows))
    return int(any(row.failures for row in rows))


class _Bench:
    """The models, and what is noticed: threads of ours, the least part of inputs in memory."""

    def __init__(self, options: Options, place: Path, models: Sequence[Path]) -> None:
        self.options, self.place, self.models = options, place, models
        self.threads = options.threads or len(os.sched_getaffinity(0))
        self.resident = 1.0

    def row(self, method: str) -> Row:
        """All runs of one method, one after another; a failure is noted and the next tool runs."""
        row = Row(method)
        recipe = self.place / f"{method}.yaml"
        recipe.write_text(recipe_text(method, self.models))
        inputs = models_read(method, self.models)
        try:
            facts = ask_plan(recipe, "-o", str(self.place / "ours"), *self._threads())
            self.threads, row.projected = facts["threads"], facts["peak_bytes"]
        except BenchError as error:
            row.failures.append(f"{method}: {error}")
        tools: dict[str, Callable[[], Usage]] = {
            "floor": lambda: self._floor(inputs),
            "ours": lambda: self._ours(recipe),
        }
        if self.options.peer:
            tools["mergekit"] = lambda: self._mergekit(recipe)
        self._run_rounds(row, inputs, tools)
        both = [self.place / tool for tool in ("ours", "mergekit")]
        if method in COMPARED and all(folder.is_dir() for folder in both):
            row.agreement = ask_comparison(*both)
        for tool in tools:
            shutil.rmtree(self.place / tool, ignore_errors=True)
        return row

    def _run_rounds(
        self, row: Row, inputs: Sequence[Path], tools: Mapping[str, Callable[[], Usage]]
    ) -> None:
        """Tools take turns, so that another program's load meets all; a failed one has no more."""
        failed: set[str] = set()
        for i in range(max(self.options.rounds_of(tool) for tool in tools)):
            for tool, run in tools.items():
                if i >= self.options.rounds_of(tool) or tool in failed:
                    continue
                try:
                    usage = self._run_once(tool, inputs, run)
                except BenchError as error:
                    row.failures.append(f"{row.method}: {error}")
                    failed.add(tool)
                    continue
                row.runs.setdefault(tool, []).append(usage)
                print(f"{row.method}: {tool} {i + 1}: {usage.wall:.2f} s", file=sys.stderr)
                if tool == "floor" or not (self.options.peer and row.method in COMPARED):
                    shutil.rmtree(self.place / tool)

    def _run_once(self, tool: str, inputs: Sequence[Path], run: Callable[[], Usage]) -> Usage:
        """Without an earlier output, with warm inputs."""
        shutil.rmtree(self.place / tool, ignore_errors=True)
        self.resident = min(self.resident, warm(weight_files(inputs)))
        return run()

    def _floor(self, inputs: Sequence[Path]) -> Usage:
        folders = [str(self.place / "floor"), *map(str, inputs)]
        script = [sys.executable, str(HERE / "floor.py"), str(self.threads), *folders]
        return run_measured(script, environment(), self.place / "log")

    def _ours(self, recipe: Path) -> Usage:
        asked = mergetool("run", str(recipe), "-o", str(self.place / "ours"), *self._threads())
        return run_measured(asked, environment(), self.place / "log")

    def _mergekit(self, recipe: Path) -> Usage:
        tool = str(command(self.options.peer_folder))
        asked = [tool, str(recipe), str(self.place / "mergekit"), *self.options.peer_flags]
        return run_measured(asked, peer_environment(), self.place / "log")

    def _threads(self) -> list[str]:
        return ["--threads", str(self.options.threads)] if self.options.threads else []


def machine_facts(shape: str) -> dict[str, Any]:
    """What the figures depend on; sizes in bytes."""
    size = SHAPES[shape].nbytes
    needed = 5 * size  # four models and an output
    return {
        "model": {"shape": shape, "parameters": SHAPES[shape].values, "bytes": size},
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "load_before": os.getloadavg()[0],
        "memory_available": available_memory(),
        "memory_holds_inputs": needed < available_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "torch": _version("torch"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
