"""Mixtures of the tiny family beside its weight-space merges, scored with the quickstart suite.

    python evals/zoo/mixtures.py --out out/mixtures            # of adapters, and of specialists
    python evals/zoo/mixtures.py --out out/mixtures --quick    # without the weight-space merges

What is there already is not made again; every model is scored in this one run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from merge.experts.training.learning import Course, train_router
from merge.pipeline import run_recipe
from merge.score import Scores, Suite, score_models, table
from merge.shipped import shipped

SKILLS = ("reverse", "sort", "elements", "roman")
TEXTS = [shipped("evals/zoo/texts") / f"{skill}.jsonl" for skill in SKILLS]
BASE = "zoo:base"
ADAPTERS = {
    "reverse": "zoo:adapters/reverse-dora",
    "sort": "zoo:adapters/sort-mixed-ranks",
    "elements": "zoo:adapters/elements-mlp",
    "roman": "zoo:adapters/roman-rslora",
}
ADAPTED = [f"{BASE}+{adapter}" for adapter in ADAPTERS.values()]
# Method -> parameters that are tried; of the four adapters as task vectors. Weight 1 each of task arithmetic
# is the sum of the four changes, as PEFT's `cat` makes it.
MERGES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "linear": ({"weight": 1.0},),
    "task_arithmetic": tuple({"weight": w} for w in (0.4, 0.5, 0.6, 0.7, 1.0)),
    "ties": tuple({"weight": 1.0, "density": d} for d in (0.1, 0.2, 0.3, 0.5, 0.7)),
    "dare_ties": tuple({"weight": w, "density": 0.5} for w in (0.3, 0.4, 0.5, 0.6)),
    "dare_linear": tuple({"weight": w, "density": 0.5} for w in (0.4, 0.5, 0.6)),
    "breadcrumbs": ({"weight": 0.6, "density": 0.9, "gamma": 0.01},),
}
COURSE = Course(steps=600)
LORAS = shipped("recipes/mixture-of-loras.yaml")
MOE = shipped("recipes/experts.yaml")


def weight_space() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and recipe of every merge of the adapters into one set of weights."""
    for method, tried in MERGES.items():
        for parameters in tried:
            told = " ".join(f"{key} {value}" for key, value in parameters.items())
            base = {} if method == "linear" else {"base_model": BASE}
            models = [{"model": model, "parameters": dict(parameters)} for model in ADAPTED]
            yield f"{method} {told}", {"merge_method": method, **base, "models": models}


def singles() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and recipe of the base with one adapter."""
    for skill, adapter in ADAPTERS.items():
        yield f"{skill} alone", {"model": f"{BASE}+{adapter}"}


def made(out: Path, name: str, recipe: Mapping[str, Any] | Path) -> Path:
    """The folder of a recipe's result."""
    folder = out / name.replace(" ", "-")
    if isinstance(recipe, Path):
        return run_recipe(recipe, folder).folder
    file = out / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    return run_recipe(file, folder).folder


def trained(out: Path, name: str, mixture: Path, course: Course) -> Path:
    """The folder of a mixture with trained routers; tells how long that took."""
    began = time.monotonic()
    done = train_router(mixture, TEXTS, out / name.replace(" ", "-"), course)
    before, after = done.told["held_out_loss"]
    took = f"{time.monotonic() - began:.0f} s"
    print(f"{name}: {took}, loss of held-out texts {before:.4f} -> {after:.4f}", flush=True)
    return done.folder


def compared(out: Path, quick: bool) -> Scores:
    """Everything made and scored."""
    out.mkdir(parents=True, exist_ok=True)
    folders = {"base": shipped("evals/zoo/base")}
    folders |= {name: made(out, name, recipe) for name, recipe in singles()}
    if not quick:
        folders |= {name: made(out, name, recipe) for name, recipe in weight_space()}
    for name, recipe in (("LoRAs", LORAS), ("experts", MOE)):
        folders[name] = made(out, name, recipe)
        folders[f"{name} trained"] = trained(out, f"{name} trained", folders[name], COURSE)
    suite = Suite.named("quickstart")
    return score_models(list(folders.values()), suite, labels=list(folders))


def best_per_skill(scores: Scores) -> float:
    """The mean over skills of the best score that any adapter alone has."""
    alone = [model for model in scores.models if model.label.endswith("alone")]
    tasks = [task.name for task in scores.suite.tasks]
    return sum(max(model.tasks[task].value for model in alone) for task in tasks) / len(tasks)


def main() -> None:
    """Print the table, and the two bounds that a mixture is held against."""
    parser = argparse.ArgumentParser(description="Score mixtures beside weight-space merges.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--quick", action="store_true", help="leave out weight-space merges")
    parser.add_argument("--json", type=Path, help="file for the scores")
    asked = parser.parse_args()
    scores = compared(asked.out, asked.quick)
    print(table(scores))
    merged = [m for m in scores.models if m.label.split(" ")[0] in MERGES]
    print(f"best adapter of each skill: {100 * best_per_skill(scores):.1f}")
    if merged:
        best = max(merged, key=lambda model: model.mean)
        print(f"best merge into one set of weights: {best.label}, {100 * best.mean:.1f}")
    if asked.json:
        asked.json.write_text(json.dumps(scores.as_json(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
