"""DELLA: as DARE, but what is large in its row is dropped less often."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from merge.methods import Density, Models, PerModel, Random, Range, Ranks, Weight, each, method
from merge.methods.dare import Seed
from merge.methods.linear import scaled_weights, weighted_sum
from merge.methods.ties import MERGEKIT, disjoint_merge
from merge.numerics import Array

Epsilon = Annotated[float, Range(0, 0.5)]


def pruned(
    x: Models,
    random: Random,
    ranks: Ranks,
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: bool,
) -> list[Array]:
    """Each value kept with a probability that grows with its rank, and divided by it (rescale)."""
    return [
        d if p == 1.0 else _kept(d, random(i), ranks(i), p, e, rescale)
        for i, (d, p, e) in enumerate(zip(x, density, epsilon, strict=True))
    ]


def _kept(
    delta: Array,
    random: NDArray[np.uint32],
    ranks: NDArray[np.float64],
    density: float,
    epsilon: float,
    rescale: bool,
) -> Array:
    chance = ranks * (2 * epsilon) + (density - epsilon)
    kept = random < chance * 2.0**32
    return delta * ((kept / chance).astype(np.float32) if rescale else kept)


def _beyond_chance(*, density: list[float], epsilon: list[float], **_: Any) -> str | None:
    """What is wrong where a probability would leave (0, 1]."""
    for d, e in zip(density, epsilon, strict=True):
        if d < 1.0 and not (d - e > 0.0 and d + e <= 1.0):
            found = f"density {d:g} with epsilon {e:g} keeps values with probability {d - e:g} to {d + e:g}"
            return f"{found}; both must be in (0, 1], so choose a smaller epsilon"
    return None


@method(
    space="delta", base="required", workspace=14, check=_beyond_chance, mergekit=MERGEKIT,
    paper="arXiv:2406.11617",
)  # fmt: skip
def della(
    x: Models,
    random: Random,
    ranks: Ranks,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = each(1.0),
    epsilon: PerModel[Epsilon] = each(0.15),
    normalize: bool = True,
    rescale: bool = True,
    lambda_: Weight = 1.0,
    weights_in_election: bool = False,
    signed_divisor: bool = False,
    seed: Seed = 0,
    int8_mask: bool = False,
) -> Array:
    """DELLA's dropping by magnitude in place of TIES' trimming, then TIES' election and merge.

    A value of x_i - base is kept with probability p = density - epsilon + 2 epsilon r, r its rank by
    magnitude in its row from 0 to 1, and divided by p. A vector is one row; beyond 2**18 values, parts
    of so many are. mergekit gives equal magnitudes different ranks and rescales to the tensor's former L1
    norm; here they share a rank and are divided by p, as in the paper.

    When it helps: as dare_ties, at low densities, where it matters that large changes survive; the
    paper reports better scores on average than DARE and TIES.

    Parameters:
        weight: coefficient of this model's task vector
        density: mean probability that a value is kept
        epsilon: how far the probability goes above and below the density
        normalize: divide by the summed weights of the agreeing models
        rescale: divide kept values by their probability
        lambda: scale of the merged task vector
        weights_in_election: let the weights count in the election (mergekit does)
        signed_divisor: divide by signed weights (mergekit does)
        seed: chooses the mask
        int8_mask: accepted for mergekit's sake; without effect
    """
    return disjoint_merge(
        pruned(x, random, ranks, density, epsilon, rescale), weight, normalize=normalize,
        lambda_=lambda_, weights_in_election=weights_in_election, signed_divisor=signed_divisor,
    )  # fmt: skip


@method(
    space="delta", base="required", workspace=14, check=_beyond_chance,
    paper="arXiv:2406.11617",
)  # fmt: skip
def della_linear(
    x: Models,
    random: Random,
    ranks: Ranks,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = each(1.0),
    epsilon: PerModel[Epsilon] = each(0.15),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: Weight = 1.0,
    seed: Seed = 0,
    int8_mask: bool = False,
) -> Array:
    """Task arithmetic on task vectors that DELLA has thinned out.

    base + lambda * sum_i(w_i m_i (x_i - base) / p_i), m_i = 1 with probability p_i, else 0; p_i grows
    with the rank of the value in its row (see della).

    When it helps: as dare_linear, at low densities, where it matters that large changes survive.

    Parameters:
        weight: coefficient of this model's task vector
        density: mean probability that a value is kept
        epsilon: how far the probability goes above and below the density
        normalize: divide the weights by the sum of their magnitudes
        rescale: divide kept values by their probability
        lambda: scale of the merged task vector
        seed: chooses the mask
        int8_mask: accepted for mergekit's sake; without effect
    """
    kept = pruned(x, random, ranks, density, epsilon, rescale)
    return weighted_sum(kept, scaled_weights(weight, normalize, lambda_))
