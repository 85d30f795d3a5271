"""Nearswap: a step of limited size from the base towards another model."""

from typing import Annotated

import numpy as np

from merge.methods import Models, Range, method
from merge.numerics import Array


@method(space="delta", base="required", models=(1, 1), workspace=4)
def nearswap(x: Models, *, t: Annotated[float, Range(0)]) -> Array:
    """The other model where it is within t of the base, else t in its direction: base + clip(d, -t, t).

    Where the two nearly agree the other model is taken over; large differences are cut off.

    When it helps: what another model agrees in with the base is to be taken over while large
    differences are cut off: a careful blend of a foreign model.

    Parameters:
        t: largest change of a value
    """
    (delta,) = x
    limit = np.float32(t)
    clipped: Array = delta * (np.abs(delta) <= limit)
    clipped += limit * (delta > limit)
    clipped -= limit * (delta < -limit)
    return clipped
