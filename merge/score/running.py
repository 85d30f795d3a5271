"""Models, one after the other: loaded, put to every task, let go."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merge.errors import RequestError, ScoreError, WriteError
from merge.score.answers import answers_of
from merge.score.conditions import Conditions
from merge.score.harness import (
    SEED,
    check_tasks,
    leaves,
    quiet_libraries,
    task_manager,
    tree_of,
)
from merge.score.models import (
    Candidate,
    check_candidate,
    few_threads,
    lm_eval_model,
    weight_bytes,
)
from merge.score.results import Answers, ModelScores, Score, Scores, without_nan
from merge.score.suite import Suite, Task

Keep = Callable[[Mapping[str, Any]], None]


def score_models(
    folders: Sequence[Candidate],
    suite: Suite,
    *,
    labels: Sequence[str],
    limit: int | None = None,
    conditions: Conditions | None = None,
    harness: Any = None,
    samples: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Scores of the models in `folders` (or plans of merges, which are made in memory) on `suite`, each
    loaded once. limit: documents per task.

    harness: that of the suite, where it is there already. samples: a new file for a line of JSON for each
    model, task and document.

    Raises RequestError where lm-eval or a task is not there or a model must not run its code, ScoreError
    where a model cannot be scored, WriteError where samples cannot be written.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = conditions or Conditions()
    given = replace(given, limit=given.limit if limit is None else limit)
    for found, label in zip(folders, labels, strict=True):
        check_candidate(found, label, given)
    with quiet_libraries(), few_threads(max(map(weight_bytes, folders))):
        harness = harness or task_manager(suite)
        check_tasks(suite, harness)
        keep = _kept(samples)
        scored = [
            _scored_model(found, label, suite, harness, given, keep, progress)
            for found, label in zip(folders, labels, strict=True)
        ]
    return Scores(suite, tuple(scored))


def _kept(file: Path | None) -> Keep:
    """What writes each row as a line of JSON, at once, into a file that must not be there yet; raises
    RequestError, and WriteError as it writes."""
    if file is None:
        return lambda row: None
    try:
        file.open("x").close()
    except FileExistsError:
        raise RequestError(f"{file}: is there already; name another file for samples") from None
    except OSError as error:
        raise RequestError(f"{file}: cannot be written ({error.strerror})") from None
    return partial(_append, file)


def _append(file: Path, row: Mapping[str, Any]) -> None:
    line = json.dumps(without_nan(row), ensure_ascii=False, default=str)
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(f"{line}\n")
    except OSError as error:
        raise WriteError(f"{file}: {error.strerror}") from None


def _scored_model(
    found: Candidate,
    label: str,
    suite: Suite,
    harness: Any,
    given: Conditions,
    keep: Keep,
    progress: Callable[[int], None],
) -> ModelScores:
    """Loads, scores and lets go of one model."""
    model = lm_eval_model(found, label, given, suite.batch_size)
    scores: dict[str, Score] = {}
    answers: dict[str, Answers] = {}
    for task in suite.tasks:
        results, objects = _evaluated(model, task, harness, given)
        names = [leaf.config.task for leaf in objects]
        scores[task.name] = _score(task, results, names, label)
        logged = {name: results["samples"][name] for name in names}
        answers |= {name: answers_of(rows, model) for name, rows in logged.items()}
        for name, rows in logged.items():
            for row in rows:
                keep(_row(label, name, row))
        progress(1)
    return ModelScores(label, scores, answers)


def _evaluated(
    model: Any, task: Task, harness: Any, given: Conditions
) -> tuple[Mapping[str, Any], list[Any]]:
    """What lm-eval finds, and the tasks that were asked."""
    import torch
    from lm_eval.evaluator import evaluate

    try:
        tree = tree_of([task.name], harness)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ScoreError(f"task {task.name}: its documents cannot be had: {reason}") from None
    objects = list(leaves(tree))
    for each in objects:
        check_direction(each, task)
        set_examples(each, task.num_fewshot if given.num_fewshot is None else given.num_fewshot)
    torch.manual_seed(SEED)  # of answers that are sampled, whatever was scored before
    found = evaluate(
        lm=model,
        task_dict=tree,
        limit=given.limit,
        apply_chat_template=given.chat_template,
        fewshot_as_multiturn=given.chat_template,
    )
    return found, objects


def check_direction(made: Any, task: Task) -> None:
    """Raises ScoreError where code that nothing lists counts otherwise."""
    metric = task.metric.partition(",")[0]
    better = made.higher_is_better().get(metric)
    if better is not None and (better is not False) != task.higher_is_better:
        todo = f"name the task in a suite with higher_is_better: {str(not task.higher_is_better).lower()}"
        told = "less" if task.higher_is_better else "more"
        raise ScoreError(f"task {task.name}: of {metric} {told} is better by its code; {todo}")


def set_examples(task: Any, count: int | None) -> None:
    """Puts so many solved examples before each document of one of lm-eval's tasks, drawn as lm-eval does.
    None is what the task says; a task that says 0 keeps it, as its prompt brings its own."""
    own = task.config.num_fewshot
    task.set_config(key="num_fewshot", value=own or 0 if count is None or own == 0 else count)
    task.set_fewshot_seed(seed=SEED)


def _score(task: Task, found: Mapping[str, Any], names: Sequence[str], label: str) -> Score:
    """The value that counts: the harness's own of a task or group, else the mean over its tasks."""
    results = found["results"]
    grouped = {**results.get(task.name, {}), **found.get("groups", {}).get(task.name, {})}
    alone = task.metric in grouped
    parts = [grouped] if alone or len(names) == 1 else [results[name] for name in names]
    values = [_value(task, part, label) for part in parts]
    errors = [_stderr(task, part) for part in parts]
    documents = sum(int(found["n-samples"][name]["effective"]) for name in names)
    return Score(
        math.fsum(values) / len(values) / task.full,
        math.sqrt(math.fsum(e**2 for e in errors)) / len(errors) / task.full,
        documents,
        task.higher_is_better,
        task.part,
        {k: v for k, v in grouped.items() if "," in k and isinstance(v, int | float)},
    )


def _value(task: Task, results: Mapping[str, Any], label: str) -> float:
    value = results.get(task.metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        have = ", ".join(k for k in results if "," in k and "_stderr" not in k)
        raise ScoreError(f"{label}: task {task.name} gave {value} for {task.metric}; it has {have}")
    return float(value)


def _stderr(task: Task, results: Mapping[str, Any]) -> float:
    """NaN where the harness knows none."""
    name, _, chosen = task.metric.partition(",")
    known = results.get(f"{name}_stderr,{chosen or 'none'}")
    return float(known) if isinstance(known, float | int) else math.nan


def _row(label: str, task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a document: its answers, and the value of each metric."""
    return {
        "model": label,
        "task": task,
        "document": sample["doc_id"],
        "document_hash": sample.get("doc_hash"),
        "prompt_hash": sample.get("prompt_hash"),
        "filter": sample.get("filter", "none"),
        "metrics": {name: sample[name] for name in sample.get("metrics", []) if name in sample},
        "target": sample.get("target"),
        "answers": sample["resps"],
        "filtered": sample["filtered_resps"],
    }
