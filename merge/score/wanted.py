"""What a recipe says about scoring, and the result beside its parents."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.apart import answer_of, reason_of, run_apart
from merge.errors import RequestError
from merge.score.conditions import Conditions
from merge.score.harness import check_installed, check_tasks, task_manager, tasks_by_name
from merge.score.models import Candidate, candidate, check_candidate
from merge.score.results import Scores
from merge.score.running import score_models
from merge.score.suite import Suite, Task
from merge.shipped import shipped

if TYPE_CHECKING:
    from merge.pipeline import Result
    from merge.plan import Plan
    from merge.sections import ScoreSection
    from merge.sources.model import Model


def suite_of(section: "ScoreSection", file: Path) -> Suite:
    """The suite that a recipe's score section asks for; raises RequestError where it is not there.

    The harness lists its tasks in a process of its own: it would count against the memory of the merge.
    """
    check_installed()
    if section.tasks is None:
        suite = Suite.named(section.suite or "quickstart")
        if suite.folder != shipped("evals/suites/quickstart"):  # which brings its tasks
            _asked([], [], section.suite, file)
        return suite
    include = [file.parent / section.include] if section.include else []
    found = _asked(section.tasks, include, None, file)
    tasks = tuple(Task(**task) for task in found)
    return Suite(",".join(section.tasks), Path(), tasks, 1, tuple(include))


def _asked(
    names: Sequence[str], include: Sequence[Path], suite: str | None, file: Path
) -> list[dict[str, Any]]:
    question = json.dumps({"names": names, "include": list(map(str, include)), "suite": suite})
    done = run_apart("merge.score.wanted", question)
    try:
        answer = json.loads(answer_of(done))
    except (ValueError, IndexError):
        what = f"score: lm-eval does not list its tasks: {reason_of(done)}"
        raise RequestError(f"{file}: {what}") from None
    if "error" in answer:
        raise RequestError(f"{file}: score: {answer['error']}")
    return list(answer["tasks"])


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    """The tasks that are asked for, as JSON, or what is wrong with them."""
    from dataclasses import asdict

    try:
        if question["suite"]:
            suite = Suite.named(question["suite"])
            check_tasks(suite, task_manager(suite))
        else:
            suite, _ = tasks_by_name(question["names"], list(map(Path, question["include"])))
    except RequestError as error:
        return {"error": str(error)}
    return {"tasks": [asdict(task) for task in suite.tasks]}


def check_scorable(plan: "Plan", section: "ScoreSection") -> None:
    """Raises RequestError where what will be merged, or a parent, cannot be scored as the section says."""
    conditions = Conditions(chat_template=section.chat_template)
    if section.chat_template:
        check_candidate(plan, "the result", conditions)
    for model in _parents(plan, section):
        check_candidate(model.folder, model.label, conditions)


def _parents(plan: "Plan", section: "ScoreSection") -> "list[Model]":
    return [model for model in plan.models if section.parents and not model.computed]


def scored_beside_parents(
    result: "Result",
    section: "ScoreSection",
    suite: Suite,
    *,
    memory: str,
    offline: bool = False,
    progress: Callable[[int], None],
) -> Scores:
    """Scores of a merge and of the models that went into it; those with adapters are merged in memory."""
    beside = Path(result.plan.recipe.file).parent
    parents = _parents(result.plan, section)
    found: list[Candidate] = [result.folder]
    found += [
        candidate(m.label, offline=offline, beside=beside) if m.beside else m.folder
        for m in parents
    ]
    conditions = Conditions(
        section.limit, section.num_fewshot, section.chat_template, memory=memory
    )
    labels = [result.folder.name, *(m.label for m in parents)]
    return score_models(found, suite, labels=labels, conditions=conditions, progress=progress)


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.argv[1]))))
