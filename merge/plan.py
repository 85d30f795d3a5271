"""What will be read, computed and written, tensor by tensor. `planner` makes it from a recipe."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.agreement import canonical
from merge.errors import PlanError
from merge.methods import Method
from merge.numerics import STORAGE, rows_and_cols
from merge.recipe import Recipe
from merge.sections import parse_size
from merge.sources import TensorInfo
from merge.sources.model import Model
from merge.tokens.filling import Filling
from merge.tokens.surgery import Retold

FORMAT = 3  # of plan digests and provenance files; changes when the same recipe gives other bytes


@dataclass(frozen=True)
class Operand:
    """A tensor of one of the plan's models; `step` makes it where that model is itself a merge."""

    model: int
    tensor: str
    info: TensorInfo
    step: "Step | None" = None


@dataclass(frozen=True)
class Step:
    """One output tensor: how it is stored and what it is made of. `copy`: operands[0], bit for bit.

    parameters: as the method takes them; a list holds one value per operand. `places`, of a step within a
    step: its rows are those of all operands, of operand i at the places `places[i]`, in their order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: Method
    operands: tuple[Operand, ...]
    base: Operand | None
    parameters: Mapping[str, Any]
    copy: bool
    places: "Sequence[NDArray[np.int64]]" = ()

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

    @property
    def facts(self) -> list[Any]:
        """What its bytes depend on, as JSON can tell it."""
        inputs = [[o.model, o.tensor, o.info.dtype] for o in self.inputs]
        how = [self.method.name, self.base is not None, dict(self.parameters), self.copy]
        return [self.name, self.shape, self.dtype, inputs, *how]


@dataclass(frozen=True)
class Plan:
    """All steps of a merge in the order of its output.

    `models`: whatever is read, and the merges of the same recipe that are merged again. `models[donor]`
    lends its files, of which `tokens` changes some; `config` is the config.json of the result.
    `origins`: for an adapter, the base's tensors by the names of the steps that change them. `fillings`: what
    makes rows of tokens that a model lacks. `parsing`: bytes of memory that reading vocabularies took.
    `files`: written beside the tensors, in addition. `told`: what the provenance tells beside the usual.
    `unseen`: notes about what the memory did not allow to look at; of no effect on the result.
    """

    recipe: Recipe
    models: tuple[Model, ...]
    donor: int
    base: int | None
    config: Mapping[str, Any]
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    origins: Mapping[str, Operand]
    tokens: Retold | None = None
    fillings: tuple[Filling, ...] = ()
    parsing: int = 0
    unseen: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def read_bytes(self) -> int:
        operands = (operand for step in every_step(self.steps) for operand in step.inputs)
        return sum(operand.info.nbytes for operand in operands if operand.step is None)

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
            "models": [model.public_name for model in self.models],
            "donor": self.donor,
            "config": dict(self.config),
            "allow_nonfinite": self.recipe.sections.allow_nonfinite,
            "adapter": self.recipe.sections.adapter and self.recipe.sections.adapter.model_dump(),
            "shard_bytes": self.shard_bytes,
            "steps": [step.facts for step in every_step(self.steps)],
        }
        if self.tokens:
            facts["tokens"] = self.tokens.digest
        if self.recipe.mixes:
            names = {model.label: model.public_name for model in self.models}
            facts["mixture"] = told_mixture(self.recipe, names)
            facts["told"] = dict(self.told)
            facts["files"] = {n: hashlib.sha256(f).hexdigest() for n, f in self.files.items()}
        return hashlib.sha256(canonical(facts).encode()).hexdigest()


def told_mixture(recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """What a recipe says about experts, models by their public names, of `names` by label."""
    base, told = recipe.labels[0], recipe.mixture
    if "mixture" in told:
        told["mixture"] = names[base]
    for entry in (*told.get("experts", ()), *told.get("shared_experts", ())):
        if "adapter" in entry:
            whole = names[f"{base}+{entry['adapter']}"]
            entry["adapter"] = whole.removeprefix(f"{names[base]}+")
        else:
            entry["source_model"] = names[entry["source_model"]]
        if "texts" in entry:
            entry["texts"] = [Path(file).name for file in entry["texts"]]
    return told


def every_step(steps: Iterable[Step]) -> Iterator[Step]:
    """The steps and those within them, once each, the inner ones first."""
    seen: set[int] = set()

    def within(step: Step) -> Iterator[Step]:
        if id(step) not in seen:
            seen.add(id(step))
            for operand in step.inputs:
                if operand.step is not None:
                    yield from within(operand.step)
            yield step

    for step in steps:
        yield from within(step)


def times_made(steps: Iterable[Step]) -> float:
    """How often a merge within the merge is made, in the mean: once for each step that reads it."""
    every = list(every_step(steps))
    asked = {id(step): 0 for step in every} | {id(step): 1 for step in steps}
    for step in reversed(every):
        for operand in step.inputs:
            if operand.step is not None:
                asked[id(operand.step)] += asked[id(step)]
    return sum(asked.values()) / max(1, len(every))


def output_folder(recipe: Recipe, override: Path | None) -> Path:
    """Where the merge goes: the command's --output, or the recipe's output."""
    if override is not None:
        return override
    if recipe.sections.output is None:
        raise PlanError(f"{recipe.file}:1: no output; add `output: FOLDER` or give --output FOLDER")
    return Path(recipe.sections.output).expanduser()
