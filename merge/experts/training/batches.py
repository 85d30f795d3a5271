"""Texts -> batches of tokens, in an order that hashes of seed and position decide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge.errors import RequestError
from merge.experts.texts import Text
from merge.numerics import random_key

HELD_OUT = 10  # one text in so many is not trained on
IGNORED = -100  # the target of a token that counts in no loss


@dataclass(frozen=True)
class Row:
    """Tokens of a text; those from number `first` on are to be predicted."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Batch:
    """ids, targets: [rows, longest] int64, padded on the right; kept: bool, False at padding. A target is
    the token itself, IGNORED where it counts in no loss."""

    ids: Tensor
    targets: Tensor
    kept: Tensor


def encoded(texts: Sequence[Text], tokenizer: Any, length: int, end: int | None) -> list[Row]:
    """A row for each text, cut to `length` tokens. end: the token that follows a text.

    Raises RequestError where nothing is left to predict.
    """
    rows = []
    for text in texts:
        found = tokenizer(text.whole, return_offsets_mapping=True)
        ids, ends = list(found["input_ids"]), [stop for _, stop in found["offset_mapping"]]
        first = next((i for i, stop in enumerate(ends) if stop > len(text.prompt)), len(ids))
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        first = max(1, first)  # what comes first has nothing to be predicted from
        if first >= min(len(ids), length):
            raise RequestError(
                f"{text.place}: no token is left to predict: {len(ids)} tokens, of which {first} are given "
                f"and {length} are looked at; raise --length or leave the text out"
            )
        rows.append(Row(tuple(ids[:length]), first))
    return rows


def divided(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """(texts to train on, held out): by the hash of what they say, so that equal texts stay together.

    At least one text is held out. Raises RequestError where fewer than two differ.
    """
    keys = [random_key("held out", text.prompt, text.completion) for text in texts]
    if len(set(keys)) < 2:
        raise RequestError(
            f"{texts[0].place}: is the only text; one is trained on and one held out"
        )
    out = {key for key in keys if key % HELD_OUT == 0}
    out = (out if len(out) < len(set(keys)) else set()) or {min(keys)}
    pairs = list(zip(texts, keys, strict=True))
    return [text for text, key in pairs if key not in out], [t for t, key in pairs if key in out]


class Order:
    """Which of `count` texts come in which batch: all of them once, in an order of their own, then again."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self._count, self._size, self._seed = count, size, seed
        self._round, self._order = -1, [0]

    def at(self, step: int) -> list[int]:
        """The texts of the batch of this step; it depends on nothing that came before."""
        places = range(step * self._size, (step + 1) * self._size)
        return [self._in_round(place // self._count)[place % self._count] for place in places]

    def _in_round(self, number: int) -> list[int]:
        if number != self._round:
            keys = [random_key("order", self._seed, number, i) for i in range(self._count)]
            self._round, self._order = number, sorted(range(self._count), key=keys.__getitem__)
        return self._order


def batch_of(rows: Sequence[Row], padding: int, device: str) -> Batch:
    """The rows side by side."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), padding)
    targets, kept = torch.full_like(ids, IGNORED), torch.zeros_like(ids, dtype=torch.bool)
    for place, row in enumerate(rows):
        count = len(row.ids)
        ids[place, :count] = torch.tensor(row.ids)
        targets[place, row.first : count] = ids[place, row.first : count]
        kept[place, :count] = True
    return Batch(ids.to(device), targets.to(device), kept.to(device))


def batches_of(rows: Sequence[Row], size: int, padding: int, device: str) -> Iterator[Batch]:
    """All rows in their order, `size` at a time."""
    return (batch_of(rows[i : i + size], padding, device) for i in range(0, len(rows), size))
