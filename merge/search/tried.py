"""Recipes that a search tries: what stands for one, and those that it tries whatever it finds."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge.agreement import canonical
from merge.methods import all_methods

ABOUT_FILES = ("output", "name", "score")  # of no effect on what a candidate is


def digest_of(recipe: Mapping[str, Any]) -> str:
    """Stands for a recipe with values."""
    told = {key: value for key, value in recipe.items() if key not in ABOUT_FILES}
    return hashlib.sha256(canonical(told).encode()).hexdigest()


def parents_of(data: Mapping[str, Any]) -> list[str]:
    """Every model that a search may merge, once, in the order of the document; a base where a method may
    merge it, not where it only is what task vectors are taken from."""
    return list(dict.fromkeys([*_merged_bases(data), *_models(data)]))


def baselines(
    data: Mapping[str, Any], starts: Sequence[Mapping[str, Any]] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, recipe) of each parent as it is, those of recipes that a search `starts` with too, and of the
    plain average of those that the search itself may merge."""
    common = {key: data[key] for key in ("dtype", "out_dtype") if isinstance(data.get(key), str)}
    about_tokens = {key: data[key] for key in ("tokenizer", "stop", "chat_template") if key in data}
    parents = parents_of(data)
    brought = (parent for recipe in starts for parent in parents_of(recipe))
    for parent in dict.fromkeys([*parents, *brought]):
        yield f"parent {parent}", {"model": parent, **common}
    if len(parents) > 1:
        models = [{"model": parent, "parameters": {"weight": 1.0}} for parent in parents]
        average = {"merge_method": "linear", "models": models}
        if isinstance(base := data.get("base_model"), str) and about_tokens:
            average["base_model"] = base
        yield "average", average | common | about_tokens


def name_of(origin: str) -> str:
    """What a baseline of that origin is called: as the parent, or `average`."""
    return origin.removeprefix("parent ")


def _merged_bases(
    value: Any, methods: Sequence[str] = (), bases: Sequence[str] = ()
) -> Iterator[str]:
    """The bases of methods that go from there to another model; what is within has the `methods` and the
    `bases` of what it is in, unless it names its own."""
    if isinstance(value, list):
        for each in value:
            yield from _merged_bases(each, methods, bases)
    if not isinstance(value, dict):
        return
    methods = list(_texts(value.get("merge_method"))) or methods
    bases = list(_texts(value.get("base_model"))) or bases
    if "variants" not in value and any(map(_merges_its_base, methods)):
        yield from bases
    for each in value.values():
        yield from _merged_bases(each, methods, bases)


def _merges_its_base(name: str) -> bool:
    method = all_methods().get(name)
    return method is not None and (
        method.base == "first" or (method.base == "required" and method.models == (1, 1))
    )


def _models(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from _models(each)
    if not isinstance(value, dict):
        return
    for key, each in value.items():
        if key == "model":
            yield from _texts(each)
        elif key == "pool" or (key == "models" and isinstance(each, list)):
            yield from (name for name in each if isinstance(name, str))
            yield from _models(each)
        else:
            yield from _models(each)


def _texts(value: Any) -> Iterator[str]:
    """A name, or those of a choice."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (name for name in value.get("choice", ()) if isinstance(name, str))
