"""Rows of an embedding and of a head that no trained model has: zeros, NaNs, and one for two tokens.

Which rows count. Real models have rows that nothing ever trained: padding, reserved and placeholder
tokens, bytes that no text holds; those may be zero or alike. So a row must be sound where its token is
*needed* (an end token, the beginning, whatever the chat template writes) or *ordinary* (a piece of the
tokenizer's own vocabulary that is neither an added token nor a byte). In the head the beginning of a text
does not count, since nothing predicts it. End tokens may share one row: texts then stop at either.
"""

from collections.abc import Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from merge.anatomy import embedding_and_head
from merge.numerics import STORAGE, first_nonfinite, grains
from merge.sources.model import Model
from merge.tokens.findings import Finding, Severity
from merge.tokens.meaning import BYTE
from merge.tokens.vocabulary import Vocabulary
from merge.tokens.wholeness import control_tokens, said_tied

SHOWN = 3  # rows told of in words


def row_findings(model: Model, vocabulary: Vocabulary) -> Iterator[Finding]:
    """What is wrong with the rows of `model`, read by grains; 8 bytes a row are kept."""
    embedding, head = embedding_and_head(model.source.tensors)
    hashes = {}
    for name in filter(None, (embedding, head)):
        hashes[name], zero, bad = _looked_at(model, name)
        yield from _bad_rows(vocabulary, name, bad)
        needed = needed_ids(vocabulary, head=name == head)
        ordinary = ordinary_ids(vocabulary)
        yield from _zero_rows(vocabulary, name, zero & (needed | ordinary), needed)
        yield from _same_rows(vocabulary, name, hashes[name], (needed | ordinary) - zero, needed)
    if embedding and head and said_tied(model.config):
        yield from _untied(vocabulary, embedding, head, hashes)


def needed_ids(vocabulary: Vocabulary, *, head: bool) -> set[int]:
    """Ids that a chat cannot do without, to read them or (head) to predict them."""
    begin, end = vocabulary.named("bos_token"), vocabulary.named("eos_token")
    texts = {*control_tokens(vocabulary), begin} - ({begin} if head else set()) | {end}
    return {i for text, i in vocabulary.ids.items() if text in texts} | {*vocabulary.stop_ids}


def ordinary_ids(vocabulary: Vocabulary) -> set[int]:
    """Ids of the tokenizer's own pieces, bytes left out."""
    added = {token.text for token in vocabulary.added}
    pieces = vocabulary.pieces.items()
    return {i for text, i in pieces if text not in added and not BYTE.fullmatch(text)}


def _looked_at(model: Model, name: str) -> tuple[NDArray[np.uint64], set[int], list[int]]:
    """Hash of each row, rows that are zero, rows with NaN or infinity."""
    info = model.source.tensors[name]
    hashes = np.empty(info.rows, np.uint64)
    zero: set[int] = set()
    bad: list[int] = []
    for first, end in grains(info.shape):
        raw = np.empty((end - first, info.cols), STORAGE[info.dtype])
        model.source.read(name, first, end, raw.reshape(-1).view(np.uint8).data)
        hashes[first:end] = [xxhash.xxh3_64_intdigest(row.data) for row in raw]
        magnitudes = raw & 0x7FFF if info.dtype == "BF16" else raw
        zero.update((first + np.flatnonzero(~magnitudes.any(axis=1))).tolist())
        if first_nonfinite(raw, info.dtype) is not None:
            at = [i for i, row in enumerate(raw) if first_nonfinite(row, info.dtype) is not None]
            bad += [first + i for i in at]
    return hashes, zero, bad


def _bad_rows(vocabulary: Vocabulary, name: str, bad: list[int]) -> Iterator[Finding]:
    if bad:
        what = f"{name} holds NaN or infinity in {_rows(vocabulary, bad)}"
        evidence = {"tensor": name, "rows": bad[:100]}
        yield Finding("row-not-finite", "error", (vocabulary.label,), what, evidence)


def _zero_rows(
    vocabulary: Vocabulary, name: str, zero: set[int], needed: set[int]
) -> Iterator[Finding]:
    if zero:
        rows = sorted(zero & needed) + sorted(zero - needed)
        what = f"{name} is zero in {_rows(vocabulary, rows)}"
        evidence = {"tensor": name, "rows": rows[:100]}
        yield Finding("row-zero", "error", (vocabulary.label,), what, evidence)


def _same_rows(
    vocabulary: Vocabulary, name: str, hashes: NDArray[np.uint64], used: set[int], needed: set[int]
) -> Iterator[Finding]:
    """An error where one of the tokens is needed: the model cannot tell it from the others."""
    ids = np.array(sorted(i for i in used if i < len(hashes)), np.int64)
    values, counts = np.unique(hashes[ids], return_counts=True)
    sharing: dict[int, list[int]] = {}
    for i in ids[np.isin(hashes[ids], values[counts > 1])].tolist():
        sharing.setdefault(int(hashes[i]), []).append(i)
    groups = [group for group in sharing.values() if not {*group} <= {*vocabulary.stop_ids}]
    if groups:
        groups.sort(key=lambda group: (needed.isdisjoint(group), group))
        severe = not needed.isdisjoint(groups[0])
        more = f"; {len(groups) - 1} more such sets" * (len(groups) > 1)
        what = f"{name} is the same in {_rows(vocabulary, groups[0])}{more}"
        evidence = {"tensor": name, "rows": groups[:100]}
        severity: Severity = "error" if severe else "warning"
        yield Finding("row-duplicate", severity, (vocabulary.label,), what, evidence)


def _untied(
    vocabulary: Vocabulary, embedding: str, head: str, hashes: dict[str, NDArray[np.uint64]]
) -> Iterator[Finding]:
    ours, theirs = hashes[embedding], hashes[head]
    if len(ours) == len(theirs) and (unlike := np.flatnonzero(ours != theirs)).size:
        what = (
            f"config.json ties {head} to {embedding}, but it is stored and differs in "
            f"{_rows(vocabulary, unlike.tolist())}"
        )
        evidence = {"tensors": [embedding, head], "rows": unlike[:100].tolist()}
        yield Finding("tying-disagrees", "error", (vocabulary.label,), what, evidence)


def _rows(vocabulary: Vocabulary, rows: list[int]) -> str:
    shown = ", ".join(f"{i} {vocabulary.texts.get(i, '(no token)')!r}" for i in rows[:SHOWN])
    more = f", and {len(rows) - SHOWN} more" * (len(rows) > SHOWN)
    return f"row{'s' * (len(rows) > 1)} {shown}{more}"
