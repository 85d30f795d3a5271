"""Mixtures as they are planned, before anything is put together: tiny bases with tokenizers, and a Ground."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft_models
import yaml
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from merge.experts.assembling import Ground
from merge.numerics import grain_rows
from merge.pipeline import plan_recipe
from merge.planner import model_labels
from merge.recipe import load_recipe
from merge.sources import Source
from merge.sources.opening import open_model

WORDS = [
    "[PAD]",
    "[BOS]",
    "[EOS]",
    "[UNK]",
    "red",
    "green",
    "blue",
    "black",
    "white",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "cat",
    "dog",
    "cow",
    "hen",
]


def tokenized(folder: Path, size: int = 40) -> Path:
    """The folder with a tokenizer of words, whose texts begin and end with special tokens."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *map(str, range(size - len(WORDS)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [("[BOS]", 1), ("[EOS]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=around
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]",
        eos_token="[EOS]",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def base(folder: Path, kind: str) -> Path:
    """A tiny random model with a tokenizer."""
    return tokenized(peft_models.saved(peft_models.MODELS[kind](), folder))


def ground_of(
    base: Path, experts: list[dict[str, Any]], router: Mapping[str, Any], **keys: Any
) -> Ground:
    """What an assembly gets of a recipe with these experts on the base."""
    recipe = {"base_model": base.name, "experts": experts, "router": dict(router), **keys}
    file, alone = base.parent / "mixture.yaml", base.parent / "alone.yaml"
    file.write_text(yaml.safe_dump(recipe))
    alone.write_text(
        yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": base.name}]})
    )
    read = load_recipe(file)
    labels = model_labels(read)
    opened = tuple(replace(open_model(label, [file.parent]), label=label) for label in labels)
    plan = replace(plan_recipe(alone), recipe=read, models=opened)
    return Ground(plan, {label: i for i, label in enumerate(labels)}, {})


def read(source: Source, name: str, *, by_grains: bool = False) -> NDArray[np.float32]:
    """A computed tensor, in one piece or grain by grain."""
    info = source.tensors[name]
    step = grain_rows(info.shape) if by_grains else max(1, info.rows)
    parts = [
        source.rows(name, first, min(first + step, info.rows))
        for first in range(0, info.rows, step)
    ]
    return np.concatenate(parts).reshape(info.shape)


def digest(source: Source) -> str:
    """Of all tensors."""
    found = hashlib.sha256()
    for name in sorted(source.tensors):
        found.update(name.encode() + read(source, name).tobytes())
    return found.hexdigest()
