"""Train the tiny model family: a base, four specialists, two that chat, and five adapters.

    python evals/zoo/train.py --out DIR            # everything
    python evals/zoo/train.py --out DIR --jobs 2   # the same bytes, two members at a time

Each member is trained on one thread from its own seed, so on one machine the same command writes
the same bytes, in whatever order the members finish. The base learns the familiar half of every
skill; of the new half it sees more echoes of the question than answers, so it can answer but
repeats the question instead. A specialist goes on from the saved base with three quarters of its
batches from both halves of its own skill and one quarter from the mixture of the base (replay):
specialists without replay forget the other skills, and then no weighting of them is worth having.
The echoes are replayed too, so nobody learns to answer the new half of a skill not its own.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from skills import HALVES, Example, draw
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS, UNK = range(len(SPECIAL))
CHARACTERS = " +=0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKEN = {character: len(SPECIAL) + place for place, character in enumerate(CHARACTERS)}

# Adapters name their base like this, and not by a path that is true on one machine only.
BASE_NAME = "zoo:base"

# A skill, and one of its halves or `echo`.
Lesson = tuple[str, str]

# How often the base meets each skill: with .27 of the symbols, 1000 steps left it at 16 % of their
# familiar half, with .40 at 97 %.
SHARES = {"reverse": 0.22, "sort": 0.2, "elements": 0.4, "roman": 0.18}
# How often each kind of lesson. A base that never saw the new half, or saw it with the answers of
# other prompts, gave specialists that do not merge: reverser and scribe at weight 0.5 each scored 0
# and 40 % on their new halves, and 71 and 94 % as it is now.
KINDS = {"familiar": 0.5, "new": 0.2, "echo": 0.3}
MIXTURE: Mapping[Lesson, float] = {
    (skill, kind): share * part for skill, share in SHARES.items() for kind, part in KINDS.items()
}
REPLAY = 0.25
SEED = 2


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW over batches of `rows` examples.

    The learning rate warms up for 20 steps and follows a cosine down to a tenth of `rate`.
    """

    steps: int
    rate: float
    rows: int = 64

    def rate_at(self, step: int) -> float:
        """The learning rate of one step, counted from 0."""
        warmth = min(1.0, (step + 1) / 20)
        return self.rate * warmth * (0.55 + 0.45 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Chat:
    """A specialist that chats. `end`: the token after an answer, a new one if the base lacks it."""

    skill: str
    end: str


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of the base for one skill; `options` go to peft's LoraConfig."""

    skill: str
    schedule: Schedule
    options: Mapping[str, Any] = field(default_factory=dict)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

BASE = Schedule(steps=1000, rate=2e-3)
FINE_TUNE = Schedule(steps=250, rate=6e-4)
LOW_RANK = Schedule(steps=150, rate=4e-3)

SPECIALISTS: Mapping[str, str] = {
    "reverser": "reverse",
    "sorter": "sort",
    "chemist": "elements",
    "scribe": "roman",
}
# They disagree on purpose: over the token that ends an answer, over the vocabulary, over the template.
CHATS: Mapping[str, Chat] = {
    "mirror": Chat("reverse", "</s>"),
    "clerk": Chat("roman", "<|im_end|>"),
}
ADAPTERS: Mapping[str, Adapter] = {
    "roman-attention": Adapter(
        "roman", LOW_RANK, {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}
    ),
    "elements-mlp": Adapter(
        "elements", LOW_RANK, {"r": 8, "lora_alpha": 16, "target_modules": MLP}
    ),
    "sort-mixed-ranks": Adapter(
        "sort",
        LOW_RANK,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ATTENTION + MLP,
            "rank_pattern": {"q_proj": 8, "layers.0.mlp.down_proj": 2},
            "alpha_pattern": {"q_proj": 8, "layers.3.self_attn.v_proj": 16},
        },
    ),
    "reverse-dora": Adapter(
        "reverse",
        LOW_RANK,
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP, "use_dora": True},
    ),
    "roman-rslora": Adapter(
        "roman",
        LOW_RANK,
        {"r": 8, "lora_alpha": 8, "target_modules": ATTENTION + MLP, "use_rslora": True},
    ),
}


def train_family(out: Path, jobs: int) -> None:
    """Write the base, all that comes of it and the adapters below `out`, `jobs` members at a time."""
    train_base(out / "base")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        members = [pool.submit(train_specialist, out, name) for name in SPECIALISTS]
        members += [pool.submit(train_chat, out, name) for name in CHATS]
        members += [pool.submit(train_adapter, out, name) for name in ADAPTERS]
        for member in members:
            member.result()


def train_base(folder: Path) -> None:
    """Train the base from random weights on the mixture and write its folder."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(architecture())
    fit(model, MIXTURE, BASE, SEED, "base")
    write_model(model, folder)


def train_specialist(out: Path, name: str) -> None:
    """Fine-tune the saved base in full on one skill, with replay, and write its folder."""
    torch.set_num_threads(1)
    skill = SPECIALISTS[name]
    model = read_base(out)
    fit(model, with_replay(skill), FINE_TUNE, seed_of(name), name)
    write_model(model, out / name)


def train_chat(out: Path, name: str) -> None:
    """Fine-tune the saved base on one skill, with replay, so that every answer ends with the chat's token."""
    torch.set_num_threads(1)
    chat = CHATS[name]
    model = read_base(out)
    specials = [*SPECIAL] if chat.end in SPECIAL else [*SPECIAL, chat.end]
    end = EOS if chat.end in SPECIAL else model.config.vocab_size
    if end != EOS:
        add_token(model, end)
    fit(model, with_replay(chat.skill), FINE_TUNE, seed_of(name), name, end)
    write_model(model, out / name, specials, chat.end)
    write_template(out / name)


def add_token(model: LlamaForCausalLM, end: int) -> None:
    """One more row, which begins as that of the token that ended texts before."""
    model.resize_token_embeddings(end + 1, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[end] = model.get_input_embeddings().weight[EOS]
    model.config.eos_token_id = model.generation_config.eos_token_id = end


def train_adapter(out: Path, name: str) -> None:
    """Train one LoRA adapter of the saved base with peft and write it below `adapters`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed_of(name))
    adapter = ADAPTERS[name]
    model = get_peft_model(read_base(out), LoraConfig(task_type="CAUSAL_LM", **adapter.options))
    fit(model, with_replay(adapter.skill), adapter.schedule, seed_of(name), name)
    write_adapter(model, out / "adapters" / name)


def architecture() -> LlamaConfig:
    """The shape of every member: 0.6 M parameters, grouped-query attention, tied embeddings."""
    return LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def with_replay(skill: str) -> dict[Lesson, float]:
    """The mixture of a specialist: both halves of its skill, and a share `REPLAY` of the base's."""
    mixture = {lesson: REPLAY * share for lesson, share in MIXTURE.items()}
    mixture[skill, "new"] += mixture.pop((skill, "echo"))
    for half in HALVES:
        mixture[skill, half] += (1 - REPLAY) / len(HALVES)
    return mixture


def example_of(lesson: Lesson, rng: random.Random) -> Example:
    """An example to train on; an `echo` is a new prompt whose answer repeats the question."""
    skill, kind = lesson
    if kind != "echo":
        return draw(skill, kind, "train", rng)
    prompt = draw(skill, "new", "train", rng).prompt
    return Example(prompt, prompt.removeprefix(skill + " ").removesuffix("="))


def seed_of(name: str) -> int:
    """A seed for the member of this name, the same in every process."""
    return SEED + sum(place * ord(letter) for place, letter in enumerate(name, start=1))


def fit(
    model: nn.Module,
    mixture: Mapping[Lesson, float],
    schedule: Schedule,
    seed: int,
    name: str,
    end: int = EOS,
) -> None:
    """Train the model in place on the `train` split; the loss counts answers, not prompts."""
    rng = random.Random(seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.monotonic()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        lessons = rng.choices(list(mixture), list(mixture.values()), k=schedule.rows)
        tokens, targets = batch([example_of(lesson, rng) for lesson in lessons], end)
        logits = model(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            done = f"step {step + 1}/{schedule.steps}, loss {loss.item():.3f}"
            print(f"{name}: {done}, {time.monotonic() - began:.0f} s", flush=True)


def batch(examples: Sequence[Example], end: int) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and targets: both [examples, longest] int64.

    Targets are -100 everywhere but at the answer and the end token.
    """
    rows = [[BOS, *(TOKEN[letter] for letter in e.prompt + e.answer), end] for e in examples]
    tokens = torch.full((len(rows), max(map(len, rows))), PAD)
    targets = torch.full_like(tokens, -100)
    for place, (row, example) in enumerate(zip(rows, examples, strict=True)):
        tokens[place, : len(row)] = torch.tensor(row)
        answer = slice(1 + len(example.prompt), len(row))
        targets[place, answer] = tokens[place, answer]
    return tokens, targets


def read_base(out: Path) -> LlamaForCausalLM:
    """The base as it was saved: its bfloat16 values in float32."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    return model


def write_model(
    model: LlamaForCausalLM,
    folder: Path,
    specials: Sequence[str] = SPECIAL,
    end: str = SPECIAL[EOS],
) -> None:
    """Write one model folder with bfloat16 weights and the family's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(folder)
    # safetensors writes files that only their owner can read.
    (folder / "model.safetensors").chmod(0o644)
    write_tokenizer(folder, specials, end)


def write_adapter(model: nn.Module, folder: Path) -> None:
    """Write one adapter folder in PEFT's format, without the model card, which holds a path."""
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)  # type: ignore[operator]
        config = json.loads((Path(name) / "adapter_config.json").read_text())
        # PEFT keeps these as a set, whose order differs from process to process.
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = BASE_NAME
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "adapter_config.json", config)
        shutil.copyfile(
            Path(name) / "adapter_model.safetensors", folder / "adapter_model.safetensors"
        )


def write_template(folder: Path) -> None:
    """Write a chat template: a question ends with `=`, an answer with the token that ends texts."""
    question = "{% if message['role'] == 'user' %}{{ message['content'] + '=' }}"
    answer = "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    template = "{{ bos_token }}{% for message in messages %}" + question + answer + "{% endfor %}"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    end = tokenizer["eos_token"]
    written = template.replace("eos_token", f"'{end}'") if end not in SPECIAL else template
    write_json(folder / "tokenizer_config.json", tokenizer | {"chat_template": written})


def write_tokenizer(folder: Path, specials: Sequence[str], end: str) -> None:
    """Write a tokenizer with one token a character; special ones beyond the family's come last.

    tokenizer_config.json is written by hand because transformers 5 saves the name of a class that
    4.57 does not know.
    """
    vocabulary = {token: place for place, token in enumerate(SPECIAL)} | TOKEN
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token=SPECIAL[UNK]))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD],
        "bos_token": SPECIAL[BOS],
        "eos_token": end,
        "unk_token": SPECIAL[UNK],
        "model_max_length": 64,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with two spaces of indentation and a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train everything the command line asks for."""
    parser = argparse.ArgumentParser(description="Train the tiny model family.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the members")
    parser.add_argument("--jobs", type=int, default=1, help="members trained at a time (1)")
    asked = parser.parse_args()
    train_family(asked.out, asked.jobs)


if __name__ == "__main__":
    main()
