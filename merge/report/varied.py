"""What varies in a search, what a candidate has of it, and how people call it."""

from collections.abc import Mapping, Sequence
from typing import Any

from merge.search.space import LEFT, PICKED, Choice, Dimension, Space


def dimensions_of(space: Space) -> tuple[Dimension, ...]:
    """What varies in a document. Which model a place in a pool has is one dimension, though it is asked for
    twice where the first answer was taken, the second time among those that were left."""
    found = space.dimensions()
    names = {dimension.name for dimension in found}

    def is_second(name: str) -> bool:
        place, _, last = name.rpartition(".")
        return last == LEFT and f"{place}.{PICKED}" in names

    return tuple(dimension for dimension in found if not is_second(dimension.name))


def values_among(
    space: Space, dimensions: Sequence[Dimension], asked: Mapping[str, float]
) -> dict[str, float]:
    """What a candidate has in each dimension by these answers; of a choice its number. Raises KeyError where
    they are not answers to this document."""
    picked = space.models_picked(asked) if asked else {}
    found = {d.name: asked[d.name] for d in dimensions if d.name in asked}
    pools = [d for d in dimensions if isinstance(d, Choice) and d.name in picked]
    return found | {pool.name: pool.labels.index(picked[pool.name]) for pool in pools}


def label_of(name: str, data: Mapping[str, Any]) -> str:
    """A dimension's name for people: `models.1.parameters.weight` is `MODEL weight`."""
    value: Any = data
    said: list[str] = []
    parts = name.split(".")
    for i, part in enumerate(parts):
        value = _within(value, part)
        if value is None:
            said += parts[i:]
            break
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            said = [value["model"]]
        elif part != "parameters":
            said.append(part)
    return " ".join(said)


def _within(value: Any, part: str) -> Any:
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return value[int(part)]
    return value.get(part) if isinstance(value, dict) else None
