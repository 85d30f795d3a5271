"""A model written again with some tensors changed: all others, and all files, are copied bit for bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from merge.anatomy import natural_order
from merge.experts.assembling import copied
from merge.experts.telling import loading_code
from merge.numerics import Raw
from merge.plan import Operand, Plan
from merge.recipe import parse_recipe
from merge.sources import Source, TensorInfo
from merge.sources.model import Model
from merge.verify import PROVENANCE


def rewritten(model: Model, changed: Mapping[str, Raw], names: tuple[str, ...], title: str) -> Plan:
    """The plan of `model` in which the tensors `names` are those in `changed`, as stored; they are looked up
    there when they are read. `title` must stand for what they are: the plan's digest tells of no values."""
    recipe = parse_recipe(yaml.safe_dump({"model": model.label}), model.label)
    tensors = model.source.tensors
    infos = {name: TensorInfo(tensors[name].dtype, tensors[name].shape) for name in names}
    source = Source(infos, _reading(changed), held=sum(info.nbytes for info in infos.values()))
    made = Model(title, model.folder, model.config, source, computed=True, name=title)
    steps = tuple(
        copied(name, Operand(1, name, infos[name]), infos[name].dtype)
        if name in infos
        else copied(name, Operand(0, name, tensors[name]), tensors[name].dtype)
        for name in sorted(tensors, key=natural_order)
    )
    return Plan(recipe, (model, made), 0, None, model.config, steps, (), {})


def _reading(tensors: Mapping[str, Raw]) -> Any:
    def read(name: str, first: int, end: int, out: memoryview) -> None:
        value = tensors[name]
        rows = np.ascontiguousarray(
            value.reshape(-1, value.shape[-1] if value.ndim > 1 else 1)[first:end]
        )
        out[:] = rows.reshape(-1).view(np.uint8).data

    return read


def card_of(plan: Plan, what: str) -> str:
    """README.md with the hub's metadata; `what`: what was done to the model, in sentences."""
    model = plan.models[plan.donor]
    name = model.public_name
    meta = {
        "library_name": "transformers",
        "tags": ["mergetool", "merge"],
        "base_model": [name],
        "base_model_relation": "finetune",
    }
    return (
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {name}, its routers trained\n\n{what}\n\n"
        f"```python\n{loading_code(model.config)}```\n\n"
        f"Digests of all inputs and outputs are in `{PROVENANCE}`; `mergetool verify` compares them.\n"
    )
