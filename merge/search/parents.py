"""Whether the models that a study merges are still those that it was begun with."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from merge.errors import ReadError, RequestError
from merge.sources.model import Model

PIECE = 8 << 20  # bytes read at once
AROUND = (".json", ".txt", ".model", ".jinja")  # what lies around weights and says what a model is


def parents_facts(models: Mapping[str, Model]) -> dict[str, Any]:
    """`parents`: a digest of all files of each model, by label; `stamps`: [bytes, time of change] by file.

    Reads every file once, as scoring a single candidate does. Raises ReadError.
    """
    return {
        "parents": {label: _digest(_files(model)) for label, model in models.items()},
        "stamps": _stamps(models),
    }


def check_parents(models: Mapping[str, Model], facts: Mapping[str, Any], study: str) -> None:
    """Raises RequestError where the files of a model are not those that `facts` tell of.

    Files of other size or time than then, or in another place, are read.
    """
    stamps, then = _stamps(models), facts["parents"]
    for label in {**then, **models}:
        files = _files(models[label]) if label in models else []
        same = all(facts["stamps"].get(str(file)) == stamps[str(file)] for file in files)
        if label not in then or not files or (not same and _digest(files) != then[label]):
            raise RequestError(
                f"{label}: its files are not those that {study} was begun with, and scores of both cannot be "
                "compared; put them back or begin a new study"
            )


def _files(model: Model) -> list[Path]:
    """Weights, adapters and what lies around them, in one order everywhere."""
    folders = (model.folder, *model.adapters)
    around = [f for folder in folders for f in folder.iterdir() if f.suffix in AROUND]
    return sorted({*model.files(), *around}, key=lambda file: (file.parent.name, file.name))


def _stamps(models: Mapping[str, Model]) -> dict[str, list[int]]:
    files = (file for model in models.values() for file in _files(model))
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _digest(files: Iterable[Path]) -> str:
    """XXH3-128 over names, sizes and contents: it guards against accidents."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                yield piece
    except OSError as error:
        raise ReadError(f"{file}: cannot be read: {error.strerror or error}") from None
