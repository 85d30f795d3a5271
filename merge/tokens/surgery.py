"""What becomes of the tokens of a merge: its files, its rows, and which rows of the models these are."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge.tokens.rows import Numbers
from merge.tokens.sections import TokenizerSection
from merge.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class RowSource:
    """Where a token's row is taken from: `model` (its number) and the number of its `row`; or computed:
    `how` is "mean" or "zero"."""

    how: str
    model: int = -1
    row: int = -1
    always: bool = False


@dataclass(frozen=True)
class Retold:
    """What a plan keeps of a surgery: `files` of the result beside its tensors, where they are not the
    donor's (None: there is none), and a `digest` that stands for everything its bytes depend on."""

    files: Mapping[str, Path | bytes | None]
    digest: str


@dataclass(frozen=True)
class Surgery:
    """`files` of the result beside its tensors, where they are not the donor's (None: there is none);
    `config`: its config.json. `rows`: of its embedding. `maps`: by the number of a model, [rows]: its own
    row of each token, -1 where it has none. `given`: for "embed" and "head", rows that the recipe says where
    to take from. `vocabularies`: of the models, by their numbers; `source`: the model
    whose ids it keeps. `reconfigured`: config.json is not the donor's. `free`: tokens that may have no row in
    any model."""

    files: Mapping[str, Path | bytes | None]
    config: Mapping[str, Any]
    vocabulary: Vocabulary
    rows: int
    maps: Mapping[int, Numbers]
    given: Mapping[str, Mapping[int, RowSource]]
    section: TokenizerSection
    vocabularies: Mapping[int, Vocabulary]
    source: int
    reconfigured: bool
    free: frozenset[int]
    notes: tuple[str, ...] = ()

    @property
    def is_idle(self) -> bool:
        """Whether all models have the tokens of the result already, and no file changes."""
        numbers = np.arange(self.rows)
        rows = all(np.array_equal(own, numbers) for own in self.maps.values())
        rows &= all(v.rows in (None, self.rows) for v in self.vocabularies.values())
        return rows and not self.files and not any(self.given.values()) and not self.reconfigured

    @property
    def retold(self) -> Retold:
        return Retold(self.files, self._digest())

    def _digest(self) -> str:
        told = hashlib.sha256()
        for name in sorted(self.files):
            content = self.files[name]
            data = content.read_bytes() if isinstance(content, Path) else content or b""
            told.update(f"{name}={len(data)}\n".encode() + data)
        for model, rows in sorted(self.maps.items()):
            told.update(f"{model}={len(rows)}\n".encode() + rows.astype("<i8").tobytes())
        given = {kind: {i: vars(s) for i, s in rows.items()} for kind, rows in self.given.items()}
        told.update(json.dumps([given, self.section.missing], sort_keys=True).encode())
        if self.section.missing not in ("owners", "base"):  # made from the pieces and flags of all
            for _, vocabulary in sorted(self.vocabularies.items()):
                told.update(json.dumps(vocabulary.tokenizer, sort_keys=True).encode())
        return told.hexdigest()
