"""Recipe + headers -> Plan: what will be read, computed and written, before any of it happens."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merge.agreement import canonical, check_agreement
from merge.errors import PlanError
from merge.numerics import FLOATS, STORAGE, rows_and_cols
from merge.recipe import Recipe, parse_size
from merge.sources import TensorInfo
from merge.sources.model import Model

FORMAT = 1  # of plan digests and provenance files; changes when the same recipe gives other bytes
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.masked_bias|\.attention\.masked_bias)$")
FIRST = re.compile(r"embed|wte|wpe|word_embeddings")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Operand:
    """A tensor of one of the plan's models."""

    model: int
    tensor: str
    info: TensorInfo


@dataclass(frozen=True)
class Step:
    """One output tensor: how it is stored and what it is made of. `copy`: operands[0], bit for bit.

    parameters: as the method takes them; a list holds one value per operand.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    operands: tuple[Operand, ...]
    base: Operand | None
    parameters: Mapping[str, Any]
    copy: bool

    @property
    def inputs(self) -> tuple[Operand, ...]:
        """Everything that is read, the base first."""
        return ((self.base,) if self.base else ()) + self.operands

    @property
    def rows(self) -> int:
        return rows_and_cols(self.shape)[0]

    @property
    def cols(self) -> int:
        return rows_and_cols(self.shape)[1]

    @property
    def nbytes(self) -> int:
        return self.rows * self.cols * STORAGE[self.dtype].itemsize


@dataclass(frozen=True)
class Plan:
    """All steps of a merge in the order of its output. `models[donor]` lends config and tokenizer."""

    recipe: Recipe
    models: tuple[Model, ...]
    donor: int
    base: int | None
    steps: tuple[Step, ...]
    notes: tuple[str, ...]

    @property
    def read_bytes(self) -> int:
        return sum(operand.info.nbytes for step in self.steps for operand in step.inputs)

    @property
    def write_bytes(self) -> int:
        return sum(step.nbytes for step in self.steps)

    @property
    def shard_bytes(self) -> int:
        return parse_size(self.recipe.sections.shard_size)

    @cached_property
    def digest(self) -> str:
        """Stands for the bytes of the output, given unchanged inputs: not for memory or threads."""
        facts = {
            "format": FORMAT,
            "method": self.recipe.method.name,
            "models": [model.public_name for model in self.models],
            "donor": self.donor,
            "out_dtype": self.recipe.out_dtype,
            "allow_nonfinite": self.recipe.sections.allow_nonfinite,
            "shard_bytes": self.shard_bytes,
            "steps": [self._facts(step) for step in self.steps],
        }
        return hashlib.sha256(canonical(facts).encode()).hexdigest()

    def _facts(self, step: Step) -> list[Any]:
        inputs = [[o.model, o.tensor, o.info.dtype] for o in step.inputs]
        return [
            step.name,
            step.shape,
            step.dtype,
            inputs,
            step.base is not None,
            dict(step.parameters),
            step.copy,
        ]


def make_plan(recipe: Recipe, models: Sequence[Model]) -> Plan:
    """The plan of `recipe` over its opened models (see `model_labels`); raises PlanError."""
    labels = model_labels(recipe)
    base = labels.index(recipe.sections.base_model) if recipe.sections.base_model else None
    donor = _donor(recipe, labels, base)
    return _Planner(recipe, tuple(models), base, donor).plan()


def model_labels(recipe: Recipe) -> list[str]:
    """Every model that the recipe reads, once, the base first where there is one."""
    base = [recipe.sections.base_model] if recipe.sections.base_model else []
    return list(dict.fromkeys(base + recipe.models))


def _donor(recipe: Recipe, labels: Sequence[str], base: int | None) -> int:
    source = recipe.sections.tokenizer_source
    if source is None or source == "base":
        return base or 0
    if source not in labels:
        raise PlanError(
            f"{recipe.where('tokenizer_source')}: tokenizer_source is {source!r}; it must be base or "
            f"one of the recipe's models ({', '.join(labels)})"
        )
    return labels.index(source)


class _Planner:
    """Holds what all steps share while they are made."""

    def __init__(
        self, recipe: Recipe, models: tuple[Model, ...], base: int | None, donor: int
    ) -> None:
        self.recipe, self.models, self.base, self.donor = recipe, models, base, donor
        self.reference = base if base is not None else donor
        self.notes: list[str] = []
        self.layers = 1 + max(
            (layer_number(n) or 0 for n in self._names(self.reference)), default=0
        )
        labels = model_labels(recipe)
        self.entries = [
            labels.index(name) for name in recipe.models
        ]  # models[i] -> index of a model

    def plan(self) -> Plan:
        others = [m for i, m in enumerate(self.models) if i != self.donor]
        self.notes += check_agreement(self.models[self.donor], others)
        self._check_tying()
        self._check_names()
        names = sorted(self._names(self.reference), key=natural_order)
        steps = tuple(self._step(name) for name in names)
        self._note_idle_filters(names)
        if not steps:
            raise PlanError(f"{self.models[self.reference].label}: holds no tensors")
        return Plan(self.recipe, self.models, self.donor, self.base, steps, tuple(self.notes))

    def _note_idle_filters(self, names: Sequence[str]) -> None:
        """A filter that fits no tensor may be meant for other models, or be misspelt."""
        for i, settings in enumerate([*self.recipe.settings, self.recipe.shared]):
            at = ("models", i, "parameters") if i < len(self.recipe.settings) else ("parameters",)
            for parameter, setting in settings.items():
                for pattern, _ in setting.rules:
                    if pattern and pattern != "*" and not any(pattern in name for name in names):
                        where = self.recipe.where(*at, parameter)
                        note = f"{where}: filter {pattern!r} of {parameter} fits no tensor"
                        self.notes += [note] if note not in self.notes else []

    def _names(self, index: int) -> list[str]:
        """Tensors of a model that count: no buffers, and no head beside a tied embedding."""
        model = self.models[index]
        tied = model.tied and EMBEDDING in model.source.tensors
        return [
            n for n in model.source.tensors if not BUFFERS.search(n) and not (tied and n == HEAD)
        ]

    def _check_tying(self) -> None:
        """config.json comes from the donor, the tensors' names from the reference: both must fit."""
        donor, reference = self.models[self.donor], self.models[self.reference]
        if donor.tied != reference.tied:
            raise PlanError(
                f"{donor.label}: tie_word_embeddings is {str(donor.tied).lower()} in config.json, but "
                f"{str(reference.tied).lower()} in {reference.label}, whose tensors are "
                f"written; choose it as tokenizer_source"
            )

    def _check_names(self) -> None:
        reference = self.models[self.reference]
        known = set(self._names(self.reference))
        if dropped := sorted(reference.source.tensors.keys() - known):
            self.notes.append(
                f"{reference.label}: not written: {_some(dropped)} (recomputed or tied on loading)"
            )
        for index, model in enumerate(self.models):
            extra = sorted(set(self._names(index)) - known, key=natural_order)
            if extra and self.recipe.sections.extra_tensors == "error":
                raise PlanError(
                    f"{model.label}: has {len(extra)} tensors that {reference.label} lacks, "
                    f"first {extra[0]!r}; "
                    "to merge without them set extra_tensors: drop"
                )
            if extra:
                self.notes.append(
                    f"{model.label}: dropped as {reference.label} lacks them: {_some(extra)}"
                )

    def _step(self, name: str) -> Step:
        info = self.models[self.reference].source.tensors[name]
        method = self.recipe.method
        base = Operand(self.reference, name, info)
        dtype = (
            self.recipe.out_dtype or self.models[self.donor].source.tensors.get(name, info).dtype
        )
        if info.dtype not in FLOATS or 0 in info.shape:
            kept = info.dtype if info.dtype not in FLOATS else dtype
            return Step(name, info.shape, kept, (base,), None, {}, copy=True)
        chosen = [
            i
            for i, model in enumerate(self.entries)
            if not (self.recipe.task_vectors and model == self.base)
        ]
        operands = [self._operand(self.entries[i], name, base) for i in chosen]
        parameters = self._parameters(name, chosen)
        if method.base == "first":
            operands = [base] + [o for o in operands if o.model != self.base]
        if method.check and (problem := method.check(**method.arguments(parameters))):
            raise PlanError(f"{self.recipe.where('models')}: {name}: {problem}")
        copy = method.copies(**method.arguments(parameters)) and operands[0].info.dtype == dtype
        delta_base = base if self.recipe.task_vectors else None
        return Step(name, info.shape, dtype, tuple(operands), delta_base, parameters, copy)

    def _operand(self, index: int, name: str, base: Operand) -> Operand:
        model = self.models[index]
        stored = name
        if name == HEAD and name not in model.source.tensors and model.tied:
            stored = EMBEDDING
        info = model.source.tensors.get(stored)
        reference = self.models[self.reference].label
        if info is None:
            if self.recipe.sections.missing_tensors == "base" and self.base is not None:
                note = (
                    f"{model.label}: lacks tensors of {reference}, which count as unchanged there"
                )
                if note not in self.notes:
                    self.notes.append(note)
                return base
            raise PlanError(
                f"{model.label}: lacks tensor {name!r} of {reference}; "
                "with a base_model, missing_tensors: base takes it as unchanged"
            )
        if info.shape != base.info.shape:
            raise PlanError(
                f"{model.label}: tensor {stored!r} has shape {list(info.shape)}, but {list(base.info.shape)} "
                f"in {reference}; models of one shape can be merged"
            )
        if info.dtype not in FLOATS:
            raise PlanError(
                f"{model.label}: tensor {stored!r} is {info.dtype}, but {base.info.dtype} in {reference}"
            )
        return Operand(index, stored, info)

    def _parameters(self, name: str, chosen: Sequence[int]) -> dict[str, Any]:
        depth = self._depth(name)
        values: dict[str, Any] = {}
        for parameter in self.recipe.method.parameters.values():
            if parameter.per_model:
                settings = [self.recipe.settings[i][parameter.name] for i in chosen]
            else:
                settings = [self.recipe.shared[parameter.name]]
            found = [setting.at(name, depth) for setting in settings]
            if None in found:
                entry = chosen[found.index(None)] if parameter.per_model else None
                place = ("models", entry) if entry is not None else ("parameters",)
                raise PlanError(
                    f"{self.recipe.where(*place, parameter.name)}: no rule of {parameter.name} "
                    f"fits tensor {name!r}; "
                    "end its list with a value without filter"
                )
            typed = [parameter.kind(value) for value in found]
            values[parameter.name] = typed if parameter.per_model else typed[0]
        return values

    def _depth(self, name: str) -> float:
        """0 for embeddings and the first layer, 1 for the last layer and what comes after it."""
        layer = layer_number(name)
        if layer is None:
            return 0.0 if FIRST.search(name) else 1.0
        return layer / (self.layers - 1) if self.layers > 1 else 0.0


def layer_number(name: str) -> int | None:
    """The first whole number among the parts of a tensor's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Sort key in which layer 2 comes before layer 10."""
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in name.split(".")]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def output_folder(recipe: Recipe, override: Path | None) -> Path:
    """Where the merge goes: the command's --output, or the recipe's output."""
    if override is not None:
        return override
    if recipe.sections.output is None:
        raise PlanError(f"{recipe.file}:1: no output; add `output: FOLDER` or give --output FOLDER")
    return Path(recipe.sections.output).expanduser()
