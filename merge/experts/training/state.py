"""Where a training stands: router tensors, Adam's moments, facts; in one safetensors file, never a pickle."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from merge.errors import OutputError
from merge.write import writing

FIRST, SECOND = 0.9, 0.99  # how much of Adam's moments stays at each step
EPSILON = 1e-8
PARTS = ("value", "first", "second")


@dataclass
class State:
    """After `step` steps. `values`: the routers, float32; `first`, `second`: moments of their gradients.
    `facts`: of JSON: what was found out on the way, and what the training is."""

    step: int
    values: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begun(cls, values: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "State":
        first, second = (
            {n: torch.zeros_like(value) for n, value in values.items()} for _ in (1, 2)
        )
        return cls(0, dict(values), first, second, dict(facts))

    def on(self, device: str) -> "State":
        """The same on another device."""

        def moved(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in part.items()}

        values, first, second = map(moved, (self.values, self.first, self.second))
        return State(self.step, values, first, second, self.facts)

    def descend(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """One step of Adam (arXiv 1412.6980) against `gradients`, float32."""
        self.step += 1
        for name, gradient in gradients.items():
            first = self.first[name].mul_(FIRST).add_(gradient * (1 - FIRST))
            second = self.second[name].mul_(SECOND).add_(gradient.square() * (1 - SECOND))
            mean, square = first / (1 - FIRST**self.step), second / (1 - SECOND**self.step)
            self.values[name].sub_(rate * mean / (square.sqrt() + EPSILON))


def rate_at(step: int, steps: int, rate: float) -> float:
    """The learning rate of a step, from 0: half a cosine from `rate` down to a tenth of it."""
    return rate * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def save_state(state: State, file: Path) -> None:
    """Writes the state in the place of an earlier one, whole or not at all; raises WriteError."""
    parts = (state.values, state.first, state.second)
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part, table in zip(PARTS, parts, strict=True)
        for name, tensor in table.items()
    }
    told = {"step": str(state.step), "facts": json.dumps(state.facts)}
    growing = file.with_name(file.name + ".growing")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with growing.open("wb") as stream:
            stream.write(save(tensors, told))
            stream.flush()
            os.fsync(stream.fileno())
        growing.rename(file)


def read_state(file: Path) -> State | None:
    """The state in `file`, None where there is none; raises OutputError where it is damaged."""
    if not file.is_file():
        return None
    tables: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    try:
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
            for key in opened.keys():  # noqa: SIM118 - no mapping
                part, _, name = key.partition("/")
                tables[part][name] = opened.get_tensor(key)
        values, first, second = (tables[part] for part in PARTS)
        return State(int(told["step"]), values, first, second, json.loads(told["facts"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{file}: is no state of a training ({type(error).__name__}); give --restart to begin again"
        ) from None
