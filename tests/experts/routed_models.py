"""Tiny bases of many architectures, adapters of them as PEFT trains and saves them, and mixtures of those."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from merge import run_recipe
from merge.sources.model import Model

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 64}
OF_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BASES: dict[str, Callable[..., Any]] = {
    "llama": lambda **s: LlamaForCausalLM(LlamaConfig(**SIZES | s, rope_theta=500.0)),
    "tied": lambda **s: LlamaForCausalLM(LlamaConfig(**SIZES | s, tie_word_embeddings=True)),
    "mistral": lambda **s: MistralForCausalLM(MistralConfig(**SIZES | s)),
    "phi3": lambda **s: Phi3ForCausalLM(Phi3Config(**SIZES | s)),
    "qwen2": lambda **s: Qwen2ForCausalLM(Qwen2Config(**SIZES | s)),
    "qwen3": lambda **s: Qwen3ForCausalLM(Qwen3Config(**SIZES | s, head_dim=4)),
    "bert": lambda **s: BertForSequenceClassification(BertConfig(**SIZES | s, num_labels=3)),
    "gpt2": lambda **s: GPT2LMHeadModel(GPT2Config(**OF_GPT2 | s, bos_token_id=1, eos_token_id=2)),
    "t5": lambda **s: T5ForConditionalGeneration(T5Config(**OF_T5 | s)),
    "mixtral": lambda **s: MixtralForCausalLM(MixtralConfig(**SIZES | s, num_local_experts=2)),
}
ATTENTION = {
    "phi3": ["qkv_proj", "o_proj"],
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
}
INNER = {"phi3": ["gate_up_proj"], "bert": ["intermediate.dense"], "gpt2": ["c_fc"], "t5": ["wi"]}
ALL = {
    "phi3": ["qkv_proj", "down_proj"],
    "bert": ["key", "dense"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["k", "wo"],
}


def drawn(model: Any, seed: int, size: float = 0.2, *, trained: bool = False) -> None:
    """Moves all parameters, or those that are trained, by random numbers."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not trained:
                parameter.add_(torch.randn(parameter.shape, generator=random) * size)


def base(kind: str, folder: Path, seed: int = 3, **sizes: int) -> Path:
    model = BASES[kind](**sizes)
    drawn(model, seed)
    model.save_pretrained(folder)
    return folder


def of(folder: Path, **options: Any) -> Any:
    """The model in `folder`, by the class for automatic loading that suits it."""
    config = json.loads((folder / "config.json").read_text())
    kind = str(config["architectures"][0])
    suffix = "SequenceClassification" if kind.endswith("Classification") else "CausalLM"
    suffix = "Seq2SeqLM" if "T5" in kind else suffix
    loader = getattr(transformers, f"AutoModelFor{suffix}")
    model, found = loader.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def routed(folder: Path, **options: Any) -> Any:
    """The mixture in `folder`, by the code that lies there."""
    return of(folder, trust_remote_code=True, **options)


def adapter(model: Path, folder: Path, seed: int, **config: Any) -> Path:
    with warnings.catch_warnings(action="ignore"):
        peft = get_peft_model(of(model), LoraConfig(**{"r": 3, "lora_alpha": 5, **config}))
        drawn(peft, seed, 0.3, trained=True)
        peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def three(kind: str, model: Path, folder: Path) -> dict[str, Path]:
    """Adapters of other ranks, scales and layers each: plain, rank-stabilised, and with DoRA."""
    attention = ATTENTION.get(kind, ["q_proj", "v_proj"])
    inner = INNER.get(kind, ["gate_proj", "down_proj"])
    every = ALL.get(kind, ["q_proj", "o_proj", "up_proj", "down_proj"])
    stable: dict[str, Any] = {"use_rslora": True, "r": 2}
    stable |= {"rank_pattern": {inner[0]: 5}, "alpha_pattern": {attention[0]: 3}}
    return {
        "plain": adapter(model, folder / "plain", 5, target_modules=attention, r=4),
        "stable": adapter(
            model, folder / "stable", 6, target_modules=attention[:1] + inner, **stable
        ),
        "dora": adapter(model, folder / "dora", 7, target_modules=every, use_dora=True),
    }


@contextmanager
def in_one_process() -> Iterator[None]:
    """Within it, transformers is asked in this process, which has it already, and what run_recipe wrote is
    not loaded to see whether it can be: `of` does that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge.experts.lora.classes.asked", _asked_here)
        patch.setattr("merge.experts.lora.classes.kept", lambda key: None)
        patch.setattr("merge.experts.lora.classes.keep", lambda key, told: None)
        patch.setattr("merge.pipeline.check_loads", lambda folder, **_: {}, raising=False)
        yield


def _asked_here(ask: Callable[[Model], Any], model: Model) -> Any:
    return json.loads(json.dumps(vars(ask(model)), default=sorted))


def recipe(folder: Path, model: Path, adapters: Mapping[str, Path], **sections: Any) -> Path:
    """A recipe that routes `adapters`, by their names; fixed shares unless `router` says otherwise."""
    experts = [{"adapter": str(path), "name": name} for name, path in adapters.items()]
    shares = {"mode": "weights", "weights": [1.0] + [0.0] * (len(experts) - 1)}
    told = {"base_model": str(model), "experts": experts, "router": shares} | sections
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(told, sort_keys=False))
    return file


def mixture(
    folder: Path,
    model: Path,
    adapters: Mapping[str, Path],
    *,
    name: str = "mixture",
    **sections: Any,
) -> Path:
    """The folder of a mixture that run_recipe makes."""
    file = recipe(folder, model, adapters, **sections)
    return run_recipe(file, folder / name, offline=True, load=False).folder


def share(model: Any, shares: Sequence[float]) -> None:
    """Gives a mixture with fixed shares others."""
    bias = torch.tensor(shares).log().clamp_min(-1e4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter.copy_(bias)


def peft(model: Path, folder: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(of(model), folder).eval()


TEXT = torch.tensor([[1, 5, 9, 13, 21, 34], [1, 7, 3, 39, 8, 11]])


def logits(model: Any, text: Tensor = TEXT, **options: Any) -> Tensor:
    if getattr(model.config, "is_encoder_decoder", False):
        options["decoder_input_ids"] = text[:, :4]
    with torch.no_grad():
        found: Tensor = model(text, **options).logits
    return found


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest value (at least 1)."""
    return float((a - b).abs().max() / max(1.0, float(b.abs().max())))
