"""Adapters of one base that become one adapter: where only what they change counts, the base's values do not
matter, and where the result is a weighted sum, its factors are known."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from merge.methods import Method
from merge.numerics import Array
from merge.plan import Plan, Step
from merge.recipe import Recipe
from merge.sources import Source, TensorInfo
from merge.sources.adapter import KnownFactors, factors_of, with_adapter
from merge.sources.model import Model

Pairs = tuple[tuple[Array, Array], ...]  # (b [rows, r], a [r, cols]) float32


@dataclass(frozen=True)
class Sum:
    """A difference that is a sum of products: their ranks together, and load() -> the pairs of factors."""

    rank: int
    load: Callable[[], Pairs]


def on_zeros(plan: Plan, recipe: Recipe, models: Mapping[str, Model]) -> dict[str, Model] | None:
    """The models on a base of zeros, so that their differences are exact; None where values of the base
    count: for the method, or for an adapter."""
    label = recipe.sections.base_model
    assert label is not None
    base = models[label]
    others = {name: model for name, model in models.items() if name != label}
    if recipe.stages or base.adapters or not all(_changes_alone(step) for step in plan.steps):
        return None
    zeros = _zeros(base)
    found = {label: zeros}
    for name, model in others.items():
        if model.folder != base.folder or len(model.adapters) != 1:
            return None
        if factors_of(zeros, model.adapters[0]) is None:
            return None
        own = model.public_name.removeprefix(f"{zeros.public_name}+")
        adapted = with_adapter(zeros, model.adapters[0], own)
        found[name] = replace(adapted, label=name, commit=model.commit)
    return {name: found[name] for name in models}


def _changes_alone(step: Step) -> bool:
    """Whether the change of a tensor follows from the models' changes: of task vectors, or of weights that
    sum to 1."""
    if step.base is not None:
        return True
    weights = _coefficients(step.method, step)
    return weights is not None and abs(math.fsum(weights) - 1.0) < 1e-12


def _coefficients(method: Method, step: Step) -> Sequence[float] | None:
    if step.copy:
        return [1.0]
    if method.coefficients is None:
        return None
    return method.coefficients(**method.arguments(step.parameters))


def are_known(plan: Plan) -> bool:
    """Whether everything that the plan changes is a sum of known factors."""
    assert plan.base is not None
    known = (_coefficients(step.method, step) is not None for step in plan.steps)
    return plan.models[plan.base].zeros and all(known)


def known_sums(plan: Plan) -> dict[str, Sum]:
    """By tensor, what a plan over a base of zeros changes, where that is a weighted sum."""
    assert plan.base is not None
    base = plan.models[plan.base]
    if not base.zeros:
        return {}
    factors = {
        index: factors_of(base, model.adapters[0]) or {}
        for index, model in enumerate(plan.models)
        if model.adapters
    }
    found = {}
    for step in plan.steps:
        weights = _coefficients(step.method, step)
        if weights is None:
            continue
        parts = [
            (weight, factors[operand.model][operand.tensor])
            for weight, operand in zip(weights, step.operands, strict=True)
            if weight and operand.tensor in factors.get(operand.model, {})
        ]
        if parts:
            found[step.name] = Sum(sum(known.rank for _, known in parts), _loading(parts))
    return found


def _loading(parts: Sequence[tuple[float, KnownFactors]]) -> Callable[[], Pairs]:
    def load() -> Pairs:
        loaded = [(weight, *known.load()) for weight, known in parts]
        return tuple((np.float32(weight) * b, a) for weight, b, a in loaded)

    return load


def _zeros(base: Model) -> Model:
    tensors = {
        name: TensorInfo("F32", info.shape, stored=info.written)
        for name, info in base.source.tensors.items()
    }

    def read(name: str, first_row: int, end_row: int, out: memoryview) -> None:
        np.frombuffer(out, np.uint8)[:] = 0

    return replace(base, source=Source(tensors, read), zeros=True)
