"""Several objectives: what a candidate reaches in each, and which candidates no other one beats in all."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge.printing import counted
from merge.search.sections import ObjectiveSection, StudySection

if TYPE_CHECKING:
    from merge.search.ledger import Candidate

MEAN = "mean"  # of all tasks by their shares: what a study without objectives maximises


def objectives_of(section: StudySection) -> dict[str, list[str]]:
    """The tasks of each objective by its name, in the order of the study; {} where the mean over all tasks
    is the only one."""
    return {each.name: list(each.tasks) for each in section.objectives}


def shares_of(
    objectives: Sequence[ObjectiveSection], tasks: Mapping[str, float]
) -> dict[str, float]:
    """What each task counts in the one mean that candidates are chosen by and compared in, of any sum.

    That is the mean of the objectives, each the mean of its tasks by their weights. Where there are none, or
    they name others than `tasks`, as where a suite keeps other tasks for the end, it is what `tasks` says.
    """
    shares: dict[str, float] = {}
    for each in objectives:
        total = math.fsum(each.tasks.values())
        for task, weight in each.tasks.items():
            shares[task] = shares.get(task, 0.0) + weight / total
    if not shares or any(task not in tasks for task in shares):
        return dict(tasks)
    return shares


def values_of(section: StudySection, scores: Mapping[str, Any]) -> tuple[float, ...]:
    """What a candidate with these scores reaches in each objective, larger is better: the mean of its tasks
    by their weights; (mean over all tasks,) where the study has no objectives."""
    if not section.objectives:
        return (float(scores[MEAN]),)
    return tuple(_mean(each.tasks, scores["tasks"]) for each in section.objectives)


def reached(section: StudySection, scores: Mapping[str, Any]) -> dict[str, float]:
    """What a candidate with these scores reaches in each objective by its name; {} where the study has none,
    or the split that they are of has other tasks."""
    objectives = objectives_of(section)
    if any(task not in scores["tasks"] for tasks in objectives.values() for task in tasks):
        return {}
    return dict(zip(objectives, values_of(section, scores), strict=bool(objectives)))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin with."""
    if len(names) < 2:
        return list(names)
    split = [name.split("_") for name in names]
    words = zip(*(parts[:-1] for parts in split), strict=False)
    alike = len(list(itertools.takewhile(lambda each: len(set(each)) == 1, words)))
    return ["_".join(parts[alike:]) for parts in split]


def words_of_front(candidates: int, baselines: Sequence[str]) -> str:
    """Who is on a front: how many candidates of the search, and which baselines."""
    others = (
        f" and {counted(len(baselines), 'baseline')} ({', '.join(baselines)})" if baselines else ""
    )
    return f"{counted(candidates, 'candidate')}{others}"


def non_dominated(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[candidates, objectives], larger is better -> [candidates] bool: whether no other candidate is at
    least as good in all objectives and better in one. Of equal ones all are."""
    return np.array([not _is_beaten(own, values) for own in values], np.bool_)


def _is_beaten(own: NDArray[np.float64], values: NDArray[np.float64]) -> bool:
    """Whether any of values [candidates, objectives] is as good as `own` in all and better in one."""
    # one at a time: all pairs of thousands take gigabytes
    as_good = values[(values >= own).all(axis=1)]
    return bool((as_good > own).any())


def front_of(candidates: Sequence["Candidate"], section: StudySection) -> list["Candidate"]:
    """Those of candidates with scores that no other one of them beats in all objectives of the study."""
    scored = [candidate for candidate in candidates if candidate.scores]
    if not scored:
        return []
    values = np.array([values_of(section, c.scores) for c in scored if c.scores], np.float64)
    return [c for c, best in zip(scored, non_dominated(values), strict=True) if best]


def _mean(weights: Mapping[str, float], tasks: Mapping[str, float]) -> float:
    total = math.fsum(weights.values())
    return math.fsum(weight * tasks[task] for task, weight in weights.items()) / total


def unknown_tasks(section: StudySection, known: Sequence[str]) -> list[tuple[int, str]]:
    """(number of an objective, task of it) for every task that is not among `known`."""
    return [
        (i, task)
        for i, each in enumerate(section.objectives)
        for task in each.tasks
        if task not in known
    ]
