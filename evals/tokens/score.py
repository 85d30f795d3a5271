"""The bits per byte that a model needs for stories: comparable whatever the tokenizer."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

BATCH = 32  # stories at once


def bits_per_byte(folder: Path, stories: Sequence[str], length: int = 512) -> float:
    """Bits per byte of the model in `folder` on `stories`, each after its tokenizer's first token, cut at
    `length` tokens."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loss, size = 0.0, 0
    for first in range(0, len(stories), BATCH):
        few = tokenizer.encode_batch(stories[first : first + BATCH])
        longest = min(length, max(len(t.ids) for t in few))
        ids = torch.zeros((len(few), longest), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for at, told in enumerate(few):
            cut = torch.tensor(told.ids[:longest])
            ids[at, : len(cut)] = cut
            labels[at, 1 : len(cut)] = cut[1:]
            end = told.offsets[len(cut) - 1][1]
            size += len(stories[first + at][:end].encode())
        with torch.inference_mode():
            logits = model(ids).logits[:, :-1]
        loss += float(torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ))  # fmt: skip
    return loss / math.log(2) / size
