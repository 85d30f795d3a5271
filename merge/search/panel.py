"""Documents of a suite whose requests are built once, put to one live model after another.

lm-eval builds prompts, filters answers and judges them; what it does anew for every model is done once here.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge.agreement import canonical
from merge.errors import RequestError, ScoreError
from merge.score import Suite, Task
from merge.score.harness import check_tasks, harness_with, leaves, matching, tree_of
from merge.score.running import set_examples
from merge.score.suite import shares_by_part
from merge.search.documents import (
    APART,
    SHARES,
    SPLITS,
    Split,
    check_sizes,
    identity,
    limited,
    refuse_overlap,
    split_by_hash,
)
from merge.search.front import shares_of
from merge.search.sections import ObjectiveSection
from merge.search.verdict import Values, mean_of

NUMBERS = (int, float, np.number, np.bool_)


@dataclass(frozen=True)
class Marks:
    """What came of a model's answers. `values`: of the metric, in parts of full marks, by task, [documents],
    larger is better. `answers`: log-probabilities and whether they were the likeliest, or texts, by task.
    `truncated`, `empty`, `alike`: shares of the answers that stopped at the limit, say nothing, or are the
    most frequent one of their task. `shares`: what each task counts in the mean, of any sum; one without
    counts nothing."""

    values: Mapping[str, Values]
    answers: Mapping[str, list[Any]]
    truncated: float
    empty: float
    alike: float
    shares: Mapping[str, float]

    @property
    def mean(self) -> float:
        return mean_of(self.values, self.shares)

    def as_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "tasks": {task: float(v.mean()) for task, v in self.values.items()},
            "values": {task: v.tolist() for task, v in self.values.items()},
            "answers": dict(self.answers),
            "truncated": self.truncated,
            "empty": self.empty,
            "alike": self.alike,
            "shares": dict(self.shares),
        }


@dataclass
class Panel:
    """One split of a suite's documents. `tasks`: lm-eval's, by name, each with its requests. `shares`: what
    each of them counts in the mean (see Marks)."""

    split: Split
    metrics: Mapping[str, Task]
    tasks: Mapping[str, Any]
    shares: Mapping[str, float]

    @property
    def digest(self) -> str:
        """Stands for the documents and what counts of them."""
        found = {
            name: [
                *(counts.metric, counts.higher_is_better, counts.full),
                *([r.args[0] for r in task.instances], [identity(r.doc) for r in task.instances]),
            ]
            for name, task in self.tasks.items()
            for counts in [self.metrics[name]]
        }
        return hashlib.sha256(canonical([found, dict(self.shares)]).encode()).hexdigest()

    def marks(self, lm: Any) -> Marks:
        """Puts all documents to the model of `lm`; ScoreError where a metric has no value per document."""
        self.ask(lm)
        return self.judged(lm)

    def of(self, documents: Mapping[str, Sequence[int]]) -> "Panel":
        """Some documents of a whole panel, by task, ascending: what is answered here is answered there."""
        split = Split(self.split.name, {task: tuple(found) for task, found in documents.items()})
        tasks = {}
        for name, task in self.tasks.items():
            places = np.searchsorted(self.split.documents[name], documents[name])
            tasks[name] = _of(task, places.tolist())
        return Panel(split, self.metrics, tasks, self.shares)

    def ask(self, lm: Any) -> None:
        """Puts all documents to the model of `lm`, which are judged later."""
        pending: dict[str, list[Any]] = defaultdict(list)
        for task in self.tasks.values():
            for request in task.instances:
                request.resps, request.filtered_resps = [], {}
                pending[request.request_type].extend([request] * request.repeats)
        for kind, requests in pending.items():
            for answer, request in zip(getattr(lm, kind)(requests), requests, strict=True):
                request.resps.append(answer)

    def values(self) -> dict[str, Values]:
        """The metric of every document that was answered, by task."""
        return {name: self._judged(name, task) for name, task in self.tasks.items()}

    def judged(self, lm: Any) -> Marks:
        """What came of the answers of the model of `lm`."""
        values = self.values()
        texts = {name: _generated(task) for name, task in self.tasks.items()}
        every = [text for found in texts.values() for text in found]
        return Marks(
            values,
            {name: [r.resps for r in task.instances] for name, task in self.tasks.items()},
            _truncated(self.tasks, lm),
            sum(not text.strip() for text in every) / max(1, len(every)),
            max((_commonest(found) for found in texts.values() if found), default=0.0),
            self.shares,
        )

    def _judged(self, name: str, task: Any) -> Values:
        """The metric of every document, in the order of the split."""
        task.apply_filters()
        by_document: dict[int, list[Any]] = defaultdict(list)
        for request in task.instances:
            by_document[request.doc_id].append(request)
        found = [
            self._value(name, task, sorted(requests, key=lambda request: request.idx))
            for _, requests in sorted(by_document.items())
        ]
        counts = self.metrics[name]
        return (1.0 if counts.higher_is_better else -1.0) * np.array(found) / counts.full

    def _value(self, name: str, task: Any, requests: Sequence[Any]) -> float:
        """The metric of a document whose requests these are; raises ScoreError."""
        metric, _, chosen = self.metrics[name].metric.partition(",")
        filters = list(requests[0].filtered_resps)
        if (chosen or "none") not in filters:
            there = ", ".join(filters)
            raise ScoreError(
                f"task {name}: no filter is called {chosen or 'none'}; there is {there}"
            )
        answers = [request.filtered_resps[chosen or "none"] for request in requests]
        values = task.process_results(requests[0].doc, answers)
        known = [key for key, value in values.items() if isinstance(value, NUMBERS)]
        if metric not in known:
            there = f"there is {', '.join(known)}" if known else "no metric of it has"
            raise ScoreError(f"task {name}: {metric} has no value per document; {there}")
        return float(values[metric])


def panels(
    of: str | Suite, limit: int | None, objectives: Sequence[ObjectiveSection] = ()
) -> dict[str, Panel]:
    """dev, val and test of a suite. What it keeps apart as search_tasks is dev and val, the rest is test;
    else the documents are split by hash. Raises RequestError where a document would be in two of them.

    limit: of documents of each task of dev. objectives: whose mean counts.
    """
    suite, apart = (of, None) if isinstance(of, Suite) else (Suite.named(of), _apart(of))
    looked = apart or suite
    harness = harness_with([task.name for task in (*looked.tasks, *suite.tasks)], suite.include)
    if isinstance(of, str):  # of tasks by name the study says what counts
        check_tasks(suite, harness)
        check_tasks(looked, harness)
    documents = {task.name: _documents(harness, task) for task in looked.tasks}
    splits = split_by_hash(documents, APART if apart else SHARES)
    if apart:
        last = {task.name: _documents(harness, task) for task in suite.tasks}
        numbers = {task: tuple(range(len(found))) for task, found in last.items()}
        splits["test"] = Split("test", numbers)
        refuse_overlap([("search", documents), ("test", last)])
        check_sizes([splits["test"]])
    check_sizes([splits[name] for name in SPLITS if not apart or name != "test"])
    dev = limited(splits["dev"], limit)
    return {
        "dev": _panel(harness, looked, dev, objectives),
        "val": _panel(harness, looked, splits["val"], objectives),
        "test": _panel(harness, suite, splits["test"], objectives),
    }


def _apart(name: str) -> Suite | None:
    """What a suite keeps for searches, if anything."""
    try:
        return Suite.named(name, split="search")
    except RequestError:
        return None


def _panel(
    harness: Any, suite: Suite, split: Split, objectives: Sequence[ObjectiveSection]
) -> Panel:
    tasks = _lm_eval_tasks(harness, suite.tasks)
    for name, task in tasks.items():
        numbers = list(split.documents[name])
        task.build_all_requests(samples=numbers, rank=0, world_size=1)
    shares = shares_of(objectives, shares_by_part({task.name: task.part for task in suite.tasks}))
    return Panel(split, {task.name: task for task in suite.tasks}, tasks, shares)


def _of(task: Any, places: Sequence[int]) -> Any:
    """An lm-eval task with the requests of the documents at these places of it, which both share."""
    part, wanted = copy(task), set(places)
    part._instances = [request for request in task.instances if request.doc_id in wanted]
    return part


def _documents(harness: Any, task: Task) -> list[Mapping[str, Any]]:
    return list(_lm_eval_tasks(harness, [task])[task.name].eval_docs)


def _lm_eval_tasks(harness: Any, tasks: Sequence[Task]) -> dict[str, Any]:
    """lm-eval's tasks by name, with as many solved examples as the suite says; RequestError for a group."""
    found = {}
    for task in tasks:
        parts = list(leaves(tree_of(matching(task.name, harness), harness)))
        if len(parts) != 1:
            within = ", ".join(part.config.task for part in parts[:3])
            raise RequestError(
                f"task {task.name} is a group of {len(parts)} ({within}, ...); a search names each task"
            )
        set_examples(parts[0], task.num_fewshot)
        found[task.name] = parts[0]
    return found


def _generated(task: Any) -> list[str]:
    return [str(r.resps[0]) for r in task.instances if r.request_type == "generate_until"]


def _truncated(tasks: Mapping[str, Any], lm: Any) -> float:
    """The share of generated answers that are as long as they may be."""
    counts = [
        len(lm.tok_encode(str(request.resps[0]))) >= int(request.args[1]["max_gen_toks"])
        for task in tasks.values()
        for request in task.instances
        if request.request_type == "generate_until" and "max_gen_toks" in request.args[1]
    ]
    return sum(counts) / max(1, len(counts))


def _commonest(texts: Sequence[str]) -> float:
    return Counter(texts).most_common(1)[0][1] / len(texts)
