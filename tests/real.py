"""Tiny models as transformers makes and saves them, with random weights."""

from pathlib import Path
from typing import Any

# what lies beside the repository, and may not: a real Llama, and real tokenizers
REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
LLAMA = REAL / "stories260k"
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def saved(
    folder: Path, config: Any, *, seed: int = 0, loader: str = "AutoModelForCausalLM"
) -> Path:
    """The folder with a model of that config (a transformers config) and random weights."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, loader).from_config(config)
    for parameter in model.parameters():  # norms too, which would all be ones
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, loader: str = "AutoModelForCausalLM") -> Any:
    """The model in `folder`; every tensor of it must have been found there, and none be left over."""
    import transformers

    model, found = getattr(transformers, loader).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"], found
    assert not found["unexpected_keys"], found
    assert not found["mismatched_keys"], found
    return model.eval()


def generated(model: Any, length: int = 12) -> list[int]:
    """Greedy continuation of a fixed prompt."""
    import torch

    prompt = torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        out = model.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False)
    assert torch.isfinite(model(out).logits).all()
    return [int(token) for token in out[0, prompt.shape[1] :]]
