"""A model as a recipe names it: a local folder, a hub id with an optional revision, or zoo:NAME; then,
each after a plus, LoRA adapters named in the same ways."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge.errors import SourceError
from merge.shipped import shipped
from merge.sources import Source
from merge.sources.foreign import refuse_declared, refuse_quantised
from merge.sources.weights import open_weights, weight_files

HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")
ZOO = "zoo:"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Model:
    """An opened model: how the recipe names it, its folder, config.json, tensors and hub commit.

    `beside`: files outside its folder that its tensors come from too. `name`: what may be told to
    others, where neither label nor folder does. `notes`: doubts that came up as it was opened.
    """

    label: str
    folder: Path
    config: Mapping[str, Any]
    source: Source
    commit: str | None = None
    beside: tuple[Path, ...] = ()
    name: str = ""
    notes: tuple[str, ...] = ()

    @property
    def public_name(self) -> str:
        """The hub id or zoo name, or the folder's name: what may be told to others."""
        return self.name or public_name(self.label, self.folder, self.commit)

    @property
    def tied(self) -> bool:
        return bool(
            text_config(self.config).get(
                "tie_word_embeddings", self.config.get("tie_word_embeddings", False)
            )
        )

    def files(self) -> list[Path]:
        """The weight files, for telling later whether they changed."""
        return [*(self.folder / name for name in weight_files(self.folder)), *self.beside]


def public_name(label: str, folder: Path, commit: str | None) -> str:
    """The label where it means the same to others, else the folder's name."""
    return label if commit or label.startswith(ZOO) else folder.name


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


Fetch = Callable[[str, str | None], tuple[Path, str]]
Peek = Callable[[str, str | None], tuple[Path, str, Source]]


def open_model(
    label: str,
    beside: Sequence[Path] = (),
    fetch: Fetch | None = None,
    peek: Peek | None = None,
    fetch_adapter: Fetch | None = None,
) -> Model:
    """The model that `label` names, with its adapters; raises SourceError.

    beside: folders that relative paths may start from, after the current one. fetch(repo, revision)
    -> (folder, commit) gets a model from the hub; None means that this is not wanted. peek(repo,
    revision) -> (folder, commit, source) is taken instead where only headers are needed.
    fetch_adapter: as fetch, for adapters.
    """
    from merge.sources.adapter import with_adapter  # which builds on this module

    base, *adapters = _parts(label, beside)
    model = _open_plain(base, beside, fetch, peek)
    for part in adapters:
        folder, commit = locate(part, beside, fetch_adapter)
        model = with_adapter(model, folder, public_name(part, folder, commit), commit)
    return replace(model, label=label)


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
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise SourceError(
            f"model {label!r}: is an adapter; write the model that it adapts, a plus and this"
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
    hub = HUB_ID.match(label)
    if fetch and hub and not label.startswith((".", "/", "~")):
        return fetch(hub["repo"], hub["revision"])
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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON table from a model folder; raises SourceError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{file}: missing; a model folder has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise SourceError(f"{file}: holds a {type(data).__name__}, not a table")
    return data
