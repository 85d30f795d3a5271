"""NaN and infinity: where they are, and whose."""

from collections.abc import Sequence

import numpy as np

from merge.errors import NonFiniteError
from merge.numerics import Raw, first_nonfinite, to_float32
from merge.plan import Plan, Step


def check_grain(plan: Plan, step: Step, inputs: Sequence[Raw], rows: Raw, first: int) -> None:
    """Raises NonFiniteError where a merged grain, which starts at row `first`, or one of these inputs holds
    NaN or infinity."""
    for index, raw in enumerate(inputs):
        check_input(plan, step, index, raw, first)
    at = first_nonfinite(rows, step.dtype)
    if at is not None:
        raise NonFiniteError(
            f"merged tensor {step.name!r} overflows {step.dtype} at {_position(step, first, at)}; "
            "choose a wider out_dtype or smaller weights"
        )


def check_input(plan: Plan, step: Step, index: int, rows: Raw, first: int) -> None:
    """Raises NonFiniteError where rows of input `index` hold NaN or infinity."""
    operand = step.inputs[index]
    at = first_nonfinite(rows, operand.info.dtype)
    if at is not None:
        label = plan.models[operand.model].label
        value = to_float32(rows.reshape(-1)[at : at + 1], operand.info.dtype)[0]
        raise NonFiniteError(
            f"{label}: tensor {operand.tensor!r} holds {value} at {_position(step, first, at)}; "
            "repair the model, or allow it with allow_nonfinite: true"
        )


def _position(step: Step, first_row: int, at: int) -> str:
    """Where element `at` after the start of `first_row` lies, as an index of the tensor."""
    flat = first_row * step.cols + at
    return "[" + ", ".join(str(int(i)) for i in np.unravel_index(flat, step.shape or (1,))) + "]"
