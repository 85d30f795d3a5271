"""Opens a model as a recipe names it: a local folder, a hub id with an optional revision, or zoo:NAME;
then, each after a plus, LoRA adapters named in the same ways."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from merge.errors import SourceError
from merge.shipped import shipped
from merge.sources import Source
from merge.sources.adapter import with_adapter
from merge.sources.foreign import foreign_files, refuse_declared, refuse_quantised
from merge.sources.model import (
    ADAPTER,
    ZOO,
    Model,
    holds_adapter,
    public_name,
    read_json,
    refuse_adapters,
)
from merge.sources.weights import open_weights

HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")
Fetch = Callable[[str, str | None], tuple[Path, str]]
Peek = Callable[[str, str | None], tuple[Path, str, Source]]


def open_model(
    label: str,
    beside: Sequence[Path] = (),
    fetch: Fetch | None = None,
    peek: Peek | None = None,
    fetch_adapter: Fetch | None = None,
    seen_as: Callable[[Model], Model] | None = None,
    headless: bool = False,
) -> Model:
    """The model that `label` names, with its adapters; raises SourceError.

    beside: folders that relative paths may start from, after the current one. fetch(repo, revision)
    -> (folder, commit) gets a model from the hub; None means that this is not wanted. peek(repo,
    revision) -> (folder, commit, source) is taken instead where only headers are needed.
    fetch_adapter: as fetch, for adapters. seen_as: what the model is taken for, before adapters come onto it.
    headless: as of with_adapter.
    """
    base, *adapters = _parts(label, beside)
    model = _open_plain(base, beside, fetch, peek)
    model = seen_as(model) if seen_as else model
    for part in adapters:
        folder, commit = locate(part, beside, fetch_adapter)
        if (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
            raise SourceError(
                f"model {label!r}: {part} is a model; what follows a plus is an adapter"
            )
        name = public_name(part, folder, commit)
        model = with_adapter(model, folder, name, commit, headless=headless)
    return replace(model, label=label)


def is_adapter(label: str, beside: Sequence[Path] = ()) -> bool:
    """Whether `label` names an adapter that is here: a folder, or one of the tiny family."""
    try:
        folder, _ = locate(label, beside)
    except SourceError:
        return False
    return holds_adapter(folder)


def named_from(places: Sequence[Path], label: str, beside: Sequence[Path] = ()) -> str:
    """`label` as it means the same where relative paths start from any of `places`: a folder that none of
    them leads to is written from the first. Raises SourceError where it means two folders.

    beside: as of open_model.
    """
    return "+".join(_named_from(places, part, beside) for part in _parts(label, beside))


def _named_from(places: Sequence[Path], part: str, beside: Sequence[Path]) -> str:
    path = _at_home(part)
    if part.startswith(ZOO) or path.is_absolute():
        return part
    if not any(_is_folder(start / path) for start in (Path(), *beside)):
        return part  # of the hub, or nowhere
    found, _ = locate(part, beside)
    if any((start / path).resolve() == found for start in places):
        return part
    return os.path.relpath(found, places[0].resolve())


def _parts(label: str, beside: Sequence[Path]) -> list[str]:
    """The model and its adapters; a plus in the name of a folder that is there separates nothing."""
    pieces = label.split("+")
    names = ["+".join(pieces[:count]) for count in range(len(pieces), 0, -1)]
    found = next(
        (n for n in names if any(_is_folder(s / _at_home(n)) for s in (Path(), *beside))), ""
    )
    first = found if "+" in found else pieces[0]
    rest = label[len(first) + 1 :]
    if "+" in label and not (first and (rest or first == label)):
        raise SourceError(f"model {label!r}: nothing before or after a plus; write model+adapter")
    return [first, *(_parts(rest, beside) if rest else ())]


def _open_plain(
    label: str, beside: Sequence[Path], fetch: Fetch | None, peek: Peek | None
) -> Model:
    peeked: list[Source] = []

    def peeking(repo: str, revision: str | None) -> tuple[Path, str]:
        assert peek is not None
        folder, commit, source = peek(repo, revision)
        peeked.append(source)
        return folder, commit

    folder, commit = locate(label, beside, peeking if peek else fetch)
    refuse_adapters(folder)
    if holds_adapter(folder):
        raise SourceError(
            f"model {label!r}: is an adapter; write the model that it adapts, a plus and this"
        )
    if not (folder / "config.json").is_file() and (
        found := foreign_files(file.name for file in folder.iterdir())
    ):
        raise SourceError(
            f"{folder}: holds {found}; weights are read from safetensors or PyTorch files"
        )
    config = read_json(folder / "config.json")
    refuse_declared(str(folder), config)
    source = peeked[0] if peeked else open_weights(folder)
    refuse_quantised(str(folder), source.tensors)
    return Model(label, folder, config, source, commit)


def locate(
    label: str, beside: Sequence[Path] = (), fetch: Fetch | None = None
) -> tuple[Path, str | None]:
    """Folder and hub commit of the model that `label` names; raises SourceError."""
    if label.startswith(ZOO):
        return _in_zoo(label), None
    if not label.isprintable():
        raise SourceError(f"model {label!r}: not the name of a folder or of a hub model")
    places = {(start / _at_home(label)).resolve() for start in (Path(), *beside)}
    found = [place for place in places if _is_folder(place)]
    if len(found) > 1:
        raise SourceError(
            f"model {label!r} is both {found[0]} and {found[1]}; write the whole path"
        )
    if found:
        return found[0], None
    if "+" in label:
        raise SourceError(
            f"model {label!r}: a model with adapters has no folder of its own; merge them first"
        )
    if files := [place for place in places if place.is_file()]:
        format = foreign_files([files[0].name])
        raise SourceError(
            f"model {label!r}: is a file{format and f', {format}'}; a model is a folder with config.json "
            "beside its weights"
        )
    hub = HUB_ID.match(label)
    if fetch and hub and not label.startswith((".", "/", "~")):
        try:
            return fetch(hub["repo"], hub["revision"])
        except SourceError as error:
            raise SourceError(f"{error} (and there is no folder {label!r} here)") from None
    raise SourceError(
        f"model {label!r}: no such folder, and not a hub id (owner/name or owner/name@revision)"
    )


def _at_home(label: str) -> Path:
    try:
        return Path(label).expanduser()
    except RuntimeError:  # ~name of nobody
        return Path(label)


def _is_folder(place: Path) -> bool:
    try:
        return place.is_dir()
    except OSError:  # a name too long for the file system
        return False


def _in_zoo(label: str) -> Path:
    zoo = shipped("evals/zoo")
    folder = zoo / label.removeprefix(ZOO)
    file = {zoo: "config.json", zoo / "adapters": ADAPTER}.get(folder.parent)
    if not re.fullmatch(r"[\w.-]+", folder.name) or not file or not (folder / file).is_file():
        found = [*sorted(zoo.glob("*/config.json")), *sorted(zoo.glob(f"adapters/*/{ADAPTER}"))]
        names = ", ".join(ZOO + str(p.parent.relative_to(zoo)) for p in found)
        raise SourceError(f"model {label!r}: not in the tiny model family; it has {names}")
    return folder
