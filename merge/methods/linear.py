"""Weighted sums: of the models, of their task vectors, and of one model with itself."""

import math
from collections.abc import Sequence
from typing import Any

from merge.methods import Models, PerModel, Weight, each, method
from merge.numerics import Array


def weighted_sum(x: Models, weights: Sequence[float | Array]) -> Array:
    """Sum of x[i] * weights[i], added in the order of the models; a weight is a number, or a column or
    row of them."""
    total = x[0] * weights[0]
    for model, weight in zip(x[1:], weights[1:], strict=True):
        total += model * weight
    return total


def _sums_to_zero(*, weight: list[float], normalize: bool, **_: Any) -> str | None:
    if not any(weight):
        return "all weights are 0; give at least one model a weight"
    if normalize and abs(math.fsum(weight)) < 1e-6 * max(map(abs, weight)):
        return "the weights sum to 0 and cannot be normalized; change them or set normalize: false"
    return None


def shares(*, weight: Sequence[float], normalize: bool) -> list[float]:
    """The weights, divided by their signed sum where that is wanted."""
    divisor = math.fsum(weight) if normalize else 1.0
    return [w / divisor for w in weight]


@method(
    space="weights", base="donor", check=_sums_to_zero, coefficients=shares, workspace=2,
    paper="arXiv:2203.05482",
)  # fmt: skip
def linear(x: Models, *, weight: PerModel[Weight], normalize: bool = True) -> Array:
    """Weighted average of the models: sum(w_i x_i) / sum(w_i).

    The divisor is the signed sum, so that the coefficients of the models always add up to 1.

    When it helps: fine-tunes of one base, or checkpoints of one training run, that lie close
    together; the paper reports averages of runs with other hyperparameters to beat the best single
    run. Models far apart lose what they do not share.

    Parameters:
        weight: coefficient of this model
        normalize: divide the weights by their sum
    """
    return weighted_sum(x, shares(weight=weight, normalize=normalize))


@method(
    space="delta", base="required", paper="arXiv:2212.04089", workspace=2,
    coefficients=lambda *, weight, normalize, lambda_, **_: scaled_weights(weight, normalize, lambda_),
)  # fmt: skip
def task_arithmetic(
    x: Models,
    *,
    weight: PerModel[Weight],
    normalize: bool = False,
    lambda_: Weight = 1.0,
    int8_mask: bool = False,
) -> Array:
    """The base plus weighted task vectors: base + lambda * sum(w_i (x_i - base)).

    When it helps: skills of several fine-tunes of one base are to be added, or one taken away (a
    negative weight), and their task vectors interfere little; the plain baseline for all methods on
    task vectors.

    Parameters:
        weight: coefficient of this model's task vector
        normalize: divide the weights by the sum of their magnitudes, so that signs are kept
        lambda: scale of the summed task vector
        int8_mask: accepted for mergekit's sake; without effect
    """
    return weighted_sum(x, scaled_weights(weight, normalize, lambda_))


def scaled_weights(weight: Sequence[float], normalize: bool, scale: float) -> list[float]:
    """Coefficients of the task vectors; a sum of magnitudes of 0 leaves them at 0."""
    divisor = math.fsum(map(abs, weight)) if normalize else 1.0
    return [w * scale / (divisor or 1.0) for w in weight]


@method(
    space="weights", base="donor", models=(1, 1), workspace=2,
    copies=lambda *, scale, **_: scale == [1.0], coefficients=lambda *, scale, **_: scale,
)  # fmt: skip
def passthrough(x: Models, *, scale: PerModel[Weight] = each(1.0)) -> Array:
    """The one model, scaled: s x. With scale 1 the stored bytes are copied as they are.

    When it helps: one model is to be rewritten as it is: in another dtype, scaled, or with other
    files around it.

    Parameters:
        scale: factor on every value
    """
    return x[0] * scale[0]
