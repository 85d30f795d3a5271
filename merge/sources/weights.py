"""The weights of a model folder as a Source: safetensors, or PyTorch checkpoints where there are none."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge.errors import SourceError
from merge.sources import Source, TensorInfo
from merge.sources.foreign import foreign_files
from merge.sources.pickled import read_checkpoint
from merge.sources.positioned import stored_source
from merge.sources.safetensors import INDEX, SINGLE, read_header


@dataclass(frozen=True)
class Layout:
    """How a format lays out a model: its shard index, its single file, the endings of its files."""

    index: str
    single: str
    endings: tuple[str, ...]
    read: Callable[[Path], dict[str, TensorInfo]]


SAFETENSORS = Layout(INDEX, SINGLE, (".safetensors",), read_header)
PICKLED = Layout(
    "pytorch_model.bin.index.json", "pytorch_model.bin", (".bin", ".pt", ".pth"), read_checkpoint
)
LAYOUTS = (SAFETENSORS, PICKLED)  # the first that a folder has is taken
# what trainers and tokenizers leave beside pytorch_model.bin
NO_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|tokenizer)"
)


def open_weights(folder: Path, layouts: Sequence[Layout] = LAYOUTS) -> Source:
    """The tensors of the model in `folder`; raises SourceError when it is not whole."""
    files = weight_files(folder, layouts)
    read = layout_of(files).read
    return stored_source(whole_model(folder, {file: read(folder / file) for file in files}))


def open_safetensors(folder: Path) -> Source:
    """As `open_weights`, of safetensors alone: what a merge writes."""
    return open_weights(folder, (SAFETENSORS,))


def weight_files(folder: Path, layouts: Sequence[Layout] = LAYOUTS) -> list[str]:
    """Names of the files that make up the model in `folder`, by the index where there is one."""
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    return chosen_files(str(folder), folder, [file.name for file in folder.iterdir()], layouts)


def chosen_files(
    where: str, folder: Path, names: Sequence[str], layouts: Sequence[Layout] = LAYOUTS
) -> list[str]:
    """The files among `names` that make up the model. `folder` has the index; `where` names the model."""
    files: list[str] = []
    for layout in layouts:
        if layout.index in names:
            return sorted(set(_index_of(folder, layout).values()))
        files = sorted(name for name in names if _may_be_weights(name, layout))
        if layout.single in files or len(files) == 1:
            return [layout.single] if layout.single in files else files
        if files:
            break
    found = foreign_files(names) or ", ".join(files[:3] or sorted(names)[:5]) or "nothing"
    wanted = " and no ".join(name for layout in layouts for name in (layout.single, layout.index))
    raise SourceError(
        f"{where}: no {wanted} (found {found}); convert the weights to safetensors, or choose a "
        "folder, repository or revision that has them"
    )


def _may_be_weights(name: str, layout: Layout) -> bool:
    return name.endswith(layout.endings) and "/" not in name and not NO_WEIGHTS.match(name)


def layout_of(files: Iterable[str]) -> Layout:
    """The layout that these weight files have."""
    return next(layout for layout in LAYOUTS if all(f.endswith(layout.endings) for f in files))


def whole_model(
    folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of all weight files (file name -> its tensors), checked against the index."""
    tensors: dict[str, TensorInfo] = {}
    owner: dict[str, str] = {}
    for file, header in headers.items():
        for name, info in header.items():
            if name in tensors:
                raise SourceError(
                    f"{folder}: tensor {name!r} is in {owner[name]} and in {file}; "
                    "a model holds each tensor once"
                )
            tensors[name], owner[name] = info, file
    _check_index(folder, layout_of(headers), owner)
    return tensors


def _check_index(folder: Path, layout: Layout, owner: Mapping[str, str]) -> None:
    if not (folder / layout.index).is_file():
        return
    for name, file in _index_of(folder, layout).items():
        if owner.get(name) != file:
            where = owner.get(name, "no file")
            raise SourceError(
                f"{folder / layout.index}: says that {name!r} is in {file}, but it is in {where}"
            )


def _index_of(folder: Path, layout: Layout) -> dict[str, str]:
    """Tensor name -> file name of a shard index; file names may not leave the folder."""
    index = folder / layout.index
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SourceError(f"{index}: not a shard index ({error}); it needs a weight_map") from None
    for file in files.values():
        if Path(file).name != file or file == ".." or not file.isprintable():
            raise SourceError(
                f"{index}: file {file!r} is not in this folder; only plain names are read"
            )
        if not file.endswith(layout.endings):
            raise SourceError(
                f"{index}: names {file!r}; only *{', *'.join(layout.endings)} is read"
            )
    if not files:
        raise SourceError(f"{index}: names no tensors")
    return files
