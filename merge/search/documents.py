"""Which documents a search may look at: dev to search on, val to choose with, test for the last comparison.

A document belongs to one of them by the hash of what it says, so that the same document is never in two,
whatever its place, task file or number of documents.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.errors import RequestError

SPLITS = ("dev", "val", "test")
SHARES = (0.5, 0.25, 0.25)  # of documents
APART = (0.6, 0.4, 0.0)  # of those of search_tasks, where a suite keeps the others for reporting


@dataclass(frozen=True)
class Split:
    """Numbers of documents by task, ascending."""

    name: str
    documents: Mapping[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        return sum(map(len, self.documents.values()))


def identity(document: Mapping[str, Any]) -> str:
    """Stands for what a document says, whatever the order of its keys."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def split_by_hash(
    tasks: Mapping[str, Sequence[Mapping[str, Any]]], shares: Sequence[float] = SHARES
) -> dict[str, Split]:
    """dev, val and test of tasks whose documents serve for all three."""
    found: dict[str, dict[str, list[int]]] = {name: {t: [] for t in tasks} for name in SPLITS}
    for task, documents in tasks.items():
        for number, document in enumerate(documents):
            drawn = int(identity(document)[:13], 16) / 16**13
            place = (drawn >= shares[0]) + (drawn >= shares[0] + shares[1])
            found[SPLITS[place]][task].append(number)
    return {name: Split(name, {t: tuple(n) for t, n in found[name].items()}) for name in SPLITS}


def refuse_overlap(
    splits: Iterable[tuple[str, Mapping[str, Sequence[Mapping[str, Any]]]]],
) -> None:
    """Raises RequestError where a document is in two splits, each given with its documents by task."""
    seen: dict[str, tuple[str, str, int]] = {}
    for name, tasks in splits:
        for task, documents in tasks.items():
            for number, document in enumerate(documents):
                first = seen.setdefault(identity(document), (name, task, number))
                if first[0] != name:
                    raise RequestError(
                        f"document {number} of {task} ({name}) is document {first[2]} of {first[1]} "
                        f"({first[0]}) too; what is searched on cannot tell how good the winner is: take "
                        "one of them out"
                    )


def check_sizes(splits: Sequence[Split]) -> None:
    """Raises RequestError where a task has no documents for one of these splits, which share them."""
    for task in dict.fromkeys(task for split in splits for task in split.documents):
        sizes = {split.name: len(split.documents.get(task, ())) for split in splits}
        if not all(sizes.values()):
            parts = ", ".join(f"{size} for {name}" for name, size in sizes.items())
            raise RequestError(
                f"task {task} has too few documents to search on: {parts}; each needs one at least, and what "
                "a document says decides for which it is: take a larger task"
            )


def limited(split: Split, most: int | None) -> Split:
    """At most so many documents of each task: those with the smallest numbers."""
    if most is None:
        return split
    return Split(split.name, {task: numbers[:most] for task, numbers in split.documents.items()})
