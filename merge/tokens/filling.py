"""Rows that a model lacks, as the recipe wants them made; fitted when the first of them is asked for."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merge.numerics import Array
from merge.tokens.fill import Ids, Rows, Shared, anchors, combined, held_out_errors, mean_row
from merge.tokens.omp import Pursuit, least_memory, omp
from merge.tokens.procrustes import fitting_memory, mapped, procrustes
from merge.tokens.rows import Computed, Numbers, Stored
from merge.tokens.subword import pieces, subword
from merge.tokens.vocabulary import Vocabulary

HELD = 256 << 20  # bytes of shared rows that matching pursuit keeps in memory


@dataclass(frozen=True)
class Space:
    """A model's rows of one tensor, and which of them are those of the result: [rows], -1 for none."""

    label: str
    stored: Stored
    ids: Numbers
    vocabulary: Vocabulary

    @property
    def cols(self) -> int:
        return self.stored.info.cols

    @property
    def rows(self) -> Rows:
        return self.stored.float_rows


@dataclass
class Filling:
    """Makes the rows `wanted` of the result, which `own` lacks, `how`: mean, subword, omp or procrustes.

    donor: for the last two, a model that has the tokens. meanings: what the result's tokens stand for, by
    id (see meaning.canonical). Rows are asked for by their positions in `wanted`.
    """

    how: str
    own: Space
    donor: Space | None
    wanted: Numbers
    meanings: Mapping[int, bytes | str]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _made: Rows | None = None

    def computed(self) -> Computed:
        """The rows as the engine reads them, with the memory that making them takes."""
        kept = self.wanted.size * Pursuit().terms * 12
        return Computed(self._rows, lambda rows: 20 * rows * self.own.cols, self._memory + kept)

    @property
    def ordinary(self) -> Ids:
        """The model's own rows that others are made from, or are the mean of."""
        return self._anchors.own

    def report(self) -> dict[str, Any]:
        """What was made how, and the relative error of rows that are made so for tokens that the model has
        and is taken not to have, about one of ten: by text, in the order of ids."""
        held, errors = held_out_errors(self._fitted, self.own.rows, self._anchors, self.own.cols)
        texts = self.own.vocabulary.texts
        middle = float(np.median(errors)) if errors.size else float("nan")
        found = zip(held.own.tolist(), errors.tolist(), strict=True)
        return {
            "model": self.own.label,
            "tensor": self.own.stored.name,
            "rows": int(self.wanted.size),
            "how": self.how,
            **({"donor": self.donor.label} if self.donor else {}),
            "median_error": round(middle, 6) if np.isfinite(middle) else None,
            "errors": {texts[i]: round(e, 6) if np.isfinite(e) else None for i, e in found},
        }

    def _rows(self, positions: Ids) -> Array:
        with self._lock:
            if self._made is None:
                ids = np.arange(len(self.own.ids)) if self.donor is None else self.donor.ids
                self._made = self._fitted(self._anchors, ids[self.wanted])
        return self._made(positions)

    @property
    def _anchors(self) -> Shared:
        """Ordinary tokens of the model that are in the result, and in the donor. Without a donor, numbers
        of rows of the result take the place of the donor's."""
        ids, own = np.arange(len(self.own.ids)), self.own
        donor = ids if self.donor is None else self.donor.ids
        both = np.isin(ids, np.fromiter(self.meanings, np.int64)) & (own.ids >= 0) & (donor >= 0)
        other = own.vocabulary if self.donor is None else self.donor.vocabulary
        shared = Shared(own.ids[both] if self.donor is None else donor[both], own.ids[both])
        usual = anchors(shared, own.vocabulary, other)
        if self.donor is not None:
            return usual
        places = np.flatnonzero(both)
        return Shared(places[np.isin(shared.own, usual.own)], usual.own)

    @property
    def _memory(self) -> int:
        """Bytes that fitting takes."""
        if self.how == "omp" and self.donor:
            count, cols = len(self._anchors), self.donor.cols
            return least_memory(count, cols, Pursuit()) + min(HELD, 4 * cols * count)
        if self.how == "procrustes" and self.donor:
            return fitting_memory(self.donor.cols, self.own.cols)
        return 0

    def _fitted(self, shared: Shared, wanted: Ids) -> Rows:
        """From the tokens `shared`, rows by positions in `wanted`: rows of the donor, else of the result."""
        own, cols = self.own, self.own.cols
        if self.how == "procrustes" and self.donor:
            fitted = procrustes(
                self.donor.rows, own.rows, shared, self.donor.cols, cols, memory=self._memory
            )
            return mapped(self.donor.rows, fitted, wanted)
        if self.how == "omp" and self.donor:
            sums = omp(self.donor.rows, shared, wanted, self.donor.cols, memory=self._memory)
        else:
            sums = subword(self._spelled(shared, wanted))
        return combined(own.rows, mean_row(own.rows, shared.own, cols), sums)

    def _spelled(self, shared: Shared, wanted: Ids) -> list[tuple[int, ...]]:
        """The model's own pieces of each token; none for the mean."""
        if self.how == "mean":
            return [()] * len(wanted)
        held = np.setdiff1d(self._anchors.own, shared.own)  # a token would spell itself
        texts = [self.meanings.get(i, "") for i in wanted.tolist()]
        beyond = [i for i in self.own.vocabulary.texts if i >= self.own.stored.info.rows]
        return pieces(self.own.vocabulary, texts, [*held.tolist(), *beyond])
