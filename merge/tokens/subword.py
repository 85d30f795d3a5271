"""Subwords: a token that a model lacks as the mean of the pieces that its tokenizer cuts the text into."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from merge.tokens.fill import Combination
from merge.tokens.library import library_errors, read_tokenizer
from merge.tokens.meaning import BYTE_LEVEL, scheme
from merge.tokens.vocabulary import Vocabulary

LEAST_LIKELY = -1e9  # the score of a piece that is never chosen
BARE: dict[str, Any] = {"version": "1.0", "added_tokens": []} | dict.fromkeys(
    ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
)  # of a tokenizer.json that is a model and nothing else


def pieces(
    vocabulary: Vocabulary, texts: Sequence[bytes | str], without: Sequence[int] = ()
) -> list[tuple[int, ...]]:
    """For each text the ids of its pieces; none where the vocabulary cannot spell it, or for a str: such is
    no text but the name of a special token. `without`: ids that the vocabulary is taken not to have.

    The tokenizer's model is asked for just this text: there is no word before it, so that what the
    tokenizer puts before or cuts out of whole sentences (a first space, a rule for words) does not matter.
    """
    spelling, dropped = scheme(vocabulary), _unknown(vocabulary)
    with library_errors(vocabulary.label):
        model = read_tokenizer(_without(vocabulary, frozenset(without))).model
        return [
            ()
            if isinstance(text, str)
            else tuple(i for i in _cut(model, text, spelling) if i not in dropped)
            for text in texts
        ]


def subword(pieces: Sequence[Sequence[int]]) -> Combination:
    """Each token as the mean of its `pieces`, which are own rows; without any it is the mean row."""
    rows = np.full((len(pieces), max(map(len, pieces), default=0)), -1, np.int64)
    weights = np.zeros(rows.shape, np.float32)
    for at, ids in enumerate(pieces):
        rows[at, : len(ids)] = ids
        weights[at, : len(ids)] = 1 / max(1, len(ids))
    return Combination(rows, weights)


def _unknown(vocabulary: Vocabulary) -> set[int | None]:
    """The ids that stand for what cannot be spelled."""
    model = vocabulary.tokenizer["model"]
    named = (vocabulary.named("unk_token"), model.get("unk_token"))
    return {model.get("unk_id"), *(vocabulary.ids.get(name) for name in named if name)}


def _without(vocabulary: Vocabulary, ids: frozenset[int]) -> dict[str, Any]:
    """The tokenizer as if it did not have these ids: no piece, and no merge from or to one."""
    model: dict[str, Any] = dict(vocabulary.tokenizer["model"])
    gone = {vocabulary.texts[i] for i in ids}
    if isinstance(model["vocab"], list):  # Unigram: a place in the list is an id
        model["vocab"] = [
            [f"\0{i}", LEAST_LIKELY] if i in ids else piece
            for i, piece in enumerate(model["vocab"])
        ]
    elif gone:
        model["vocab"] = {text: i for text, i in model["vocab"].items() if text not in gone}
    if model.get("unk_token") in gone:
        model["unk_token"] = None
    if gone and "merges" in model:
        model["merges"] = [[a, b] for a, b in vocabulary.merges if not gone & {a, b, a + b}]
        model["ignore_merges"] = False
    return BARE | {"model": model}


def _cut(model: Any, text: bytes, spelling: str) -> Iterator[int]:
    if spelling == "byte-level":
        spelled = ["".join(BYTE_LEVEL[byte] for byte in text)]
    elif spelling == "wordpiece":
        spelled = [text.decode(errors="replace").strip()]
    else:  # what is no UTF-8 is left to byte tokens
        loose = text.decode(errors="surrogateescape")
        loose = loose.replace(" ", "▁") if spelling == "metaspace" else loose
        spelled = re.findall("[\udc80-\udcff]|[^\udc80-\udcff]+", loose)
    for part in spelled:
        if "\udc80" <= part <= "\udcff" and len(part) == 1:
            piece = model.token_to_id(f"<0x{ord(part) - 0xDC00:02X}>")
            yield from () if piece is None else (piece,)
        elif part:
            yield from (token.id for token in model.tokenize(part))
