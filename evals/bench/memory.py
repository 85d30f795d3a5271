"""Peak memory against the plan's projection, and the plan of a merge far above this machine."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .ground import (
    ask_plan,
    bench_folder,
    environment,
    mergetool,
    prepare_models,
    recipe_text,
)
from .measure import Usage, run_measured
from .models import SHAPES, give_tokens

OWN = 8  # tokens that each of two models has, and the other lacks


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `cap` as `--memory` takes it."""

    small: bool
    folder: Path | None
    keep: bool
    sparse: bool
    cap: str
    rounds: int
    json: Path | None


def run_memory(options: Options) -> int:
    """Two merges of models with one huge tensor; 1 where a peak was above its projection."""
    shape = "wide-small" if options.small else "wide"
    with bench_folder(options.folder, shape, options.keep) as place:
        models = prepare_models(place, shape, sparse=options.sparse, outputs=1)
        rows = [
            _measured_peak(place, method, recipe_text(method, models), options.cap)
            for method in ("linear", "ties")
        ]
    return _reported(options, shape, "zeros" if options.sparse else "normal", rows)


def run_tokens(options: Options) -> int:
    """A merge of two models with tokens of their own in a huge embedding; 1 as above.

    All weights are zeros, so that the inputs take no room; the output does until it is measured.
    """
    shape = "tokens-small" if options.small else "tokens"
    with bench_folder(options.folder, shape, options.keep) as place:
        models = prepare_models(place, shape, ("base", "tune-a"), sparse=True, outputs=1)
        for model in models:
            own = [f"<|{model.name}-{i}|>" for i in range(OWN)]
            give_tokens(model, SHAPES[shape], own)
        rows = [_measured_peak(place, "ties", _tokens_recipe(models), options.cap)]
    return _reported(options, shape, f"zeros, {OWN} other tokens in each model", rows)


def _tokens_recipe(models: Sequence[Path]) -> str:
    base, tune = models
    lines = [
        "merge_method: ties",
        f"base_model: {base}",
        f"models: [{{model: {tune}, parameters: {{weight: 1.0, density: 0.5}}}}]",
        "tokenizer: {source: base, specials: union}",
        "out_dtype: bfloat16",
    ]
    return "\n".join(lines) + "\n"


def _reported(options: Options, shape: str, data: str, rows: Sequence[dict[str, Any]]) -> int:
    """Prints what was measured; 1 where a peak was above its projection."""
    rows_of, cols = next(iter(SHAPES[shape].tensors().values()))
    print(f"one tensor of {rows_of} x {cols} bfloat16 ({data}), --memory {options.cap}")
    for row in rows:
        print(
            f"{row['method']:8} measured {row['measured'] / 2**20:6.0f} MiB, "
            f"projected {row['projected'] / 2**20:6.0f} MiB, "
            f"{row['measured'] / row['projected']:.0%} of it, {row['wall']:.1f} s"
        )
    _write(options.json, {"cap": options.cap, "shape": shape, "methods": list(rows)})
    return int(any(row["measured"] > row["projected"] for row in rows))


def _measured_peak(place: Path, method: str, text: str, cap: str) -> dict[str, Any]:
    """Bytes that the plan of the recipe `text` projects and that the run took, and the run's seconds."""
    recipe, output = place / f"{method}.yaml", place / "ours"
    recipe.write_text(text)
    shutil.rmtree(output, ignore_errors=True)
    options = ("-o", str(output), "--memory", cap)
    projected = ask_plan(recipe, *options)["peak_bytes"]
    try:
        usage = _timed(place, "run", str(recipe), *options)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return {
        "method": method,
        "projected": projected,
        "measured": usage.peak,
        "wall": usage.wall,
        "cpu": usage.cpu,
    }


def run_plan70b(options: Options) -> int:
    """Seconds of `mergetool plan` over three 70 B models that take no room, and of `--help`."""
    with bench_folder(options.folder, "70b", options.keep) as place:
        names = ("tune-a", "tune-b", "tune-c")
        models = prepare_models(place, "70b", names, sparse=True, outputs=0)
        recipe = place / "linear.yaml"
        recipe.write_text(recipe_text("linear", [models[0], *models]))
        asked = ("plan", str(recipe), "-o", str(place / "ours"))
        facts = ask_plan(recipe, *asked[2:])
        plans = [_timed(place, *asked) for _ in range(options.rounds)]
        helps = [_timed(place, "--help") for _ in range(options.rounds)]
    size = SHAPES["70b"].nbytes
    print(f"linear merge of three models of {size / 1e9:.0f} GB, {facts['steps']} tensors")
    print(f"mergetool plan    {_line(plans)}")
    print(f"mergetool --help  {_line(helps)}")
    runs = {"plan": [u.wall for u in plans], "help": [u.wall for u in helps]}
    _write(options.json, {"seconds": runs, "facts": facts})
    return 0


def _timed(place: Path, *arguments: str) -> Usage:
    return run_measured(mergetool(*arguments), environment(), place / "log")


def _line(runs: list[Usage]) -> str:
    peak = max(run.peak for run in runs) / 2**20
    return f"{median(run.wall for run in runs):.2f} s (median of {len(runs)}), {peak:.0f} MiB"


def _write(file: Path | None, data: dict[str, Any]) -> None:
    if file:
        file.write_text(json.dumps(data, indent=1) + "\n")
        print(f"written to {file}", file=sys.stderr)
