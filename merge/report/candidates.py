"""A row for each candidate of a search: for people, and with everything for machines."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from merge.report.page import Cell
from merge.report.study import SPLITS, Entry, Search
from merge.report.varied import label_of
from merge.search.front import short_names
from merge.search.space import Choice, Dimension


def columns_of(search: Search) -> tuple[list[str], list[list[Cell]]]:
    """A row for each candidate, for people."""
    tasks = tasks_of(search.entries)
    head = [
        "number", "origin", "state", "dev", "± dev", *on_split("dev", tasks),
        *("dev cut off %", "dev empty %", "dev alike %"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for e in search.entries:
        dev = e.dev
        shares = [100 * s for s in (dev.truncated, dev.empty, dev.alike)] if dev else [None] * 3
        values = [_shown_value(d, e) for d in search.dimensions]
        rows.append(
            [
                e.number, e.origin, e.state, *scores_of(e, ["dev"]),
                *(in_points(e.tasks.get(t)) for t in tasks), *shares, *values,
            ]
        )  # fmt: skip
    return [*head, *(label_of(d.name, search.data) for d in search.dimensions)], rows


def _shown_value(dimension: Dimension, entry: Entry) -> Cell:
    """A value of a dimension; of a choice what was chosen."""
    value = entry.asked.get(dimension.name)
    if value is None or not isinstance(dimension, Choice):
        return value
    return dimension.labels[int(value)]


def all_columns_of(search: Search) -> tuple[list[str], list[list[Cell]]]:
    """A row for each candidate, with everything, for machines: fractions, not points."""
    tasks = tasks_of(search.entries)
    splits = [f"{split}_{key}" for split in SPLITS for key in ("mean", "stderr")]
    shares = ["truncated", "empty", "alike"]
    own = list(search.objectives) if search.own else []
    head = [
        "number", "origin", "state", "ended", "front", *splits, *(f"task {t}" for t in tasks),
        *(f"objective {n}" for n in own), *shares, "seconds",
        *(d.name for d in search.dimensions), "reason", "recipe",
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for e in search.entries:
        figures = [e.splits.get(split) for split in SPLITS]
        scores = [v for f in figures for v in ((f.mean, f.stderr) if f else (None, None))]
        rows.append(
            [
                e.number, e.origin, e.state, e.place, int(e.number in search.front), *scores,
                *(e.tasks.get(t) for t in tasks),
                *(e.objectives if own and e.objectives else [None] * len(own)),
                *(getattr(e.dev, share) if e.dev else None for share in shares), e.seconds,
                *(_shown_value(d, e) for d in search.dimensions), e.reason, recipe_text(e.recipe),
            ]
        )  # fmt: skip
    return head, rows


def in_points(value: float | None) -> float | None:
    """A fraction as points, of which 100 are all."""
    return None if value is None else 100 * value


def scores_of(entry: Entry, splits: Sequence[str]) -> list[float | None]:
    """Mean and standard error on each split, in points; None where it was not scored there."""
    found: list[float | None] = []
    for split in splits:
        figures = entry.splits.get(split)
        found += [in_points(figures.mean), in_points(figures.stderr)] if figures else [None, None]
    return found


def on_split(split: str, names: Sequence[str]) -> list[str]:
    """Headings of columns of tasks or objectives on a split."""
    return [f"{split} {name}" for name in short_names(names)]


def tasks_of(entries: Sequence[Entry]) -> list[str]:
    """The tasks of dev that any of them was scored on."""
    return list(dict.fromkeys(task for entry in entries for task in entry.tasks))


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A candidate as `mergetool run` takes it."""
    text: str = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    return text
