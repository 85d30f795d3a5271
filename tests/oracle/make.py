"""Writes mergekit-0.1.5.safetensors: what mergekit makes of tiny float32 models, for tests to compare.

    python tests/oracle/make.py PYTHON_WITH_MERGEKIT

Only results are kept; the inputs are drawn again by the tests (`inputs`).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import drawn, typed, write_model

RESULTS = Path(__file__).with_name("mergekit-0.1.5.safetensors")
HIDDEN, LAYERS, VOCABULARY = 16, 2, 32
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip


def _delta(merge_method: str, parameters: dict[str, Any], **own: list[float]) -> dict[str, Any]:
    models = [
        {"model": name, "parameters": {key: values[i] for key, values in own.items()}}
        for i, name in enumerate(("a", "b", "c"))
    ]
    recipe = {
        "merge_method": merge_method,
        "base_model": "base",
        "models": models,
        "dtype": "float32",
    }
    return recipe | ({"parameters": parameters} if parameters else {})


def _without_base(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "base_model"}


WEIGHTS = [0.5, 0.3, 0.2]
RECIPES: dict[str, dict[str, Any]] = {
    "linear": _without_base(_delta("linear", {}, weight=[1.0, 2.0, 0.5])),
    "linear_sum": _without_base(_delta("linear", {"normalize": False}, weight=WEIGHTS)),
    "linear_gradient": {
        "merge_method": "linear", "dtype": "float32",
        "models": [
            {"model": "a", "parameters": {"weight": [0.2, 0.9]}},
            {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": 0.7}, {"value": 0.1}]}},
        ],
    },
    "slerp": {
        "merge_method": "slerp", "base_model": "a", "dtype": "float32",
        "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.3},
    },
    "task_arithmetic": _delta("task_arithmetic", {}, weight=WEIGHTS),
    "task_arithmetic_normalized": _delta(
        "task_arithmetic", {"normalize": True, "lambda": 0.8}, weight=WEIGHTS
    ),
    "ties": _delta("ties", {}, weight=WEIGHTS, density=[0.5, 0.7, 0.3]),
    "ties_sum": _delta(
        "ties", {"normalize": False, "lambda": 1.3}, weight=[1.0] * 3, density=[0.5] * 3
    ),
    "dare_linear": _delta("dare_linear", {}, weight=WEIGHTS, density=[1.0] * 3),
    "dare_ties": _delta("dare_ties", {"normalize": True}, weight=WEIGHTS, density=[1.0] * 3),
    "breadcrumbs": _delta(
        "breadcrumbs", {}, weight=WEIGHTS, density=[0.5, 0.7, 0.3], gamma=[0.01, 0.1, 0.05]
    ),
    "breadcrumbs_ties": _delta(
        "breadcrumbs_ties", {"normalize": True}, weight=WEIGHTS, density=[0.5] * 3, gamma=[0.05] * 3
    ),
    "della": _delta("della", {}, weight=WEIGHTS, density=[1.0] * 3),
    "della_linear": _delta("della_linear", {"lambda": 0.7}, weight=WEIGHTS, density=[1.0] * 3),
    "sce": _delta("sce", {}),
    "sce_select": _delta("sce", {"select_topk": 0.3}),
    "ram": _delta("ram", {"epsilon": 0.05}),
    "ramplus_tl": _delta("ramplus_tl", {"r": 0.5, "alpha": 3.0, "epsilon": 0.15}),
    "arcee_fusion": {
        "merge_method": "arcee_fusion", "base_model": "base", "dtype": "float32",
        "models": [{"model": "a"}],
    },
    "model_stock": _delta("model_stock", {}),
    "model_stock_filter_wise": _delta("model_stock", {"filter_wise": True}),
    "karcher": _without_base(_delta("karcher", {})),
    "nuslerp": {
        "merge_method": "nuslerp", "dtype": "float32",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.6), ("b", 0.2))],
    },
    "nuslerp_by_rows": {
        "merge_method": "nuslerp", "dtype": "float32", "parameters": {"nuslerp_flatten": False},
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.6), ("b", 0.2))],
    },
    "nuslerp_by_columns": {
        "merge_method": "nuslerp", "dtype": "float32",
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.6), ("b", 0.2))],
    },
    "nuslerp_on_base": {
        "merge_method": "nuslerp", "dtype": "float32", "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.6), ("b", 0.2))],
    },
    "multislerp": _without_base(_delta("multislerp", {}, weight=WEIGHTS)),
    "multislerp_on_base": _delta("multislerp", {}, weight=WEIGHTS),
    "nearswap": {
        "merge_method": "nearswap", "base_model": "base", "dtype": "float32",
        "models": [{"model": "a"}], "parameters": {"t": 0.05},
    },
    "passthrough": {"merge_method": "passthrough", "dtype": "float32", "models": [{"model": "a"}]},
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """A complete Llama, since mergekit asks for every tensor that it knows."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        out |= {f"{prefix}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        out |= {f"{prefix}.mlp.{p}_proj.weight": (2 * HIDDEN, HIDDEN) for p in ("gate", "up")}
        out[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, 2 * HIDDEN)
        out |= {f"{prefix}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    return out | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def inputs() -> dict[str, dict[str, NDArray[Any]]]:
    """The base and three fine-tunes of it, float32."""
    base = drawn(0, shapes())
    models = {"base": base}
    for seed, name in enumerate(("a", "b", "c"), start=1):
        delta = drawn(seed, shapes())
        models[name] = {k: base[k] + np.float32(0.1) * delta[k] for k in base}
    return models


def main(python: str) -> None:
    results: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, tensors in inputs().items():
            write_model(folder / name, typed(tensors), config=CONFIG)
        for name, recipe in RECIPES.items():
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
            command = Path(python).with_name("mergekit-yaml")
            out = folder / f"out-{name}"
            subprocess.run(
                [command, "recipe.yaml", out, "--no-copy-tokenizer", "--no-write-model-card"],
                cwd=folder,
                check=True,
            )
            merged: dict[str, NDArray[Any]] = {}
            for file in out.glob("*.safetensors"):
                merged |= load_file(file)
            results |= {f"{name}/{key}": value for key, value in merged.items()}
    save_file(results, RESULTS, {"recipes": json.dumps(RECIPES)})


if __name__ == "__main__":
    main(sys.argv[1])
