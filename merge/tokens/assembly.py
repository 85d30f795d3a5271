"""Steps for embeddings and heads whose rows are not the same tokens in all models.

A row is merged among the models that own its token, by the recipe's method over all rows of the same
owners; what one model owns is copied. The parts are put together as they are read.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.errors import PlanError
from merge.lineup import Lineup
from merge.methods import all_methods
from merge.numerics import Array
from merge.plan import Operand, Step
from merge.sources import TensorInfo
from merge.sources.model import Model
from merge.tokens.fill import mean_row
from merge.tokens.filling import Filling, Space
from merge.tokens.meaning import canonical
from merge.tokens.rows import Computed, Numbers, Stored, View, Views, groups
from merge.tokens.surgery import RowSource, Surgery

# in the place of an owner: rows that the recipe says where to take from, whoever owns them
GIVEN = -1
PASS = all_methods()["passthrough"]


@dataclass
class Assembly:
    """Makes the steps of tensors with a row for every token; `views` are what they read, `fillings`
    make rows that a model lacks."""

    lineup: Lineup
    surgery: Surgery
    views: Views = field(default_factory=Views)
    fillings: list[Filling] = field(default_factory=list)

    def step(self, step: Step, kind: str) -> Step:
        """`step`, as it is for models of one vocabulary, for models that differ; `kind`: embed or head."""
        return _Rows(self, step, kind).step()

    def model(self) -> Model:
        """What the plan reads the views from: its last model."""
        donor, name = self.lineup.models[self.lineup.donor], "rows of tokens"
        return Model(name, donor.folder, {}, self.views.source(), computed=True, name=name)

    def where(self, *path: str | int) -> str:
        """File and line of what the recipe says about tokens, at `path` in its section."""
        recipe = self.lineup.recipe
        whole = ("tokenizer", *path) if recipe.sections.tokenizer else ("tokenizer_source",)
        return recipe.where(*whole)

    @cached_property
    def meanings(self) -> Mapping[int, bytes | str]:
        """What the tokens of the result stand for."""
        return {i: meaning for meaning, i in canonical(self.surgery.vocabulary).items()}

    def operand(self, name: str, view: View) -> Operand:
        return Operand(len(self.lineup.models), name, self.views.add(name, view))


@dataclass
class _Own:
    """A model's rows for those of the result: row r is row number[r] of parts[part[r]]; part -1: none."""

    operand: Operand
    parts: list[Stored | Computed]
    part: NDArray[np.int16]
    number: Numbers

    def take(self, rows: Numbers, part: Stored | Computed, numbers: Numbers) -> None:
        self.parts.append(part)
        self.part[rows], self.number[rows] = len(self.parts) - 1, numbers

    def view(self, rows: Numbers) -> View:
        return View.of(self.parts, self.part[rows], self.number[rows], self.operand.info)


class _Rows:
    """One tensor: its operands' rows, and who owns them."""

    def __init__(self, assembly: Assembly, step: Step, kind: str) -> None:
        self.assembly, self.plain, self.kind = assembly, step, kind
        self.surgery, self.lineup = assembly.surgery, assembly.lineup
        self.means: dict[int, Computed] = {}
        self.shape = (self.surgery.rows, *step.shape[1:])
        self.own = {operand.model: self._own(operand) for operand in step.inputs}

    def step(self) -> Step:
        """The whole tensor; as it is where every row is the same in all models."""
        if all(map(self._is_plain, self.own.values())):
            return self.plain
        for operand in self.plain.inputs:
            self._stored(operand)
        fixed = np.zeros(self.surgery.rows, np.bool_)
        fixed[[i for i, source in self.surgery.given[self.kind].items() if source.always]] = True
        owned = {model: (own.part >= 0) & ~fixed for model, own in self.own.items()}
        parts = [
            (self._part(owners, rows), rows) for owners, rows in groups({GIVEN: fixed} | owned)
        ]
        operands, places = tuple(part for part, _ in parts), [rows for _, rows in parts]
        name, dtype = self.plain.name, self.plain.dtype
        inner = Step(name, self.shape, dtype, PASS, operands, None, {}, True, places)
        info = TensorInfo(dtype, self.shape)
        whole = Operand(len(self.lineup.models), name, info, inner)
        return Step(name, self.shape, dtype, PASS, (whole,), None, {}, True)

    def _is_plain(self, own: _Own) -> bool:
        same = own.operand.info.rows == self.surgery.rows and not own.part.any()
        return same and bool((own.number == np.arange(self.surgery.rows)).all())

    # -- whose rows --------------------------------------------------------------------------------

    def _own(self, operand: Operand) -> _Own:
        number = self._map(operand)
        stored = Stored(self.lineup.models[operand.model].source, operand.tensor)
        own = _Own(operand, [stored], np.where(number < 0, -1, 0).astype(np.int16), number)
        for row, source in self.surgery.given[self.kind].items():
            if source.always or own.part[row] < 0:
                self._give(own, row, source)
        self._fill(own)
        return own

    def _map(self, operand: Operand) -> Numbers:
        """[rows]: the operand's row of each row of the result; -1 where it has none."""
        ids = self.surgery.maps[operand.model].copy()
        ids[ids >= operand.info.rows] = -1  # a head may have fewer rows than the embedding
        return ids

    def _stored(self, operand: Operand) -> Stored:
        model = self.lineup.models[operand.model]
        if operand.step is not None:
            where = self.lineup.recipe.where_model(model.label)
            raise PlanError(
                f"{where}: {model.label}: is a merge of the same file, whose rows other models cannot be "
                "sorted by; write it to a folder first"
            )
        return Stored(model.source, operand.tensor)

    def _give(self, own: _Own, row: int, source: RowSource) -> None:
        at = np.array([row])
        if source.how == "row":
            given = self.lineup.stored(source.model, self.plain.name)
            fits = given is not None and given.info.shape[1:] == own.operand.info.shape[1:]
            if given is None or not fits or source.row >= given.info.rows:
                where = self.assembly.where("tokens", self.surgery.vocabulary.texts[row], self.kind)
                label = self.lineup.models[source.model].label
                raise PlanError(
                    f"{where}: {label}: has no rows for {self.plain.name!r} that others could take"
                )
            own.take(at, self._stored(given), np.array([source.row]))
        else:
            stored = self._stored(own.operand)
            mean = source.how == "mean"
            own.take(at, self._mean(own.operand) if mean else _zero(stored), at)

    def _fill(self, own: _Own) -> None:
        """Rows of tokens that the model does not have, as the recipe wants them."""
        missing = np.flatnonzero(own.part < 0)
        how = self.surgery.section.missing
        if not missing.size or how == "owners":
            return
        if how == "base":
            self._from_base(own, missing)
        elif own.operand.info.cols == 1:  # a bias is no row of a space
            own.take(missing, self._mean(own.operand), missing)
        elif how in ("mean", "subword"):
            self._take(
                own, Filling(how, self._space(own.operand), None, missing, self.assembly.meanings)
            )
        else:
            self._from_donors(own, missing)

    def _from_donors(self, own: _Own, missing: Numbers) -> None:
        """As rows of the model that lends the vocabulary, else of the first that owns the token."""
        for model in dict.fromkeys([self.surgery.source, *self.lineup.merged]):
            operand = self.lineup.stored(model, self.plain.name)
            if model == own.operand.model or operand is None:
                continue
            there = missing[self._map(operand)[missing] >= 0]
            if not there.size:
                continue
            missing = missing[~np.isin(missing, there)]
            space, donor = self._space(own.operand), self._space(operand)
            how = self.surgery.section.missing
            self._take(own, Filling(how, space, donor, there, self.assembly.meanings))

    def _take(self, own: _Own, filling: Filling) -> None:
        if not filling.ordinary.size:
            raise PlanError(
                f"{self.assembly.where('missing')}: {filling.own.label}: has no ordinary token of the "
                "result, from which rows of others could be made"
            )
        self.assembly.fillings.append(filling)
        own.take(filling.wanted, filling.computed(), np.arange(len(filling.wanted)))

    def _space(self, operand: Operand) -> Space:
        model, vocabulary = (
            self.lineup.models[operand.model],
            self.surgery.vocabularies[operand.model],
        )
        return Space(model.public_name, self._stored(operand), self._map(operand), vocabulary)

    def _mean(self, operand: Operand) -> Computed:
        """The mean row of the model's ordinary tokens that the result has; without any, of all its rows."""
        if operand.model not in self.means:
            nothing = np.empty(0, np.int64)
            meanings = self.assembly.meanings
            ids = Filling("mean", self._space(operand), None, nothing, meanings).ordinary
            ids = ids if ids.size else np.arange(operand.info.rows)
            self.means[operand.model] = _averaged_rows(self._stored(operand), ids)
        return self.means[operand.model]

    def _from_base(self, own: _Own, missing: Numbers) -> None:
        base = self.lineup.base
        operand = None if base is None else self.lineup.stored(base, self.plain.name)
        if base is None or operand is None:
            raise PlanError(
                f"{self.assembly.where('missing')}: tokenizer.missing is base, but the recipe has no "
                "base_model with such rows"
            )
        ids = self._map(operand)
        rows = missing[ids[missing] >= 0]
        own.take(rows, self._stored(operand), ids[rows])

    # -- parts -------------------------------------------------------------------------------------

    def _part(self, owners: Sequence[int], rows: Numbers) -> Operand:
        """The rows that all `owners` own, and nobody else does."""
        if not owners:
            return self._copied(self._nobodys(rows))
        if len(owners) == 1 and not self._is_scaled(owners[0]):
            own = next(iter(self.own.values())) if owners[0] == GIVEN else self.own[owners[0]]
            return self._copied(self._viewed(own, rows))
        merged = self._merged(owners, rows) or self._averaged(owners, rows)
        return Operand(
            len(self.lineup.models), merged.name, TensorInfo(merged.dtype, merged.shape), merged
        )

    def _is_scaled(self, owner: int) -> bool:
        """Whether the recipe does something to a model that is merged with no other."""
        return owner != GIVEN and len(self.own) == 1 and not self.plain.copy

    def _viewed(self, own: _Own, rows: Numbers) -> Operand:
        name, count = (
            self.lineup.models[own.operand.model].public_name,
            len(self.assembly.views.tensors),
        )
        return self.assembly.operand(f"{own.operand.tensor} of {name} ({count})", own.view(rows))

    def _copied(self, operand: Operand) -> Operand:
        """Rows as they are, or only rounded."""
        dtype, shape = self.plain.dtype, operand.info.shape
        if operand.info.dtype == dtype:
            return operand
        step = Step(self.plain.name, shape, dtype, PASS, (operand,), None, {"scale": [1.0]}, False)
        return Operand(operand.model, operand.tensor, TensorInfo(dtype, shape), step)

    def _nobodys(self, rows: Numbers) -> Operand:
        """Rows that stand for no token, or for a new one: the mean of the first model's."""
        first = next(iter(self.own.values()))
        nobodys = np.full(self.surgery.rows, -1, np.int16)
        own = _Own(first.operand, [], nobodys, first.number.copy())
        for model in self.lineup.merged:  # of a tensor that is not merged, others still own rows
            operand = self.lineup.stored(model, self.plain.name)
            if operand is None:
                continue
            ids = self._map(operand)
            owned = rows[(ids[rows] >= 0) & (own.part[rows] < 0)]
            if owned.size:
                own.take(owned, self._stored(operand), ids[owned])
        rest = rows[own.part[rows] < 0]
        self._refuse_unowned(rest)
        if rest.size:
            own.take(rest, self._mean(first.operand), rest)
        return self._viewed(own, rows)

    def _refuse_unowned(self, rows: Numbers) -> None:
        texts, free = self.surgery.vocabulary.texts, self.surgery.free
        lost = [texts[i] for i in rows.tolist() if i in texts and i not in free]
        if lost:
            raise PlanError(
                f"{self.assembly.where('source')}: {len(lost)} tokens of the result are in none of the "
                f"merged models, first {lost[0]!r}; "
                "write tokenizer: {missing: subword}, or omp, procrustes or mean, to make rows for them"
            )

    def _merged(self, owners: Sequence[int], rows: Numbers) -> Step | None:
        """By the recipe's method; None where it cannot do with these models alone."""
        plain, method = self.plain, self.plain.method
        chosen = [i for i, operand in enumerate(plain.operands) if operand.model in owners]
        low, high = method.models
        if (plain.base and plain.base.model not in owners) or not low <= len(chosen) <= high:
            return None
        if method.base == "first" and plain.operands[0].model not in owners:
            return None
        parameters = {
            name: [value[i] for i in chosen] if method.parameters[name].per_model else value
            for name, value in plain.parameters.items()
        }
        some = len(chosen) < len(plain.operands)
        if some and method.space == "weights" and method.coefficients:
            return None  # weights that need not add up to 1 mean nothing of fewer models
        if method.check and method.check(**method.arguments(parameters)):
            return None
        base = self._viewed(self.own[plain.base.model], rows) if plain.base else None
        operands = tuple(self._viewed(self.own[plain.operands[i].model], rows) for i in chosen)
        shape = (len(rows), *self.shape[1:])
        return replace(
            plain, shape=shape, operands=operands, base=base, parameters=parameters, copy=False
        )

    def _averaged(self, owners: Sequence[int], rows: Numbers) -> Step:
        """Of models whose base lacks the rows, or that are too few for the method: the mean by weight."""
        plain = self.plain
        chosen = [i for i, operand in enumerate(plain.operands) if operand.model in owners]
        given: Any = plain.parameters.get("weight")
        weights = [given[i] for i in chosen] if isinstance(given, list) else [1.0] * len(chosen)
        if not abs(sum(weights)) > 1e-6:
            weights = [1.0] * len(chosen)
        operands = tuple(self._viewed(self.own[plain.operands[i].model], rows) for i in chosen)
        shape, how = (len(rows), *self.shape[1:]), {"weight": weights, "normalize": True}
        linear = all_methods()["linear"]
        return Step(plain.name, shape, plain.dtype, linear, operands, None, how, False)


def _averaged_rows(stored: Stored, ids: Numbers) -> Computed:
    """The mean of the rows `ids`, found when it is first asked for."""
    cols, lock = stored.info.cols, threading.Lock()
    found = cache(lambda: mean_row(stored.float_rows, ids, cols))

    def rows(numbers: Numbers) -> Array:
        with lock:
            return np.broadcast_to(found(), (len(numbers), cols))

    return Computed(rows, held=8 * cols + ids.nbytes)


def _zero(stored: Stored) -> Computed:
    return Computed(lambda numbers: np.zeros((len(numbers), stored.info.cols), np.float32))
