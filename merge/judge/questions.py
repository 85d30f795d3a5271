"""Questions of two turns, read from JSON lines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import RequestError
from merge.shipped import shipped


@dataclass(frozen=True)
class Question:
    """`turns`: what is asked, one after the other. `reference`: what a right answer to each turn says, empty
    where that is open."""

    id: str
    language: str
    kind: str
    turns: tuple[str, ...]
    reference: tuple[str, ...]


def questions_of(names: Sequence[str]) -> list[Question]:
    """The questions of shipped sets (en, de) and of files; raises RequestError."""
    found: dict[str, Question] = {}
    for name in names:
        for question in _read(_file_of(name)):
            if question.id in found:
                raise RequestError(f"questions {name}: id {question.id!r} is there twice")
            found[question.id] = question
    return list(found.values())


def _file_of(name: str) -> Path:
    own, sets = Path(name), shipped("evals/judge")
    if own.is_file():
        return own
    known = sorted(file.stem for file in sets.glob("*.jsonl"))
    if name not in known:
        raise RequestError(f"questions {name!r}: no such file, and none of {', '.join(known)}")
    return sets / f"{name}.jsonl"


def _read(file: Path) -> list[Question]:
    try:
        lines = file.read_bytes().splitlines()  # of bytes: texts may hold other ends of lines
    except OSError as error:
        raise RequestError(f"{file}: cannot be read ({error.strerror})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_question(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(
                f"{file}:{number}: is no question ({type(error).__name__}: {error}); it needs id and turns, "
                "a list of texts"
            ) from None
    if not found:
        raise RequestError(f"{file}: holds no questions")
    return found


def _question(row: Mapping[str, Any]) -> Question:
    turns = _texts(row, "turns")
    reference = _texts(row, "reference") if row.get("reference") else ("",) * len(turns)
    if not all(turns):
        raise ValueError("turns must be texts that say something")
    if len(reference) != len(turns):
        raise ValueError("reference must have a text for each turn")
    return Question(
        str(row["id"]), str(row.get("language", "")), str(row.get("kind", "")), turns, reference
    )


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """One at least; raises ValueError, also for half a character, which no tokenizer takes."""
    texts = row[key]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not texts:
        raise ValueError(f"{key} must be a list of texts")
    "".join(texts).encode()
    return tuple(texts)
