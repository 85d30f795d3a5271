"""mergetool: model merging as a stream of tensors.

recipe  ->  plan  ->  stream  ->  write  ->  verify  ->  score

from merge import plan_recipe, run_recipe, verify_folder, score_models
result = run_recipe("recipe.yaml", output=Path("out/merged"), memory="512MiB")
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "load_recipe": "merge.recipe",
    "plan_recipe": "merge.pipeline",
    "run_recipe": "merge.pipeline",
    "verify_folder": "merge.verify",
    "Suite": "merge.score",
    "score_models": "merge.score",
    "MergetoolError": "merge.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """The few nouns of the Python API, imported when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'merge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
