"""Example texts from files: one a line, or JSON lines with a text, or with a prompt and its completion."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from merge.errors import PlanError
from merge.shipped import shipped

ZOO_TEXTS = "zoo:texts"
SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Text:
    """`completion` follows `prompt` with nothing between; a plain text is a completion of nothing.
    `place`: FILE:LINE."""

    prompt: str
    completion: str
    place: str

    @property
    def whole(self) -> str:
        return self.prompt + self.completion


def read_texts(files: Sequence[Path]) -> list[Text]:
    """The texts of all files, in their order; raises PlanError `FILE:LINE: ...`, or where a file has none."""
    found: list[Text] = []
    for file in files:
        before = len(found)
        found += texts_of(file)
        if len(found) == before:
            raise PlanError(f"{file}: holds no texts; one a line, or JSON lines in a file .jsonl")
    return found


def text_files(given: Sequence[Path]) -> list[Path]:
    """The files that a command names: of zoo:texts those of the tiny family, of a folder all with texts;
    raises PlanError where it has none."""
    found: list[Path] = []
    for place in given:
        folder = shipped("evals/zoo") / "texts" if str(place) == ZOO_TEXTS else place
        within = sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES)
        if folder.is_dir() and not within:
            raise PlanError(
                f"{place}: holds no texts; a folder of texts has {' or '.join(SUFFIXES)} files"
            )
        found += within if folder.is_dir() else [place]
    return found


def texts_in(file: Path) -> Iterator[str]:
    """As texts_of, each in one piece."""
    return (text.whole for text in texts_of(file))


def texts_of(file: Path) -> Iterator[Text]:
    """The texts of one file as they are read, empty lines left out; raises PlanError `FILE:LINE: ...`."""
    read = _told if file.suffix == ".jsonl" else _plain
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield read(f"{file}:{number}", line)
    except OSError as error:
        raise PlanError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise PlanError(f"{file}: is not UTF-8 text") from None


def _plain(place: str, line: str) -> Text:
    return Text("", line.rstrip("\r\n"), place)


def _told(place: str, line: str) -> Text:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{place}: is not JSON ({error})") from None
    table = data if isinstance(data, dict) else {}
    prompt = "" if "text" in table else table.get("prompt")
    completion = table.get("text", table.get("completion"))
    if isinstance(prompt, str) and isinstance(completion, str) and completion:
        return Text(prompt, completion, place)
    raise PlanError(
        f'{place}: holds no text; a line is {{"text": ...}} or {{"prompt": ..., "completion": ...}}'
    )


def texts_digest(texts: Iterable[Text]) -> str:
    """XXH3-128 of what the texts say, in their order; not of where they stand."""
    found = xxhash.xxh3_128()
    for text in texts:
        found.update(json.dumps([text.prompt, text.completion]).encode() + b"\n")
    return found.hexdigest()
