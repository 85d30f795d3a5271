"""How good a model is: lm-evaluation-harness on a suite or on tasks by name, models side by side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge.score.conditions import Conditions
    from merge.score.harness import (
        check_installed,
        check_tasks,
        quiet_libraries,
        task_manager,
        tasks_by_name,
    )
    from merge.score.models import (
        FLOAT32_LIMIT,
        TINY,
        Candidate,
        check_logits,
        few_threads,
        lm_of,
        scoring_dtype,
    )
    from merge.score.results import Answers, ModelScores, Score, Scores, table
    from merge.score.running import score_models
    from merge.score.suite import Suite, Task

__all__ = [
    "FLOAT32_LIMIT",
    "TINY",
    "Answers",
    "Candidate",
    "Conditions",
    "ModelScores",
    "Score",
    "Scores",
    "Suite",
    "Task",
    "check_installed",
    "check_logits",
    "check_tasks",
    "few_threads",
    "lm_of",
    "quiet_libraries",
    "score_models",
    "scoring_dtype",
    "table",
    "task_manager",
    "tasks_by_name",
]
_MODULES = ("suite", "conditions", "results", "harness", "models", "running")


def __getattr__(name: str) -> Any:
    """The names of the modules below, imported when they are asked for: the command line imports this."""
    if name in __all__:
        for module in (import_module(f"{__name__}.{each}") for each in _MODULES):
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
