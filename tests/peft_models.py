"""Tiny models of many architectures, adapters that PEFT makes of them, and what it merges."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WIDE = {
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
GPT2 = GPT2Config(
    n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8, bos_token_id=1, eos_token_id=2
)
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**WIDE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**WIDE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
}


def saved(model: Any, folder: Path) -> Path:
    """A model folder as transformers writes it, with every tensor drawn anew."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    model.save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An adapter as PEFT writes it: every trainable value moved away from where it starts."""
    model = loaded(base)
    random = torch.Generator().manual_seed(4)
    with warnings.catch_warnings(action="ignore"):
        peft = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, **config}))
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=random) / 2)
        peft.to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    config = json.loads((folder / "config.json").read_text())
    bert = config["model_type"] == "bert"
    kind = AutoModelForSequenceClassification if bert else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype)


def merged_by_peft(base: Path, *adapters: Path, into: Path) -> dict[str, NDArray[Any]]:
    """What PEFT merges, computed and stored in float64."""
    model = loaded(base, torch.float64)
    with warnings.catch_warnings(action="ignore"):
        for folder in adapters:
            model = PeftModel.from_pretrained(model, folder).double().merge_and_unload()
    model.save_pretrained(into)
    return dict(load_file(into / "model.safetensors"))
