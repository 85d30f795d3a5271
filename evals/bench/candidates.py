"""Seconds until one more candidate's model is in memory: ours in place; mergekit's written and loaded again.

As a child process, `python -m evals.bench.candidates RECIPE OUT ROUNDS MODEL...`: reads the models by plain
reads, then makes a live model take on candidates of other weights, in turns, and writes the seconds as JSON.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from .cache import warm
from .floor import CHUNK
from .ground import (
    bench_folder,
    environment,
    models_read,
    prepare_models,
    recipe_text,
    weight_files,
)
from .measure import run_measured
from .peer import command, peer_environment, prepare_peer
from .speed import Options, machine_facts

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
ROUNDS = 3
RELOAD = """
import sys, time, torch
from transformers import AutoModelForCausalLM
start = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(time.perf_counter() - start)
"""


def run_candidates(options: Options) -> int:
    """Prints a line for each method: the floor of reading, ours, mergekit's merge and load; medians."""
    shape = "small" if options.small else "1b"
    rounds = options.rounds or ROUNDS
    with bench_folder(options.folder, shape, options.keep) as place:
        versions = prepare_peer(options.peer_folder) if options.peer else None
        models = prepare_models(place, shape, sparse=False, outputs=1)
        facts = machine_facts(shape) | {"mergekit": versions, "rounds": rounds}
        rows = [_row(options, place, models, method, rounds) for method in options.methods]
    print(
        f"{facts['model']['parameters'] / 1e6:.0f} M parameters, bfloat16, {facts['cores']} cores"
    )
    for row in rows:
        print(_line(row))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "methods": rows}, indent=1) + "\n")
    return 0


def _row(
    options: Options, place: Path, models: Sequence[Path], method: str, rounds: int
) -> dict[str, Any]:
    recipe, out = place / f"{method}.yaml", place / "seconds.json"
    recipe.write_text(recipe_text(method, models))
    read = models_read(method, models)
    warm(weight_files(read))
    script = [sys.executable, "-m", "evals.bench.candidates", str(recipe), str(out), str(rounds)]
    usage = run_measured([*script, *map(str, read)], environment(), place / "log")
    row: dict[str, Any] = {"method": method, "peak": usage.peak, **json.loads(out.read_text())}
    if options.peer:
        warm(weight_files(read))
        row |= _peer(options, place, recipe)
    return row


def _peer(options: Options, place: Path, recipe: Path) -> dict[str, float]:
    """mergekit's whole command, and transformers' loading of what it wrote, without the imports of that."""
    output, log = place / "mergekit", place / "log"
    tool = str(command(options.peer_folder))
    written = run_measured(
        [tool, str(recipe), str(output), *options.peer_flags], peer_environment(), log
    )
    python = str(options.peer_folder / "bin" / "python")
    run_measured([python, "-c", RELOAD, str(output)], peer_environment(), log)
    loaded = float(log.read_text().split()[-1])
    shutil.rmtree(output)
    return {"merge": written.wall, "load": loaded}


def _line(row: dict[str, Any]) -> str:
    floor, ours = median(row["floor"]), median(row["ours"])
    line = f"{row['method']:16} reading {floor:5.2f} s  ours {ours:6.2f} s ({ours / floor:.2f}x)"
    if "merge" in row:
        theirs = row["merge"] + row["load"]
        line += f"  mergekit {row['merge']:.1f} + {row['load']:.1f} s ({theirs / ours:.1f}x ours)"
    return line


def _measured(recipe: Path, out: Path, rounds: int, models: Sequence[Path]) -> None:
    import torch

    from merge.budget import DEFAULT_MEMORY, keep_freed_memory
    from merge.pipeline import budget_of, plan_parsed
    from merge.recipe import parse_recipe
    from merge.search.live import Shells

    keep_freed_memory()
    text, opened = recipe.read_text(), {}  # type: ignore[var-annotated]
    shells = Shells(torch.bfloat16, "cpu")
    seconds: dict[str, list[float]] = {"floor": [], "ours": []}
    for i in range(
        rounds + 1
    ):  # the first one is not counted: the model is made, methods are compiled
        parsed = parse_recipe(_other_weights(text, i), str(recipe))
        start = time.perf_counter()
        read_through(len(os.sched_getaffinity(0)), models)
        between = time.perf_counter()
        plan = plan_parsed(parsed, opened=opened)
        shells.of(plan).become(plan, budget_of(plan, DEFAULT_MEMORY))
        end = time.perf_counter()
        if i:
            seconds["floor"].append(between - start)
            seconds["ours"].append(end - between)
    out.write_text(json.dumps(seconds))


def read_through(threads: int, models: Sequence[Path]) -> None:
    """Reads every weight file once, in pieces of 4 MiB into one buffer per thread."""
    pieces = [
        (file, at, min(CHUNK, file.stat().st_size - at))
        for file in weight_files(models)
        for at in range(0, file.stat().st_size, CHUNK)
    ]

    def read(part: Sequence[tuple[Path, int, int]]) -> None:
        buffer = memoryview(bytearray(CHUNK))
        opened = {file: os.open(file, os.O_RDONLY) for file, _, _ in part}
        for file, at, size in part:
            if os.preadv(opened[file], [buffer[:size]], at) != size:
                raise OSError(f"{file}: short read at byte {at}")
        for descriptor in opened.values():
            os.close(descriptor)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [pieces[i::threads] for i in range(threads)]))


def _other_weights(text: str, i: int) -> str:
    """The recipe of another candidate."""
    return re.sub(r"(weight|t): ([0-9.]+)", lambda m: f"{m[1]}: {float(m[2]) + 0.01 * i:g}", text)


if __name__ == "__main__":
    recipe, out, rounds, *models = sys.argv[1:]
    _measured(Path(recipe), Path(out), int(rounds), [Path(model) for model in models])
