"""Writes documented-mergekit-0.1.5.safetensors: what mergekit makes of the recipes in its documentation.

    python tests/oracle/documented.py PYTHON_WITH_MERGEKIT

The recipes are those of its `examples/` and `docs/multimerge.md`, with other models: tiny ones of as many
layers (40; GPT-2: 12). mergekit computes in float32 here, whatever dtype a recipe names.
"""

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

RESULTS = Path(__file__).with_name("documented-mergekit-0.1.5.safetensors")
HIDDEN, LAYERS, VOCABULARY = 8, 40, 16
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": HIDDEN, "n_layer": 12,
    "n_head": 2, "n_positions": 16, "n_ctx": 16, "vocab_size": VOCABULARY, "hidden_act": None,
}  # fmt: skip
Recipe = dict[str, Any]


def _layers(model: str, first: int, end: int) -> Recipe:
    return {"model": model, "layer_range": [first, end]}


def _own(model: str, **parameters: Any) -> Recipe:
    return {"model": model, "parameters": parameters}


SLERP: Recipe = {
    "slices": [{"sources": [_layers("orca", 0, 40), _layers("platypus", 0, 40)]}],
    "merge_method": "slerp", "base_model": "orca", "dtype": "float16",
    "parameters": {
        "t": [
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
            {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
            {"value": 0.5},
        ]
    },
}  # fmt: skip
MATH = _own("math", density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}])
TIES: Recipe = {"merge_method": "ties", "base_model": "llama", "dtype": "float16"}
NORMALIZED = {"normalize": True, "int8_mask": True}
# name -> documents; each may merge the results of those before it
RECIPES: dict[str, list[Recipe]] = {
    "linear": [{
        "models": [_own("orca", weight=1.0), _own("math", weight=0.3), _own("platypus", weight=0.5)],
        "merge_method": "linear", "dtype": "float16",
    }],
    "gradient-slerp": [SLERP],
    "ties": [TIES | {
        "models": [
            _own("orca", density=[1, 0.7, 0.1], weight=1.0),
            _own("platypus", density=0.5, weight=[0, 0.3, 0.7, 1]),
            MATH,
        ],
        "parameters": NORMALIZED,
    }],
    "bio-merge": [TIES | {
        "models": [_own("orca", density=0.5, weight=0.5), _own("platypus", density=0.5, weight=0.5)],
        "parameters": {"normalize": False, "int8_mask": True},
    }],
    "orcamini-platy-44layer": [{
        "slices": [{"sources": [_layers("orca", 0, 24)]}, {"sources": [_layers("platypus", 20, 40)]}],
        "merge_method": "passthrough", "dtype": "float16",
    }],
    "arcee_fusion": [{
        "models": [{"model": "orca"}, {"model": "platypus"}], "merge_method": "arcee_fusion",
        "base_model": "orca", "dtype": "bfloat16",
    }],
    "gpt2-small": [{
        "slices": [{"sources": [_layers("gpt2", 0, 8)]}], "merge_method": "passthrough",
        "dtype": "float16",
    }],
    "mega": [
        SLERP | {"out_path": "./models/gradient-slerp"},
        TIES | {
            "models": [_own("./models/gradient-slerp", density=[1, 0.7, 0.1], weight=1.0), MATH],
            "parameters": NORMALIZED, "out_path": "./models/gradient-slerp-ties",
        },
    ],
    # its last document, a dare_ties, is random in mergekit
    "multimerge": [
        {
            "name": "first-merge", "merge_method": "linear",
            "models": [{"model": "orca"}, {"model": "platypus"}], "parameters": {"weight": 0.5},
        },
        {
            "name": "second-merge", "merge_method": "slerp", "base_model": "first-merge",
            "models": [{"model": "math"}], "parameters": {"t": 0.5},
        },
    ],
}  # fmt: skip


def llama_shapes() -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        out |= {f"{prefix}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        out |= {f"{prefix}.mlp.{p}_proj.weight": (2 * HIDDEN, HIDDEN) for p in ("gate", "up")}
        out[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, 2 * HIDDEN)
        out |= {f"{prefix}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    return out | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    """As the model on the hub: without prefix, tied."""
    out: dict[str, tuple[int, ...]] = {
        "wte.weight": (VOCABULARY, HIDDEN),
        "wpe.weight": (16, HIDDEN),
    }
    parts = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4, "mlp.c_proj": 1}
    for layer in range(12):
        for part, times in parts.items():
            rows = 4 * HIDDEN if part == "mlp.c_proj" else HIDDEN
            out[f"h.{layer}.{part}.weight"] = (rows, times * HIDDEN)
            out[f"h.{layer}.{part}.bias"] = (times * HIDDEN,)
        for norm in ("ln_1", "ln_2"):
            out |= {f"h.{layer}.{norm}.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
    return out | {"ln_f.weight": (HIDDEN,), "ln_f.bias": (HIDDEN,)}


def write_inputs(folder: Path) -> None:
    """llama, three fine-tunes of it, and gpt2, float32."""
    base = drawn(0, llama_shapes())
    write_model(folder / "llama", typed(base), config=CONFIG)
    for seed, name in enumerate(("orca", "platypus", "math"), start=1):
        delta = drawn(seed, llama_shapes())
        tuned = {key: base[key] + np.float32(0.1) * delta[key] for key in base}
        write_model(folder / name, typed(tuned), config=CONFIG)
    write_model(folder / "gpt2", typed(drawn(9, gpt2_shapes())), config=GPT2)


def main(python: str) -> None:
    results: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(folder)
        for name, documents in RECIPES.items():
            for document in documents:
                out = folder / (document.get("name") or document.get("out_path") or f"out-{name}")
                kept = {k: v for k, v in document.items() if k not in ("name", "out_path")}
                kept |= {"dtype": "float32"}
                if document is not documents[-1]:  # what lies between is rounded as the recipe says
                    kept["out_dtype"] = document.get("dtype", "float32")
                (folder / "r.yaml").write_text(yaml.safe_dump(kept))
                flags = ["--no-copy-tokenizer", "--no-write-model-card"]
                command = [Path(python).with_name("mergekit-yaml"), "r.yaml", out, *flags]
                subprocess.run(command, cwd=folder, check=True)
            for file in out.glob("*.safetensors"):
                results |= {f"{name}/{key}": value for key, value in load_file(file).items()}
    save_file(results, RESULTS)


if __name__ == "__main__":
    main(sys.argv[1])
