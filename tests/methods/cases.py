"""For every method: recipes that a test can run, and the same in words of one tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from families import typed, write_model, write_recipe
from numpy.typing import NDArray

from merge.methods import all_methods
from merge.pipeline import Result, run_recipe
from merge.plan import Step
from merge.sources.weights import open_safetensors

NAME = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Case:
    """One way to call a method: parameters per model (a list holds one value a model) and shared."""

    method: str
    models: int
    own: Mapping[str, list[float]] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    based: bool = False  # with a base, where the method can do without

    @property
    def id(self) -> str:
        return "-".join(
            [
                f"{self.method}({self.models})",
                *(["based"] if self.based else []),
                *self.own,
                *(f"{k}={v}" for k, v in self.shared.items()),
            ]
        )


W = [0.5, 0.3, -0.2]
MERGEKITS_WAY = {"weights_in_election": True, "signed_divisor": True}
CASES = [
    Case("linear", 3, {"weight": [1.0, 2.0, 0.5]}),
    Case("linear", 3, {"weight": W}, {"normalize": False}),
    Case("passthrough", 1, {"scale": [0.7]}),
    Case("passthrough", 1),
    Case("slerp", 2, {}, {"t": 0.3}),
    Case("task_arithmetic", 3, {"weight": W}),
    Case("task_arithmetic", 3, {"weight": W}, {"normalize": True, "lambda": 0.8}),
    Case("ties", 3, {"weight": W, "density": [0.5, 0.71, 0.3]}),
    Case("ties", 3, {"weight": W, "density": [1.0, 0.2, 1.0]}, {"normalize": False, "lambda": 1.3}),
    Case("ties", 3, {"weight": W, "density": [0.5] * 3}, MERGEKITS_WAY),
    Case("dare_linear", 3, {"weight": W, "density": [0.5, 0.71, 1.0]}, {"seed": 7}),
    Case("dare_linear", 3, {"weight": W, "density": [0.5] * 3}, {"rescale": False, "normalize": True}),
    Case("dare_ties", 3, {"weight": W, "density": [0.5, 0.71, 1.0]}, {"seed": 7}),
    Case("dare_ties", 3, {"weight": W, "density": [0.5] * 3}, {"normalize": True, "lambda": 0.5}),
    Case("breadcrumbs", 3, {"weight": W, "density": [0.5, 0.71, 0.3], "gamma": [0.01, 0.1, 0.0]}),
    Case("breadcrumbs", 3, {"weight": W, "density": [0.9, 1.0, 0.2], "gamma": [0.3, 0.1, 0.01]},
         {"normalize": True, "lambda": 0.8}),
    Case("breadcrumbs_ties", 3, {"weight": W, "density": [0.5, 0.71, 0.3], "gamma": [0.05] * 3}),
    Case("breadcrumbs_ties", 3, {"weight": W, "density": [0.5] * 3}, MERGEKITS_WAY),
    Case("della", 3, {"weight": W, "density": [0.5, 0.71, 1.0]}, {"seed": 7}),
    Case("della", 3, {"weight": W, "density": [0.5] * 3, "epsilon": [0.1, 0.49, 0.0]},
         {"normalize": False, "rescale": False, **MERGEKITS_WAY}),
    Case("della", 2, {"weight": W[:2], "density": [0.4] * 2, "epsilon": [0.3] * 2}, {"lambda": 0.5}),
    Case("della_linear", 3, {"weight": W, "density": [0.5] * 3}, {"rescale": False, "normalize": True}),
    Case("della_linear", 3, {"weight": W, "density": [0.5, 0.71, 1.0]}, {"seed": 7}),
    Case("sce", 3),
    Case("sce", 2, {}, {"uniform_below": 1e-3}),
    Case("sce", 3, {}, {"select_topk": 0.3}),
    Case("ram", 3, {}, {"epsilon": 0.05}),
    Case("ram", 2),
    Case("ramplus_tl", 2),
    Case("ramplus_tl", 3, {}, {"r": 0.7, "alpha": 2.0, "epsilon": 0.1}),
    Case("arcee_fusion", 2),
    Case("model_stock", 3, {}, {"filter_wise": True}),
    Case("model_stock", 3),
    Case("model_stock", 2),
    Case("karcher", 3),
    Case("karcher", 2, {}, {"max_iter": 100, "tol": 1e-9}),
    Case("nearswap", 1, {}, {"t": 0.05}),
    Case("nuslerp", 2, {"weight": [0.6, 0.2]}),
    Case("nuslerp", 2, {"weight": [0.6, 0.2]}, based=True),
    Case("nuslerp", 2, {"weight": [0.6, 0.2]}, {"nuslerp_flatten": False}),
    Case("nuslerp", 2, {"weight": [0.6, 0.2]}, {"nuslerp_flatten": False}, based=True),
    Case("nuslerp", 2, {"weight": [0.6, 0.2]},
         {"nuslerp_flatten": False, "nuslerp_row_wise": True}, based=True),
    Case("multislerp", 3, {"weight": [0.6, 0.3, 0.2]}),
    Case("multislerp", 3, {"weight": [0.6, 0.3, 0.2]}, {"normalize_weights": False}, based=True),
]  # fmt: skip

Values = Mapping[str, NDArray[Any]]


def needs_base(case: Case) -> bool:
    return case.based or all_methods()[case.method].base == "required"


def write_case(
    folder: Path, case: Case, models: list[Values], base: Values, dtype: str, **keys: Any
) -> Path:
    """Model folders m0, m1, ... and base, and the recipe of `case` over them."""
    for i, values in enumerate(models):
        write_model(folder / f"m{i}", typed(values, dtype))
    if all_methods()[case.method].base != "first" and needs_base(case):
        write_model(folder / "base", typed(base, dtype))
    return recipe_of(folder, case, **keys)


def recipe_of(folder: Path, case: Case, **keys: Any) -> Path:
    """The recipe of `case` over the folders m0, m1, ... and base."""
    entries = [
        {"model": f"m{i}", "parameters": {k: v[i] for k, v in case.own.items()}}
        for i in range(case.models)
    ]
    if all_methods()[case.method].base == "first":
        keys["base_model"] = "m0"
    elif needs_base(case):
        keys["base_model"] = "base"
    if case.shared:
        keys["parameters"] = dict(case.shared)
    return write_recipe(folder / "recipe.yaml", models=entries, merge_method=case.method, **keys)


def merged(recipe: Path, **options: Any) -> tuple[dict[str, NDArray[Any]], Result]:
    """Runs a recipe; all written tensors as float64, by name."""
    result = run_recipe(recipe, recipe.parent / options.pop("into", "out"), **options)
    return read_values(result.folder), result


def read_values(folder: Path) -> dict[str, NDArray[Any]]:
    """Tensors of a model folder as float64 (integers as they are)."""
    from merge.numerics import STORAGE, to_float32

    source = open_safetensors(folder)
    out = {}
    for name, info in source.tensors.items():
        raw = np.empty((info.rows, info.cols), STORAGE[info.dtype])
        source.read(name, 0, info.rows, raw.reshape(-1).view("u1").data)
        wide = raw.astype(np.float64) if info.dtype == "F64" else to_float32(raw, info.dtype)
        out[name] = wide.astype(np.float64).reshape(info.shape)
    return out


def parameters_of(step: Step) -> dict[str, Any]:
    return {k: v for k, v in step.parameters.items() if k != "int8_mask"}
