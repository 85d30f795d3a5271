"""A recipe in another folder: what it names by relative paths is named from there."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge.sources.opening import named_from

MODELS = ("model", "base_model")
SOURCES = ("source", "tokenizer_source")  # of tokens: models, and these words
WORDS = ("base", "union")
OF_MODEL, OF_FILE = "model:", "file:"


def moved(recipe: Mapping[str, Any], here: Path, there: Sequence[Path]) -> dict[str, Any]:
    """A recipe that lies in `here` as it has to be written to mean the same where relative names start from
    any of the folders `there`: other names are written from the first. Raises SourceError where a name means
    two folders."""
    names = {label: named_from(there, label, [here]) for label in _labels(recipe)}

    def renamed(key: str, text: str) -> str:
        if text.startswith(OF_FILE):
            return OF_FILE + _file_from(there, text.removeprefix(OF_FILE), here)
        if text.startswith(OF_MODEL):
            return OF_MODEL + _row_from(names, text.removeprefix(OF_MODEL))
        return text if key in SOURCES and text in WORDS else names.get(text, text)

    return {key: _mapped(value, key, renamed) for key, value in recipe.items()}


def _labels(value: Any, key: str = "") -> Iterator[str]:
    """Every model that is named in a recipe, also several times."""
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from _labels(each, str(inner))
    elif isinstance(value, list):
        for each in value:
            yield from _labels(each, key)
    elif key in MODELS and isinstance(value, str):
        yield value
    elif key in SOURCES and isinstance(value, str) and value not in WORDS:
        yield value.removeprefix(OF_MODEL)


def _mapped(value: Any, key: str, renamed: Callable[[str, str], str]) -> Any:
    """The value with its texts renamed, those alone that can name a model or a file."""
    if isinstance(value, dict):
        return {inner: _mapped(each, str(inner), renamed) for inner, each in value.items()}
    if isinstance(value, list):
        return [_mapped(each, key, renamed) for each in value]
    named = key in (*MODELS, "models", *SOURCES, "embed", "head", "from", "chat_template")
    return renamed(key, value) if named and isinstance(value, str) else value


def _row_from(names: Mapping[str, str], told: str) -> str:
    """NAME or NAME:TOKEN with the model's other name."""
    for label, name in names.items():
        if told == label or told.startswith(f"{label}:"):
            return name + told.removeprefix(label)
    return told


def _file_from(there: Sequence[Path], name: str, here: Path) -> str:
    """The name of a file that is looked for in `here` first, as it is found from `there`."""
    found = next((place for place in (here / name, Path(name)) if place.is_file()), None)
    if found is None or any(_same(start / name, found) for start in there):
        return name
    return os.path.relpath(found.resolve(), there[0].resolve())


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
