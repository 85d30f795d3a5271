"""What another process has told before, kept in the user's cache folder: starting transformers takes seconds.

An answer is found by all that decides it. One that cannot be read counts as none, and no error comes of
a folder that cannot be written.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from merge.adapters import modules
from merge.agreement import canonical
from merge.disk import digest_of
from merge.sources.model import Model

PLACE = "MERGETOOL_CACHE"
MOST = 64  # answers that are kept, some 100 kB each for large models
LIBRARIES = ("transformers", "tokenizers", "torch")
OF_TOKENIZERS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map*",
    "added_tokens*",
    "*.model",
)


def key_of(model: Model, *code: str) -> str:
    """Stands for what transformers makes of the config and the tokenizer of `model`; `code`: the files of the
    functions that look at it."""
    files = [file for pattern in OF_TOKENIZERS for file in sorted(model.folder.glob(pattern))]
    told = [
        *([name, version(name)] for name in LIBRARIES),
        *(digest_of(Path(file)) for file in (modules.__file__, *code)),
        [str(model.folder), dict(model.config), digest_of(model.folder / "config.json")],
        [[file.name, digest_of(file)] for file in files if file.is_file()],
    ]
    return sha256(canonical(told).encode()).hexdigest()


def kept(key: str) -> Any:
    """The answer, as JSON can tell it, or None."""
    try:
        return json.loads((_folder() / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):
        return None


def keep(key: str, told: Any) -> None:
    """Keeps an answer, and of others those that were told last."""
    with suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=folder, suffix=".new", delete=False) as file:
            json.dump(told, file)
        Path(file.name).rename(folder / f"{key}.json")
        for old in list(_by_age(folder))[MOST:]:
            old.unlink()


def _by_age(folder: Path) -> Iterator[Path]:
    """Answers, the last one first."""
    return iter(sorted(folder.iterdir(), key=lambda file: -file.stat().st_mtime_ns))


def _folder() -> Path:
    """Where the system keeps what can be lost, or what the environment names."""
    if own := os.environ.get(PLACE):
        return Path(own) / "classes"
    place = os.environ.get("XDG_CACHE_HOME")
    return (Path(place) if place else Path.home() / ".cache") / "mergetool" / "classes"
