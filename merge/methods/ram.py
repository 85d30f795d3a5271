"""RAM: what one model alone changed stays whole, what several changed is averaged."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from merge.methods import Models, Passes, Range, Sums, method
from merge.methods.linear import weighted_sum
from merge.numerics import Array

Size = Annotated[float, Range(0)]


def changed(x: Models, epsilon: float) -> tuple[list[NDArray[np.bool_]], Array]:
    """Per model where it differs from the base by more than epsilon, and how many models do."""
    masks = [np.abs(value) > np.float32(epsilon) for value in x]
    return masks, weighted_sum([mask.astype(np.float32) for mask in masks], [1.0] * len(x))


def merge_changes(x: Models, epsilon: float, scales: Sequence[float] | None) -> Array:
    """Mean of the changes over the models that made them; a change of one alone times its scale."""
    masks, count = changed(x, epsilon)
    own = [value * mask for value, mask in zip(x, masks, strict=True)]
    if scales is not None:
        alone = (count == 1).astype(np.float32)
        own = [value + value * (alone * (s - 1.0)) for value, s in zip(own, scales, strict=True)]
    mean: Array = weighted_sum(own, [1.0] * len(x)) / (count + (count < 1))
    return mean


@method(space="delta", base="required", workspace=4, paper="arXiv:2601.13572")
def ram(x: Models, *, epsilon: Size = 1e-5) -> Array:
    """Changes of one model alone as they are, changes of several as their mean.

    base + sum_i(d_i) / max(1, number of models with |x_i - base| > epsilon), d_i = x_i - base where that
    is larger than epsilon, else 0. There are no weights.

    When it helps: sparse task vectors of reinforcement learning that overlap little; the paper
    argues that averaging dilutes what only one agent learned. Dense task vectors overlap nearly
    everywhere, and it becomes their mean.

    Parameters:
        epsilon: differences from the base up to this size count as none
    """
    return merge_changes(x, epsilon, None)


def amplification(
    size: int, *, models: int, r: float, alpha: float, epsilon: float, **_: Any
) -> Passes:
    """Per model the factor on its unshared changes: 1 + r min(shared / unshared, alpha)."""

    def numbers(x: Models) -> list[NDArray[np.float64]]:
        masks, count = changed(x, epsilon)
        both = [(mask & (count > 1), mask & (count == 1)) for mask in masks]
        return [mask.astype(np.float64) for pair in both for mask in pair]

    sums = yield Sums(numbers)
    pairs = zip(sums[::2].tolist(), sums[1::2].tolist(), strict=True)
    return [1.0 + r * _ratio(shared, alone, alpha) for shared, alone in pairs]


def _ratio(shared: float, alone: float, most: float) -> float:
    """shared / alone, at most `most`."""
    return shared / alone if shared < alone * most else most * (shared > 0)


@method(
    space="delta", base="required", passes=1, workspace=5, statistics=amplification,
    paper="arXiv:2601.13572",
)  # fmt: skip
def ramplus_tl(
    x: Models,
    stats: Sequence[float],
    *,
    r: Size = 0.1,
    alpha: Size = 0.2,
    epsilon: Size = 1e-5,
) -> Array:
    """RAM, with each model's unshared changes amplified by how much of its changes is shared.

    As ram, but the changes of model i alone are multiplied by 1 + r min(s_i / u_i, alpha), with s_i and
    u_i the numbers of its shared and unshared changes; here (as in mergekit) of each tensor.

    When it helps: as ram, where the averaging of shared changes weakens the models.

    Parameters:
        r: strength of the amplification
        alpha: ratio of shared to unshared changes from which it grows no further
        epsilon: differences from the base up to this size count as none
    """
    return merge_changes(x, epsilon, stats)
