"""What statistics passes found out about tensors of the parents, kept from one candidate to the next."""

import pickle
import threading
from dataclasses import dataclass, field
from typing import Any

from merge.agreement import canonical
from merge.plan import Plan, Step

ENTRY = 1 << 10  # bytes of what is known of a step, beside its numbers


@dataclass
class Measured:
    """Statistics by what they depend on; the ones that were asked for last are kept."""

    _found: dict[str, tuple[Any, int]] = field(default_factory=dict)
    _taken: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, plan: Plan, room: int) -> "OfPlan":
        """What is known of the steps of a plan, and will be, in so many bytes."""
        with self._lock:
            self._make_room(room)
        return OfPlan(self, plan, room)

    def known(self, key: str) -> Any:
        with self._lock:
            found = self._found.pop(key, None)
            if found is None:
                return None
            self._found[key] = found  # the last one again
        return found[0]

    def keep(self, key: str, stats: Any, room: int) -> None:
        size = ENTRY + len(pickle.dumps(stats))
        if size > room:
            return
        with self._lock:
            self._make_room(room - size)
            if key not in self._found:
                self._found[key] = stats, size
                self._taken += size

    def _make_room(self, room: int) -> None:
        while self._found and self._taken > room:
            _, size = self._found.pop(next(iter(self._found)))
            self._taken -= size


@dataclass(frozen=True)
class OfPlan:
    """The statistics of one plan's steps."""

    measured: Measured
    plan: Plan
    room: int

    def known(self, step: Step) -> Any:
        """What is known of the step; None where nothing is."""
        key = self._key(step)
        return self.measured.known(key) if key else None

    def keep(self, step: Step, stats: Any) -> None:
        if key := self._key(step):
            self.measured.keep(key, stats, self.room)

    def _key(self, step: Step) -> str:
        """Stands for what the statistics of a step depend on; empty where it has none, or nothing can."""
        inputs = stored_inputs(self.plan, step)
        if inputs is None or step.copy or step.method.statistics is None:
            return ""
        found_by = step.method.statistics
        how = [found_by.__module__, found_by.__qualname__, step.method.measures_by(step.parameters)]
        return canonical([step.shape, inputs, step.base is not None, *how])


def stored_inputs(plan: Plan, step: Step) -> list[list[str]] | None:
    """What a step reads, the same in all plans whose models are the same files; None where some of it is
    computed."""
    models = [plan.models[operand.model] for operand in step.inputs]
    if any(operand.step for operand in step.inputs) or any(model.computed for model in models):
        return None
    return [
        [model.label, operand.tensor, operand.info.dtype]
        for model, operand in zip(models, step.inputs, strict=True)
    ]
