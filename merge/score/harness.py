"""What lm-evaluation-harness offers: its tasks, groups and tags, the metrics of each and their direction."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge.errors import RequestError
from merge.lines import first_twice, nearest
from merge.score.suite import Suite, Task

LEAF = ("TASK", "PY_TASK")  # what the harness calls an entry that has documents itself
SEED = 1234  # lm-eval's own, for few-shot examples, sampled answers and what numpy draws
CLOSE = 0.8  # likeness of names from which one of 15,000 may be meant


def check_installed() -> None:
    """Raises RequestError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise RequestError("scoring needs lm-eval; install mergetool[eval]")


def task_manager(suite: Suite) -> Any:
    """The harness with the tasks of `suite`."""
    return harness_with([task.name for task in suite.tasks], suite.include)


def harness_with(names: Sequence[str], include: Sequence[Path]) -> Any:
    """The harness with the task files in the folders `include`, and with its own tasks where one of `names`
    is not among those: to list them takes seconds."""
    check_installed()
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in include]
    if folders:
        found = TaskManager(include_path=folders, include_defaults=False)
        kinds = [_kind(found, name) for name in names]
        if all(kind in LEAF for kind in kinds):
            return found
    return TaskManager(include_path=folders or None)


def tasks_by_name(names: Sequence[str], include: Sequence[Path] = ()) -> tuple[Suite, Any]:
    """A suite of tasks, groups and tags by their names, each `NAME`, `NAME=METRIC` or `NAME=METRIC:FILTER`,
    with the harness that knows them. Without a metric the first one counts that the task lists. Raises
    RequestError."""
    asked = [name.strip().partition("=") for name in names if name.strip()]
    if not asked:
        raise RequestError("no task is named; write names of lm-eval, separated by commas")
    if twice := first_twice([name for name, _, _ in asked]):
        raise RequestError(f"task {twice} is named twice; one metric of a task counts")
    check_holds_tasks(include)
    harness = harness_with([name for name, _, _ in asked], include)
    tasks: dict[str, Task] = {}
    for pattern, _, metric in asked:
        for name in matching(pattern, harness):
            tasks[name] = task_by(name, metric, harness)
    label = ",".join(name for name, _, _ in asked)
    return Suite(label, Path(), tuple(tasks.values()), 1, tuple(include)), harness


def check_holds_tasks(include: Sequence[Path]) -> None:
    """Raises RequestError where one of these folders has no files of tasks."""
    for folder in include:
        if not any(folder.glob("**/*.yaml")):
            raise RequestError(f"{folder}: holds no task files of lm-eval (*.yaml)")


def check_tasks(suite: Suite, harness: Any) -> None:
    """Raises RequestError where the harness lacks a task of the suite or its metric, or counts it
    otherwise."""
    for task in suite.tasks:
        matching(task.name, harness)
        known = metrics_of(task.name, harness)
        if known and task.metric not in known:
            raise RequestError(
                f"suite {suite.name}: task {task.name} has no metric {task.metric!r}"
                f"{nearest(task.metric, list(known))}; it has {' and '.join(known)}"
            )
        if known and known[task.metric] != task.higher_is_better:
            better = "more" if known[task.metric] else "less"
            raise RequestError(
                f"suite {suite.name}: {task.name}: of {task.metric} {better} is better by the harness; "
                f"write higher_is_better: {str(known[task.metric]).lower()}"
            )


def metrics_of(name: str, harness: Any) -> dict[str, bool]:
    """Metrics that a task, group or tag lists, with the filter of answers after a comma, and whether more of
    them is better; nothing where only its code knows."""
    entry = harness.task_index[name]
    config, kind = entry.cfg or {}, entry.kind.name
    if kind == "TAG":
        return metrics_of(min(entry.tags), harness)
    if kind in LEAF:
        return _listed(config)
    children = [_child(child) for child in config.get("task") or []]
    inside = metrics_of(children[0], harness) if children and children[0] else {}
    own = {
        f"{each['metric']},{chosen}": inside.get(f"{each['metric']},{chosen}", True)
        for each in config.get("aggregate_metric_list") or []
        for chosen in _several(each.get("filter_list") or "none")
    }
    return own or inside


def tree_of(names: Sequence[str], harness: Any) -> Mapping[Any, Any]:
    """The harness's tasks of these names, however they are grouped. What code of theirs draws, such as the
    order of choices, is the same for every model and in every process; the seeds are lm-eval's own."""
    import random

    import numpy as np
    from lm_eval.tasks import get_task_dict

    random.seed(0)
    np.random.seed(SEED)
    found: Mapping[Any, Any] = get_task_dict(list(names), harness)
    return found


def leaves(tree: Mapping[Any, Any]) -> Iterator[Any]:
    """The tasks in what the harness makes of a name, however they are grouped."""
    for node in tree.values():
        if isinstance(node, Mapping):
            yield from leaves(node)
        else:
            yield node


def _kind(harness: Any, name: str) -> str:
    entry = harness.task_index.get(name)
    return entry.kind.name if entry else ""


def matching(pattern: str, harness: Any) -> list[str]:
    """Names in the harness that a name or pattern stands for; raises RequestError where there are none."""
    if pattern in harness.task_index:
        return [pattern]
    found = sorted(harness.match_tasks([pattern])) if "*" in pattern else []
    if not found:
        raise RequestError(
            f"no task, group or tag {pattern!r} in lm-eval{nearest(pattern, harness.all_tasks, CLOSE)}; "
            "`lm-eval ls tasks` lists them; `include` names a folder of your own"
        )
    return found


def task_by(name: str, metric: str, harness: Any) -> Task:
    """A task that the harness has, and what counts of it: the metric of that name (NAME, NAME:FILTER or as
    lm-eval writes it), or where that is empty the first one that the task lists. Raises RequestError."""
    known = metrics_of(name, harness)
    wanted = metric.replace(":", ",")
    if not wanted and not known:
        what = f"write {name}=METRIC, or in a study metric: METRIC"
        raise RequestError(f"task {name}: only its code knows its metrics; {what}")
    fitting = [m for m in known if not wanted or m == wanted or m.partition(",")[0] == wanted]
    if known and not fitting:
        told = ", ".join(m.removesuffix(",none").replace(",", ":") for m in known)
        raise RequestError(f"task {name} has no metric {metric!r}; it has {told}")
    chosen = fitting[0] if fitting else wanted if "," in wanted else f"{wanted},none"
    return Task(name, chosen, known.get(chosen, True))


def _listed(config: Mapping[str, Any]) -> dict[str, bool]:
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, is_higher_better

    listed = config.get("metric_list") or [
        {"metric": metric} for metric in DEFAULT_METRIC_REGISTRY.get(config.get("output_type"), [])
    ]
    filters = [str(each["name"]) for each in config.get("filter_list") or []] or ["none"]
    found: dict[str, bool] = {}
    for each in listed:
        metric, better = each.get("metric"), each.get("higher_is_better")
        if better is None and isinstance(metric, str):
            better = is_higher_better(metric)
        found |= {f"{metric},{chosen}": better is not False for chosen in filters}
    return found


def _child(child: Any) -> str:
    if isinstance(child, Mapping):
        child = child.get("task") or child.get("group")
    return child if isinstance(child, str) else ""


def _several(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps warnings and bars of the libraries from between the lines of the command."""
    names = ("lm_eval", "lm-eval", "transformers", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
