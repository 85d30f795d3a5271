"""Tiny stock MoE with random weights and the tokenizer of the tiny family, and texts for them."""

import json
import shutil
from pathlib import Path
from typing import Any

from dense_models import dense, mixed
from peft_models import saved
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from merge.shipped import shipped

SIZE = {
    "vocab_size": 69,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixtral(folder: Path, *, experts: int = 3, top_k: int = 2) -> Path:
    config = MixtralConfig(**SIZE, num_local_experts=experts, num_experts_per_tok=top_k)
    return _with_tokenizer(saved(MixtralForCausalLM(config), folder))


def qwen3(folder: Path, *, top_k: int = 2, normalise: bool = True) -> Path:
    config = Qwen3MoeConfig(
        **SIZE,
        moe_intermediate_size=24,
        num_experts=3,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalise,
    )
    return _with_tokenizer(saved(Qwen3MoeForCausalLM(config), folder))


def stock(kind: str, folder: Path) -> Path:
    """A mixture of three random models of the kind that becomes it, all its routers random."""
    told = {
        "glm4_moe": ("llama", {"architecture": "deepseek"}),
        "qwen2_moe": ("qwen2", {}),
        "deepseek_v2": ("deepseek_v2", {"router": {"normalise": False}}),
        "deepseek_v3": ("deepseek_v3", {}),
    }
    dense_kind, keys = told[kind]
    dense(folder, dense_kind, "base", "a", "b", "c", vocab_size=SIZE["vocab_size"])
    return _with_tokenizer(mixed(folder, ["a", "b", "c"], **keys).folder)


def _with_tokenizer(folder: Path) -> Path:
    for file in shipped("evals/zoo/base").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def texts(file: Path, count: int = 40) -> Path:
    """Prompts and completions, all different."""
    lines = [{"prompt": f"sort {i}=", "completion": f"{i * 7 % 100}"} for i in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def outputs(folder: Path) -> dict[str, str]:
    """The digest of each tensor, by the provenance."""
    told: dict[str, Any] = json.loads((folder / "mergetool.json").read_text())["outputs"]
    return {name: entry["digest"] for name, entry in told.items()}
