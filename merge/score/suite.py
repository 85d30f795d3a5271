"""Suites: which tasks are scored together, and what counts of each."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merge.errors import RequestError
from merge.lines import first_twice
from merge.shipped import shipped

KEYS = ("task", "metric", "higher_is_better", "num_fewshot", "full", "part")
KEYS_OF_SUITE = ("name", "description", "source", "batch_size", "tasks", "search_tasks")
# metrics of the harness that are no shares of anything
UNBOUNDED = frozenset(
    [
        *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
        *("likelihood_diff", "brier_score", "bleu", "chrf", "chrf++", "ter"),
        *("eqbench", "percent_parseable", "exact"),
    ]
)
# and what goes from 0 to 100 in truthfulqa, norsumm and squadv2
SCALED = re.compile(r"(bleu|rouge[12L])_(max|diff|avg)|(HasAns|NoAns|best)_(exact|f1)")


@dataclass(frozen=True)
class Task:
    """A task, group or tag of lm-eval and the metric of it that counts, as lm-eval names it: with the filter
    of answers after a comma. `num_fewshot`: solved examples before each document, where the suite says so.
    `full`: the value of the metric that is full marks. `part`: whose tasks count together as one in a mean;
    a task without is one itself."""

    name: str
    metric: str
    higher_is_better: bool
    num_fewshot: int | None = None
    full: float = 1.0
    part: str = ""

    @property
    def is_share(self) -> bool:
        """Whether values are fractions, to be shown in per cent, as far as names tell."""
        name = self.metric.partition(",")[0]
        return self.full != 1 or not (name in UNBOUNDED or SCALED.fullmatch(name))


@dataclass(frozen=True)
class Suite:
    """Tasks that are scored together. `folder` holds suite.yaml, or is the file itself; `include` are
    folders with tasks that the harness does not bring. `source`: whose settings these are."""

    name: str
    folder: Path
    tasks: tuple[Task, ...]
    batch_size: int
    include: tuple[Path, ...] = ()
    source: str = ""

    @classmethod
    def named(cls, name: str, *, split: str = "heldout") -> "Suite":
        """A shipped suite, or one in a folder or file; split "search" takes its search_tasks."""
        file = _file_of(name)
        key = "tasks" if split == "heldout" else "search_tasks"
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
            _check_keys(data, KEYS_OF_SUITE, "a suite")
            tasks = tuple(_task(entry) for entry in _listed(data, key))
            batch_size = _whole("batch_size", data.get("batch_size", 1), least=1)
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"{file}: is no suite ({type(error).__name__}: {error}); it needs name and tasks "
                "with task and metric"
            ) from None
        if not tasks:
            raise RequestError(f"{file}: lists no {key}")
        alone = file.name != "suite.yaml"
        brings_tasks = not alone and len(list(file.parent.glob("*.yaml"))) > 1
        return cls(
            str(data.get("name", file.stem if alone else file.parent.name)),
            file if alone else file.parent,
            tasks,
            batch_size,
            (file.parent,) if brings_tasks else (),
            str(data.get("source", "")),
        )


def shares_by_part(parts: Mapping[str, str]) -> dict[str, float]:
    """What each task counts in a mean, of any sum, by the part that it belongs to: each part is the mean of
    its tasks and counts as any other; a task of no part is one itself."""
    of = {task: part or ("", task) for task, part in parts.items()}
    sizes = Counter(of.values())
    return {task: 1 / sizes[part] for task, part in of.items()}


def _file_of(name: str) -> Path:
    place = Path(name)
    own = (place / "suite.yaml").is_file() or len(place.parts) > 1 or place.suffix == ".yaml"
    suites = shipped("evals/suites")
    beside = [place] if own else [suites / name, suites / f"{name}.yaml"]
    found = [file for each in beside for file in (each / "suite.yaml", each) if file.is_file()]
    if found:
        return found[0]
    known = [p.parent.name for p in suites.glob("*/suite.yaml")]
    known += [p.stem for p in suites.glob("*.yaml")]
    raise RequestError(
        f"no suite {name!r}: neither a folder with suite.yaml, a .yaml file, nor one of "
        f"{', '.join(sorted(known))}"
    )


def _listed(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The entries under `key`, each of another task."""
    entries = data.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{key} must be a list of tables")
    if twice := first_twice([str(entry.get("task")) for entry in entries]):
        raise ValueError(f"{key} names {twice} twice")
    return entries


def _check_keys(data: Mapping[str, Any], known: Sequence[str], of: str) -> None:
    if unknown := [str(key) for key in data if key not in known]:
        raise ValueError(f"{unknown[0]} is no key of {of}; there are {', '.join(known)}")


def _task(entry: Mapping[str, Any]) -> Task:
    _check_keys(entry, KEYS, "a task")
    few, full = entry.get("num_fewshot"), entry.get("full", 1)
    better = entry.get("higher_is_better", True)
    if not isinstance(better, bool):
        raise ValueError(f"higher_is_better is {better!r}; it must be true or false")
    if isinstance(full, bool) or not isinstance(full, int | float) or not 0 < full < math.inf:
        raise ValueError(f"full is {full!r}; it must be a number above 0")
    return Task(
        str(entry["task"]),
        str(entry["metric"]),
        better,
        None if few is None else _whole("num_fewshot", few, least=0),
        float(full),
        str(entry.get("part", "")),
    )


def _whole(key: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:  # true is no number here
        raise ValueError(f"{key} is {value!r}; it must be a whole number from {least}")
    return value
