"""The suite or the tasks that a study searches on, and what counts of each."""

from pathlib import Path

from merge.errors import RequestError
from merge.lines import Lines
from merge.score import Suite, Task
from merge.score.harness import (
    check_holds_tasks,
    harness_with,
    matching,
    quiet_libraries,
    task_by,
)
from merge.search.sections import StudySection, TaskSection

BATCH_SIZE = 8  # of tasks that come without a suite


def suite_of(section: StudySection) -> Suite:
    """A shipped suite, one in a folder, or tasks by name whose metrics are known (see with_metrics)."""
    if section.tasks is None:
        return Suite.named(section.suite)
    tasks = [
        Task(each.task, each.metric or "", each.higher_is_better is not False)
        for each in section.tasks
    ]
    return Suite("tasks", Path(), tuple(tasks), BATCH_SIZE, _included(section))


def with_metrics(section: StudySection, lines: Lines) -> StudySection:
    """The section with what counts of each of its tasks, which is what counts in `score` where it does not
    say; raises RequestError."""
    if section.tasks is None:
        return section
    check_holds_tasks(_included(section))
    with quiet_libraries():
        harness = harness_with([each.task for each in section.tasks], _included(section))
    in_study = ("study", "tasks") in lines.numbers  # else beside a genome
    found: list[TaskSection] = []
    for i, each in enumerate(section.tasks):
        try:
            name, *_ = matching(each.task, harness)
            task = task_by(name, each.metric or "", harness)
        except RequestError as error:
            place = ("study", "tasks", i) if in_study else ("tasks", i)
            raise lines.error(place, f"{'.'.join(map(str, place))}: {error}") from None
        said = each.higher_is_better
        better = task.higher_is_better if said is None else said
        counts = {"metric": task.metric, "higher_is_better": better}
        found.append(each.model_copy(update=counts))
    return section.model_copy(update={"tasks": found})


def _included(section: StudySection) -> tuple[Path, ...]:
    return (Path(section.include),) if section.include else ()
