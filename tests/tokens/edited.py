"""Vocabularies with other files beside them, as a folder holds them or as one is edited."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.tokens.vocabulary import TOKENIZER, Vocabulary, read_vocabulary


def with_files(
    vocabulary: Vocabulary, files: Mapping[str, bytes | Mapping[str, Any] | None]
) -> Vocabulary:
    """As if its folder had these: bytes, or a table for a JSON file; None takes a file away."""
    content = {
        k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in files.items() if v
    }
    kept = {name: file for name, file in vocabulary.files.items() if name not in files}
    found = read_vocabulary(vocabulary.label, kept | content, vocabulary.rows)
    assert found is not None
    return found


def with_tokens(vocabulary: Vocabulary, *texts: str) -> Vocabulary:
    """With these as special tokens at its end."""
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    new = [
        {"id": vocabulary.size + i, "content": text, "special": True, **dict.fromkeys(flags, False)}
        for i, text in enumerate(texts)
    ]
    table = dict(vocabulary.tokenizer)
    table["added_tokens"] = [*(table.get("added_tokens") or ()), *new]
    return with_files(vocabulary, {TOKENIZER: table})


def laid_out(vocabulary: Vocabulary, folder: Path) -> Path:
    """The folder with its files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in vocabulary.files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        (folder / name).write_bytes(data)
    return folder
