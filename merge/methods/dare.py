"""DARE: drop task-vector values at random and rescale what is left."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from merge.methods import Density, Models, PerModel, Random, Range, Weight, each, method
from merge.methods.linear import scaled_weights, weighted_sum
from merge.methods.ties import MERGEKIT, disjoint_merge
from merge.numerics import Array

Seed = Annotated[int, Range(0, 2**63)]


def dropped(x: Models, random: Random, density: Sequence[float], rescale: bool) -> list[Array]:
    """Each value kept with probability `density` and divided by it (rescale), else 0."""
    return [
        d if p == 1.0 else _kept(d, random(i), p, rescale)
        for i, (d, p) in enumerate(zip(x, density, strict=True))
    ]


def _kept(delta: Array, random: NDArray[np.uint32], density: float, rescale: bool) -> Array:
    out = delta * (random < np.uint32(min(round(density * 2**32), 2**32 - 1)))
    if rescale:
        out *= np.float32(1.0 / density)
    return out


@method(space="delta", base="required", workspace=5, paper="arXiv:2311.03099")
def dare_linear(
    x: Models,
    random: Random,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = each(1.0),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: Weight = 1.0,
    seed: Seed = 0,
    int8_mask: bool = False,
) -> Array:
    """Task arithmetic on task vectors of which a random part is dropped and the rest rescaled.

    base + lambda * sum_i(w_i m_i (x_i - base) / p_i), m_i = 1 with probability p_i = density, else 0.
    The mask depends on seed, tensor name, model position and element alone. mergekit rescales to the
    tensor's former L1 norm instead; here it is divided by the probability, as in the paper.

    When it helps: supervised fine-tunes with small task vectors: the paper drops 90 % of them and
    more with little loss. It notes that large task vectors, as of continued pretraining, do not
    bear it.

    Parameters:
        weight: coefficient of this model's task vector
        density: probability that a value is kept
        normalize: divide the weights by the sum of their magnitudes
        rescale: divide kept values by the density
        lambda: scale of the merged task vector
        seed: chooses the mask
        int8_mask: accepted for mergekit's sake; without effect
    """
    kept = dropped(x, random, density, rescale)
    return weighted_sum(kept, scaled_weights(weight, normalize, lambda_))


@method(space="delta", base="required", workspace=6, mergekit=MERGEKIT, paper="arXiv:2311.03099")
def dare_ties(
    x: Models,
    random: Random,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = each(1.0),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: Weight = 1.0,
    weights_in_election: bool = False,
    signed_divisor: bool = False,
    seed: Seed = 0,
    int8_mask: bool = False,
) -> Array:
    """DARE's random dropping in place of TIES' trimming, then TIES' election and merge.

    When it helps: as dare_linear, with several models whose signs conflict.

    Parameters:
        weight: coefficient of this model's task vector
        density: probability that a value is kept
        normalize: divide by the summed weights of the agreeing models
        rescale: divide kept values by the density
        lambda: scale of the merged task vector
        weights_in_election: let the weights count in the election (mergekit does)
        signed_divisor: divide by signed weights (mergekit does)
        seed: chooses the mask
        int8_mask: accepted for mergekit's sake; without effect
    """
    return disjoint_merge(
        dropped(x, random, density, rescale), weight, normalize=normalize,
        lambda_=lambda_, weights_in_election=weights_in_election, signed_divisor=signed_divisor,
    )  # fmt: skip
