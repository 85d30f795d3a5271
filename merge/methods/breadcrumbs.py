"""Model breadcrumbs: task vectors without their largest and their smallest values."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from merge.methods import Density, Models, Passes, PerModel, Range, Weight, each, method
from merge.methods.linear import scaled_weights, weighted_sum
from merge.methods.ties import MERGEKIT, disjoint_merge, magnitudes_at
from merge.numerics import Array

Gamma = Annotated[float, Range(0, 1)]


def brackets(
    size: int, *, density: Sequence[float], gamma: Sequence[float], **_: Any
) -> Passes | None:
    """Per model the largest and the smallest |x| that stay, float32 [2 models].

    Of floor(density n) values that stay, floor(gamma n) larger ones go; fewer where too few are left.
    """
    if all(d == 1.0 for d in density):
        return None
    wanted = []
    for model, (d, g) in enumerate(zip(density, gamma, strict=True)):
        kept = max(1, int(d * size))
        above = min(int(g * size), size - kept)
        wanted += [(model, above + 1), (model, above + kept)]
    return magnitudes_at(wanted)


def between(x: Models, stats: Any) -> list[Array]:
    """The values whose magnitude lies in their model's bracket, else 0."""
    if stats is None:
        return list(x)
    sizes = [np.abs(d) for d in x]
    return [
        d * ((size <= high) & (size >= low))
        for d, size, high, low in zip(x, sizes, stats[::2], stats[1::2], strict=True)
    ]


@method(
    space="delta", base="required", passes=2, workspace=5, statistics=brackets,
    paper="arXiv:2312.06795",
)  # fmt: skip
def breadcrumbs(
    x: Models,
    stats: Any,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = each(1.0),
    gamma: PerModel[Gamma] = each(0.01),
    normalize: bool = False,
    lambda_: Weight = 1.0,
    int8_mask: bool = False,
) -> Array:
    """Task arithmetic on task vectors without outliers and without small values.

    base + lambda * sum_i(w_i d_i), where d_i keeps a `density` of x_i - base: the largest magnitudes
    after the very largest, a fraction `gamma`, are gone. Values equal to the smallest or the largest
    one kept stay too. With density 1 nothing goes.

    When it helps: many task vectors at once, some with outliers that would dominate their sum; the
    paper reports settings that carry over as tasks are added.

    Parameters:
        weight: coefficient of this model's task vector
        density: fraction of the values that stay
        gamma: fraction of the values that go from the top
        normalize: divide the weights by the sum of their magnitudes
        lambda: scale of the merged task vector
        int8_mask: accepted for mergekit's sake; without effect
    """
    return weighted_sum(between(x, stats), scaled_weights(weight, normalize, lambda_))


@method(
    space="delta", base="required", passes=2, workspace=6, statistics=brackets,
    mergekit=MERGEKIT, paper="arXiv:2312.06795",
)  # fmt: skip
def breadcrumbs_ties(
    x: Models,
    stats: Any,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = each(1.0),
    gamma: PerModel[Gamma] = each(0.01),
    normalize: bool = False,
    lambda_: Weight = 1.0,
    weights_in_election: bool = False,
    signed_divisor: bool = False,
    int8_mask: bool = False,
) -> Array:
    """Breadcrumbs' masks in place of TIES' trimming, then TIES' election and merge.

    When it helps: as breadcrumbs, where the signs of the models conflict as well.

    Parameters:
        weight: coefficient of this model's task vector
        density: fraction of the values that stay
        gamma: fraction of the values that go from the top
        normalize: divide by the summed weights of the agreeing models
        lambda: scale of the merged task vector
        weights_in_election: let the weights count in the election (mergekit does)
        signed_divisor: divide by signed weights (mergekit does)
        int8_mask: accepted for mergekit's sake; without effect
    """
    return disjoint_merge(
        between(x, stats), weight, normalize=normalize, lambda_=lambda_,
        weights_in_election=weights_in_election, signed_divisor=signed_divisor,
    )  # fmt: skip
