"""A donor for a transplant: stories that a Llama tells, and a tokenizer and a model trained on them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BOS, EOS = "<s>", "</s>"
BATCH = 256  # stories sampled at once
LENGTH = 256  # tokens of a story, at most


@dataclass(frozen=True)
class Recipe:
    """What the donor is made of. `steps` of AdamW on batches of `rows` windows of `length` tokens."""

    stories: int = 4096  # for its tokenizer and its training
    pieces: int = 700
    hidden: int = 96
    layers: int = 3
    steps: int = 1500
    rows: int = 32
    length: int = 128
    rate: float = 3e-3
    seed: int = 0


def sampled_stories(folder: Path, count: int, seed: int) -> list[str]:
    """`count` stories told by the Llama in `folder`, each from its first token, at temperature 1."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = tokenizer.token_to_id(BOS) or 0
    told: list[str] = []
    while len(told) < count:
        prompt = torch.full((BATCH, 1), bos)
        with torch.inference_mode():
            ids = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=LENGTH, pad_token_id=bos,
            )  # fmt: skip
        told += tokenizer.decode_batch(ids.tolist(), skip_special_tokens=True)
    return [story.strip() for story in told[:count]]


def byte_level_tokenizer(stories: Sequence[str], pieces: int) -> Any:
    """A byte-level BPE of another kind than the Llama's (GPT-2's), its stories framed as the Llama's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        stories,
        trainers.BpeTrainer(
            vocab_size=pieces,
            special_tokens=[BOS, EOS],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def train_donor(stories: Sequence[str], folder: Path, recipe: Recipe) -> float:
    """The last loss per token (nats, of a hundred steps) of a Llama that is written to `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level_tokenizer(stories, recipe.pieces)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=recipe.hidden, num_hidden_layers=recipe.layers,
            intermediate_size=3 * recipe.hidden, num_attention_heads=recipe.hidden // 16,
            max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=tokenizer.token_to_id(EOS),
        )
    )  # fmt: skip
    eos = tokenizer.token_to_id(EOS)
    stream = torch.tensor([i for t in tokenizer.encode_batch(stories) for i in [*t.ids, eos]])
    loss = _train(model, stream, recipe)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return loss


def _train(model: nn.Module, stream: Tensor, recipe: Recipe) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, recipe.steps, pct_start=0.05
    )
    losses: list[float] = []
    for _ in range(recipe.steps):
        firsts = torch.randint(len(stream) - recipe.length, (recipe.rows,))
        windows = torch.stack([stream[i : i + recipe.length] for i in firsts])
        loss = model(windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-100:]) / len(losses[-100:])
