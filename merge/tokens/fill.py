"""Rows for tokens that a model does not have, made from rows that it has.

A model's own rows, and those of a donor that has the tokens, are read through `Rows`, a few at a time. What
the two share tells how one space lies in the other: `omp` and `procrustes` learn from it, `subword` needs
only the model's own tokenizer. Every way ends in `Rows` again, by positions in the list of wanted tokens.
The embedding and the head are filled apart, each from its own rows; tied, there is only one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merge.blas import Matrix
from merge.numerics import Array, grain_rows
from merge.tokens.meaning import BYTE
from merge.tokens.vocabulary import Vocabulary

Ids = NDArray[np.int64]
Rows = Callable[[Ids], Array]  # row numbers, in any order -> [n, cols] float32; by any thread

HELD_OUT = 10  # one of so many shared tokens is held out when errors are measured


@dataclass(frozen=True)
class Shared:
    """Row numbers of the tokens that a donor and the model both have: donor[i] and own[i] are one token."""

    donor: Ids
    own: Ids

    def __len__(self) -> int:
        return len(self.own)

    def where(self, chosen: NDArray[np.bool_]) -> "Shared":
        return Shared(self.donor[chosen], self.own[chosen])


@dataclass(frozen=True)
class Combination:
    """Rows as sums of others around their mean: mean + sum of weights[i, j] (row rows[i, j] - mean).

    rows [n, terms] int64, -1: no term; weights [n, terms] float32. Without any term it is the mean.
    """

    rows: Ids
    weights: Array

    def __len__(self) -> int:
        return len(self.rows)


def anchors(shared: Shared, own: Vocabulary, donor: Vocabulary) -> Shared:
    """The shared tokens from whose rows the others can be told: those that occur in texts.

    Special tokens and the bytes that stand in for unknown characters are hardly ever seen in training, and
    their rows are where they were at the start: a donor's say nothing about the model's.
    """
    usual = ~_seldom(own)[shared.own] & ~_seldom(donor)[shared.donor]
    return shared.where(usual)


def _seldom(vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """For each id whether it is special or the byte of an unknown character."""
    found = np.zeros(vocabulary.size, np.bool_)
    found[[token.id for token in vocabulary.added if token.special]] = True
    found[[i for i, text in vocabulary.texts.items() if BYTE.fullmatch(text)]] = True
    return found


def mean_row(rows: Rows, ids: Ids, cols: int) -> Array:
    """The mean of the rows `ids`, [cols] float32; zeros of none. Summed in float64, in the order of `ids`."""
    total = np.zeros(cols)
    step = grain_rows((len(ids), cols))
    for first in range(0, len(ids), step):
        total += rows(ids[first : first + step]).astype(np.float64).sum(axis=0)
    mean: Array = (total / max(1, len(ids))).astype(np.float32)
    return mean


def combined(own: Rows, mean: Array, combination: Combination) -> Rows:
    """The rows that `combination` describes, by its positions; of `own` rows and their `mean` [cols].

    Sums are float64, term by term. Takes 20 bytes for each value that is asked for at once.
    """

    def read(positions: Ids) -> Array:
        rows = combination.rows[positions]
        weights = np.where(rows < 0, 0.0, combination.weights[positions].astype(np.float64))
        total: Matrix = (1.0 - weights.sum(axis=1))[:, None] * mean.astype(np.float64)
        for row, weight in zip(rows.T, weights.T, strict=True):
            there = row >= 0
            total[there] += weight[there, None] * own(row[there])
        return total.astype(np.float32)

    return read


def relative_errors(found: Rows, own: Rows, shared: Shared, cols: int) -> NDArray[np.float64]:
    """||found - own|| / ||own|| of each shared token, [shared]; `found` is read by positions in `shared`. A
    row of zeros has error 0 where it is found, else infinity."""
    errors = np.zeros(len(shared))
    step = grain_rows((len(shared), cols))
    for first in range(0, len(shared), step):
        at = np.arange(first, min(first + step, len(shared)))
        true = own(shared.own[at]).astype(np.float64)
        missing, whole = (np.sqrt(np.square(x).sum(axis=1)) for x in (found(at) - true, true))
        errors[at] = np.divide(
            missing, whole, out=np.where(missing > 0, np.inf, 0.0), where=whole > 0
        )
    return errors


def held_out(shared: Shared) -> tuple[Shared, Shared]:
    """What is kept and what is held out: about one of HELD_OUT, by a hash of the model's row number."""
    hashed = (shared.own.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    held = hashed % np.uint64(HELD_OUT) == 0
    return shared.where(~held), shared.where(held)


def held_out_errors(
    fill: Callable[[Shared, Ids], Rows], own: Rows, shared: Shared, cols: int
) -> tuple[Shared, NDArray[np.float64]]:
    """Shared tokens that were held out, and the relative error of each row that `fill` makes for them as
    if the model lacked them. fill(kept tokens, donor rows of those wanted) -> rows by position."""
    kept, held = held_out(shared)
    return held, relative_errors(fill(kept, held.donor), own, held, cols)
