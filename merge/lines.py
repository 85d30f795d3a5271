"""YAML with the line of every value, so that every error can say where."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from merge.errors import RecipeError

Path = tuple[str | int, ...]  # keys and list positions from the top of a document


@dataclass(frozen=True)
class Lines:
    """Where things stand in a file: `numbers` maps the path of a value to its line."""

    file: str
    numbers: Mapping[Path, int]

    def at(self, *path: str | int) -> str:
        """`file:line` of the value at `path`, or of the innermost value around it."""
        known = (path[:end] for end in range(len(path), -1, -1) if path[:end] in self.numbers)
        return f"{self.file}:{self.numbers.get(next(known, ()), 1)}"

    def error(self, path: Sequence[str | int], message: str) -> RecipeError:
        return RecipeError(f"{self.at(*path)}: {message}")


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 in which 1e-3 is a number; PyYAML reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9]+[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
_ALIAS_LIMIT = 100_000  # nodes; a recipe is read by people, an alias bomb is not


def load_documents(text: str, file: str) -> list[tuple[dict[str, Any], Lines]]:
    """The tables in `text`, one for each document that is not empty, and where their values stand;
    raises RecipeError."""
    found: list[tuple[dict[str, Any], Lines]] = []
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            lines: dict[Path, int] = {(): node.start_mark.line + 1}
            _collect_lines(node, (), lines, file)
            data = loader.construct_document(node)
            if data is not None:
                found.append((_table(data, lines[()], file), Lines(file, lines)))
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = " ".join((error.problem or "malformed").split())
        raise RecipeError(f"{file}:{mark.line + 1 if mark else 1}: not YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(
            f"{file}:{line}: not YAML: {error.reason} (#x{error.character:04x})"
        ) from None
    except (
        Exception
    ) as error:  # PyYAML meets a wrong !!timestamp with AttributeError, !!bool with KeyError
        raise RecipeError(f"{file}:1: not YAML: {' '.join(str(error).split())}") from None
    return found or [(_table(None, 1, file), Lines(file, {}))]


def _table(data: Any, line: int, file: str) -> dict[str, Any]:
    if data is None:
        raise RecipeError(f"{file}:{line}: is empty; a recipe has merge_method and models at least")
    if not isinstance(data, dict):
        raise RecipeError(
            f"{file}:{line}: a recipe is a table of keys such as merge_method and models, not "
            f"{type(data).__name__}"
        )
    return data


def _collect_lines(node: yaml.Node, path: Path, lines: dict[Path, int], file: str) -> None:
    if len(lines) > _ALIAS_LIMIT:
        raise ValueError("too many values")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise RecipeError(
                    f"{file}:{key.start_mark.line + 1}: {key.value!r} is given twice (first in "
                    f"line {lines[here]})"
                )
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _collect_lines(value, (*path, i), lines, file)


def first_twice(names: Sequence[str]) -> str | None:
    """The first name that was there before, if any was."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def nearest(word: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """` (did you mean ...?)` where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""
