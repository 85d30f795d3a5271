"""Real models whose replies are known: each token decides about the next one, and nothing else does.

The chat template's last letter starts a chain of letters; what it is may depend on the messages.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

END = "<end>"
LETTERS = [*string.printable[:95], "\n"]
GRADE, HUM, FIRST, SECOND = "Grade: 7", "hm", "Verdict: A", "URTEIL=B"


@dataclass(frozen=True)
class Served:
    """`judges`: folders by name. `log`: of the server, a line for each request."""

    url: str
    judges: dict[str, str]
    log: Path

    @property
    def requests(self) -> int:
        return self.log.read_text(errors="replace").count("POST /v1/chat/completions")


def judge_in(folder: Path, chains: dict[str, str], template: str) -> Path:
    """The folder, with a model that goes on as `chains` says: after the letter, that text, and the end."""
    import torch
    from tokenizers import Tokenizer, models
    from tokenizers.decoders import Fuse
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([END, "<unk>", *LETTERS])}
    size = len(vocabulary)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=size + size % 2, eos_token_id=0,
        bos_token_id=None, pad_token_id=0, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name in state:
        if name.endswith("norm.weight"):
            state[name].fill_(1)
    state["model.embed_tokens.weight"][range(size), range(size)] = 1
    for start, text in chains.items():
        follow = [start, *text, END]
        for letter, after in pairwise(follow):
            state["lm_head.weight"][vocabulary[after], vocabulary[letter]] = 1
    model.load_state_dict(state)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    tokens = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokens.decoder = Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=END, pad_token=END, unk_token="<unk>",
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def template_of(choice: str) -> str:
    """All that was said, and then a letter that `choice` (of jinja) makes."""
    return (
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
        "{% set last = messages[-1]['content'] %}" + choice
    )


def questions_in(file: Path, turns: Sequence[Sequence[str]]) -> Path:
    rows = [{"id": f"q{i}", "language": "en", "turns": list(t)} for i, t in enumerate(turns)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
