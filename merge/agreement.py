"""Do these models fit together? What equal shapes alone do not tell."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from merge.errors import PlanError, SourceError
from merge.sources.model import Model, read_json

MUST_AGREE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "sliding_window")


def check_agreement(
    donor: Model, others: Sequence[Model], *, whole: bool = True, same_tokens: bool = True
) -> list[str]:
    """Notes about doubtful differences; raises PlanError for those that make a merge meaningless.

    whole: the models are merged as a whole; else only modules, which models of other types may share.
    same_tokens: their vocabularies must be one.
    """
    notes: list[str] = []
    for other in others:
        for key in MUST_AGREE:
            _compare(donor, other, key, fatal=whole or key != "model_type")
        notes += [
            note for key in SHOULD_AGREE if (note := _compare(donor, other, key, fatal=False))
        ]
        if same_tokens and (difference := _other_tokens(donor, other)):
            raise PlanError(
                f"{other.label}: its tokenizer is not that of {donor.label}: {difference}; rows of the "
                "embedding would be mixed up: merge models of one vocabulary"
            )
    return notes


def _compare(donor: Model, other: Model, key: str, *, fatal: bool) -> str | None:
    a, b = _setting(donor.config, key), _setting(other.config, key)
    if a == b or a is None or b is None:
        return None
    found = f"{other.label}: {key} is {b} in config.json, but {a} in {donor.label}"
    if fatal:
        raise PlanError(f"{found}; models of one architecture can be merged")
    return f"{found}; the merge uses {a}"


def _setting(config: Any, key: str) -> Any:
    nested = config.get("text_config")
    return config.get(key, nested.get(key) if isinstance(nested, dict) else None)


def _other_tokens(donor: Model, other: Model) -> str | None:
    return vocabulary_difference(*(model.folder / "tokenizer.json" for model in (donor, other)))


def vocabulary_difference(a: Path, b: Path) -> str | None:
    """The first token that has another id in the tokenizer.json `b` than in `a`, in words."""
    files = (a, b)
    if not all(f.is_file() for f in files) or _same_bytes(*files):
        return None
    text = _vocabulary_text(files[0])
    if text is not None and text == _vocabulary_text(files[1]):
        return None
    try:
        ours, theirs = (dict(_vocabulary(f)) for f in files)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise SourceError(f"{files[0]} or {files[1]}: not a tokenizer file") from None
    for token in sorted(
        ours.keys() | theirs.keys(), key=lambda t: (ours.get(t, 1 << 62), theirs.get(t, 0))
    ):
        if ours.get(token) != theirs.get(token):
            return f"token {token!r} has id {theirs.get(token)}, not {ours.get(token)}"
    return None


def _vocabulary_text(file: Path) -> tuple[str, str] | None:
    """Stands for added tokens and vocabulary as they are spelt in the file; None where not as usual.

    Fine-tunes differ in other parts of large files; parsing those takes 13 times their size in memory.
    """
    data = file.read_bytes()
    added, after = data.find(b'"added_tokens"'), data.find(b'"normalizer"')
    vocab, merges = data.find(b'"vocab"'), data.rfind(b'"merges"')
    if not (0 <= added < after < vocab < merges):
        return None
    parts = data[added:after], data[vocab:merges]
    first, second = (hashlib.sha256(part).hexdigest() for part in parts)
    return first, second


def _vocabulary(file: Path) -> Iterator[tuple[str, int]]:
    tokenizer = read_json(file)
    vocab = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocab, dict):
        yield from vocab.items()
    else:  # Unigram: a list of [piece, score]
        yield from ((piece[0], i) for i, piece in enumerate(vocab))
    for added in tokenizer.get("added_tokens", ()):
        yield added["content"], added["id"]


def _same_bytes(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and _sha256(a) == _sha256(b)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical(data: Any) -> str:
    """JSON text that is equal for equal data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
