"""A candidate in memory: its plan is run into the parameters of a live model, in place; no file is written.

The values are those of the written model to the bit: each block is rounded to the dtype that it would be
stored in, and widened to the dtype that the model is scored in.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merge.agreement import canonical
from merge.anatomy import matched
from merge.budget import Budget
from merge.carry import carried
from merge.errors import ScoreError
from merge.numerics import STORAGE, Raw, grains, to_float32
from merge.plan import Plan, Step
from merge.search.measured import Measured, stored_inputs
from merge.stream import StepDigests, run

if TYPE_CHECKING:
    import torch

TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# numpy's types that torch can take over, by their size
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass
class LiveModel:
    """A model as transformers runs it, and its tokenizer. `parameters`: by the names of a plan's steps, each
    seen as [rows, cols]. `measured`: what is known of the models that it is made of."""

    model: Any
    tokenizer: Any
    parameters: Mapping[str, "torch.Tensor"]
    measured: Measured = field(default_factory=Measured)

    def __post_init__(self) -> None:
        self._memory = {name: _memory_of(value) for name, value in self.parameters.items()}
        self._made_of: Mapping[str, str] = {}  # the values that are there; nothing after a failure

    def place(self, step: Step, first: int, end: int) -> Raw | None:
        """Where rows of a step are in memory, if the model has them as they are stored."""
        memory = self._memory[step.name]
        if memory is None or memory[0] != step.dtype:
            return None
        return memory[1][first:end]

    def write(self, step: Step, first_row: int, rows: Raw, digests: Sequence[bytes]) -> None:
        """The engine's rows, put into the parameter of that name; grain by grain, as they are widened."""
        import torch

        memory = self._memory[step.name]
        for a, b in grains(step.shape, first_row, first_row + len(rows)):
            grain = rows[a - first_row : b - first_row]
            # by numpy where it can: torch's threads would wait for one another in each of the engine's
            if memory and memory[0] == step.dtype:
                memory[1][a:b] = grain
            elif memory and memory[0] == "F32":
                memory[1][a:b] = to_float32(grain, step.dtype)
            else:
                stored = torch.from_numpy(grain.view(SIGNED[grain.dtype.itemsize]))
                self.parameters[step.name][a:b].copy_(stored.view(_torch(step.dtype)))

    def finished(self, step: Step, digests: StepDigests) -> None:
        """Nothing: what is in memory is lost with the process."""

    def become(self, plan: Plan, budget: Budget) -> None:
        """Takes on the values of `plan`; raises RunError where an input cannot be read or is not finite.

        Tensors that are made of the same as those of the plan before are there already, and what statistics
        passes found out for any plan before is not measured again.
        """
        import torch

        made_of = {step.name: _made_of(plan, step) for step in plan.steps}
        there, self._made_of = self._made_of, {}
        others = [
            s for s in plan.steps if not made_of[s.name] or made_of[s.name] != there.get(s.name)
        ]
        with torch.no_grad():
            known = self.measured.of(plan, budget.spare)
            run(plan, budget, self, others, in_place=self.place, memory=known)
        self._made_of = made_of


def _made_of(plan: Plan, step: Step) -> str:
    """Stands for the values of a step in all plans whose models are the same files; empty where it cannot."""
    inputs = stored_inputs(plan, step)
    allow = plan.recipe.sections.allow_nonfinite
    return "" if inputs is None else canonical([step.facts, inputs, allow])


def _memory_of(parameter: "torch.Tensor") -> tuple[str, Raw] | None:
    """The dtype and the rows of a parameter as numpy sees them; None where it lies on another device."""
    import torch

    dtype = next((dtype for dtype in TORCH if _torch(dtype) == parameter.dtype), None)
    if parameter.device.type != "cpu" or dtype is None:
        return None
    signed = SIGNED[parameter.element_size()]
    return dtype, parameter.view(getattr(torch, signed.__name__)).numpy().view(STORAGE[dtype])


def _torch(dtype: str) -> "torch.dtype":
    import torch

    return getattr(torch, TORCH[dtype])  # type: ignore[no-any-return]


class Shells:
    """Live models without values yet, one for each config and tokenizer; the last ones are kept.

    dtype: that of all of them, or "auto", which is for each what it would be loaded in as a folder.
    """

    KEPT = 2

    def __init__(self, dtype: "torch.dtype | str", device: str) -> None:
        self._dtype, self._device = dtype, device
        self._known: dict[str, LiveModel] = {}
        self._measured = Measured()  # of the same models, whatever is made of them

    def of(self, plan: Plan) -> LiveModel:
        """A model with the config, tokenizer and tensor names of `plan`; raises ScoreError."""
        key = _shape_of(plan)
        found = self._known.pop(key, None) or self._made(plan)
        self._known[key] = found  # the last one again
        while len(self._known) > self.KEPT:
            del self._known[next(iter(self._known))]
        return found

    def _made(self, plan: Plan) -> LiveModel:
        with tempfile.TemporaryDirectory(prefix="mergetool-") as folder:
            for name, content in carried(plan).items():
                place = Path(folder, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, place)
                else:
                    place.write_bytes(content)
            model, tokenizer = _loaded(Path(folder), _chosen(self._dtype, plan))
        model.to(self._device).eval()
        return LiveModel(model, tokenizer, _by_step(plan, model), self._measured)


def _chosen(dtype: "torch.dtype | str", plan: Plan) -> "torch.dtype | None":
    """What transformers takes for "auto": that of config.json (None), else that of the first floats."""
    if not isinstance(dtype, str):
        return dtype
    told = plan.recipe.out_dtype or plan.config.get("dtype") or plan.config.get("torch_dtype")
    floats = (step.dtype for step in plan.steps if step.dtype in TORCH)
    return None if told else _torch(next(floats, "F32"))


def _shape_of(plan: Plan) -> str:
    """Stands for what a model is beside its values."""
    names = [(step.name, step.shape, step.dtype) for step in plan.steps]
    files = [str(plan.models[plan.donor].folder), plan.tokens and plan.tokens.digest]
    return hashlib.sha256(canonical([dict(plan.config), names, files]).encode()).hexdigest()


def _loaded(folder: Path, dtype: "torch.dtype | None") -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    how = {"local_files_only": True, "trust_remote_code": False}  # None asks whoever sits there
    try:
        config = AutoConfig.from_pretrained(folder, **how)
        tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        chosen = {} if dtype is None else {"dtype": dtype}
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **chosen)
    except Exception as error:  # of any library that a config leads to
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ScoreError(f"cannot be made in memory: {reason}") from None
    return model, tokenizer


def _by_step(plan: Plan, model: Any) -> dict[str, "torch.Tensor"]:
    """Parameters and stored buffers by the names of the steps; each step has its own, and each a step."""
    values = dict(model.state_dict(keep_vars=True))
    tied = {id(value) for value in values.values()}
    names = matched([step.name for step in plan.steps], values)
    found = {}
    for step in plan.steps:
        value = values.get(names.get(step.name, ""))
        if value is None or tuple(value.shape) != step.shape:
            raise ScoreError(
                f"tensor {step.name!r} has no place in {type(model).__name__} as transformers loads it; this "
                "architecture cannot be searched over"
            )
        tied.discard(id(value))
        found[step.name] = value.data.view(step.rows, step.cols)
    if tied:
        left = next(name for name, value in values.items() if id(value) in tied)
        raise ScoreError(
            f"parameter {left!r} of {type(model).__name__} gets no value from the merge"
        )
    return found
