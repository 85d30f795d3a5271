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
    """The files that a command or a recipe names: of zoo:texts those of the tiny family, zoo:texts/NAME one
    of them, of a folder all with texts; raises PlanError where it has none."""
    found: list[Path] = []
    for place in given:
        folder = _in_zoo(place)
        within = sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES)
        if folder.is_dir() and not within:
            raise PlanError(
                f"{place}: holds no texts; a folder of texts has {' or '.join(SUFFIXES)} files"
            )
        found += within if folder.is_dir() else [folder]
    return found


def _in_zoo(place: Path) -> Path:
    """The place itself unless it is zoo:texts or a file of those; raises PlanError for one that is none."""
    head, _, name = str(place).partition("/")
    if head != ZOO_TEXTS:
        return place
    folder = shipped("evals/zoo") / "texts"
    known = sorted(file.name for file in folder.iterdir())
    if name and name not in known:
        listed = ", ".join(f"{ZOO_TEXTS}/{each}" for each in known)
        raise PlanError(f"{place}: is none of the tiny family's texts; there are {listed}")
    return folder / name


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


class TextsDigest:
    """XXH3-128 of what the texts say that have gone through `of`, in their order; not of where they stand."""

    def __init__(self) -> None:
        self._found = xxhash.xxh3_128()

    def of(self, texts: Iterable[Text]) -> Iterator[Text]:
        """The texts, each counted as it is taken."""
        for text in texts:
            self._found.update(json.dumps([text.prompt, text.completion]).encode() + b"\n")
            yield text

    @property
    def hex(self) -> str:
        return self._found.hexdigest()


def texts_digest(texts: Iterable[Text]) -> str:
    """TextsDigest of all."""
    found = TextsDigest()
    for _ in found.of(texts):
        pass
    return found.hex
