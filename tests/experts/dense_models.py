"""Tiny dense models of every architecture that becomes a stock mixture, and recipes that make one of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from real import SMALL, saved
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from merge.pipeline import Result, run_recipe

LAYERS = {**SMALL, "num_hidden_layers": 2}
LATENT = {key: value for key, value in LAYERS.items() if key != "head_dim"} | {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**LAYERS, rope_theta=5000.0),
    "mistral": lambda: MistralConfig(**LAYERS, sliding_window=5),
    "wide-mistral": lambda: MistralConfig(**LAYERS, sliding_window=None),
    "phi3": lambda: Phi3Config(**LAYERS),
    "part-phi3": lambda: Phi3Config(**LAYERS, partial_rotary_factor=0.5),
    "long-phi3": lambda: Phi3Config(
        **LAYERS,
        original_max_position_embeddings=8,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [2.0, 3.0]},
    ),
    "qwen2": lambda: Qwen2Config(**LAYERS),
    "qwen3": lambda: Qwen3Config(**LAYERS | {"head_dim": 6}),
    "deepseek_v2": lambda: DeepseekV2Config(**LATENT),
    "deepseek_v3": lambda: DeepseekV3Config(**LATENT, num_nextn_predict_layers=0),
}


def dense(folder: Path, kind: str, *names: str, **changes: Any) -> Path:
    """`folder` with a model of that kind under each of `names`, of other weights each; `changes` of the
    config."""
    for seed, name in enumerate(names):
        config = CONFIGS[kind]()
        for key, value in changes.items():
            setattr(config, key, value)
        saved(folder / name, config, seed=seed)
    return folder


def written(folder: Path, experts: Sequence[str | Mapping[str, Any]], **keys: Any) -> Path:
    """A recipe beside the models: `base` with `experts`, names or entries."""
    entries = [{"source_model": e} if isinstance(e, str) else dict(e) for e in experts]
    file = folder / "mixture.yaml"
    file.write_text(yaml.safe_dump({"base_model": "base", "experts": entries} | keys))
    return file


def mixed(
    folder: Path, experts: Sequence[str | Mapping[str, Any]], out: str = "out", **keys: Any
) -> Result:
    """The mixture that such a recipe makes; routers are random unless it says otherwise."""
    router = {"router": {"mode": "random", **keys.pop("router", {})}}
    return run_recipe(written(folder, experts, **router | keys), folder / out, load=False)


def logits(model: Any) -> torch.Tensor:
    """[2, 12, vocabulary] of fixed tokens."""
    tokens = torch.arange(24).reshape(2, 12) * 7 % 60 + 3
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found
