"""An opened model, and the files of models and adapters beside their tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import SourceError
from merge.sources import Source
from merge.sources.weights import weight_files

ZOO = "zoo:"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PICKLED = "adapter_model.bin"  # read where there are no ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Model:
    """An opened model: how the recipe names it, its folder, config.json, tensors and hub commit.

    `beside`: files outside its folder that its tensors come from too, of the LoRA adapters in the folders
    `adapters`. `computed`: it is a merge that is
    not written, with the folder of the model that lends its files. `name`: what may be told to others,
    where neither label nor folder does. `notes`: doubts that came up as it was opened. `zeros`: nothing of
    it but names and shapes counts. `within`: the mixture of adapters that it is the base inside of, and
    `known_as` what those adapters may call it.
    """

    label: str
    folder: Path
    config: Mapping[str, Any]
    source: Source
    commit: str | None = None
    beside: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    computed: bool = False
    name: str = ""
    notes: tuple[str, ...] = ()
    zeros: bool = False
    within: "Model | None" = None
    known_as: tuple[str, ...] = ()

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
        if self.computed:
            return []
        return [*(self.folder / name for name in weight_files(self.folder)), *self.beside]


def public_name(label: str, folder: Path, commit: str | None) -> str:
    """The label where it means the same to others, else the folder's name."""
    return label if commit or label.startswith(ZOO) else folder.name


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def class_names(config: Mapping[str, Any]) -> list[str]:
    """The classes that config.json names; none where it does not."""
    told = config.get("architectures")
    return [str(name) for name in told] if isinstance(told, list) else []


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other values where it has the keys: in its table about text, else at the top."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return {**config, **changes}
    inner = text | {
        key: value for key, value in changes.items() if key in text or key not in config
    }
    outer = {key: value for key, value in changes.items() if key in config}
    return {**config, "text_config": inner, **outer}


def holds_adapter(folder: Path) -> bool:
    """Whether an adapter is in `folder`, and no model."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def refuse_adapters(folder: Path) -> None:
    """Raises SourceError for a mixture of adapters in PEFT's own format, which is no model."""
    if holds_adapter(folder) and read_json(folder / ADAPTER).get("peft_type") == "XLORA":
        raise SourceError(
            f"{folder}: is a mixture of adapters that PEFT loads (format: peft), and no model; make the same "
            "experts with format: routed"
        )


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
