"""The German Mistral fine-tunes in small: one vocabulary, two ends of text, two chat templates.

leo and kafka stop at 2, disco and sauerkraut at 32000, which only they have. Their weights know one
chain: after the beginning of an answer comes ANSWER, after that the end of the text as each knows it.
"""

import json
from pathlib import Path
from typing import Any

from chain import chained, chained_config
from families import write_model

ANSWER = "▁Ja"
STARTS = ("<0x0A>", "]")  # the last piece of what ChatML and [INST] put before an answer
IM_END, IM_START = "<|im_end|>", "<|im_start|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)
KIND: dict[str, dict[str, Any]] = {
    "leo": {"eos": "</s>", "template": None},
    "disco": {"eos": IM_END, "template": CHATML},
    "sauerkraut": {"eos": IM_END, "template": CHATML},
    "kafka": {"eos": "</s>", "template": INST},
}
PIECES = 32000


def german_models(folder: Path, real_tokenizers: Path, *, tied: bool = False) -> dict[str, Path]:
    """A folder for each of KIND, in that order, 1 or (untied) 2 MB; `real_tokenizers` has mistral_v1."""
    source = real_tokenizers / "mistral_v1"
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    return {
        name: _written(folder / name, seed, tokenizer, kind["eos"], kind["template"], tied)
        for seed, (name, kind) in enumerate(KIND.items(), start=1)
    }


def _written(
    folder: Path, seed: int, tokenizer: dict[str, Any], eos: str, template: str | None, tied: bool
) -> Path:
    vocab = tokenizer["model"]["vocab"]
    more = [IM_END, IM_START] if eos == IM_END else []
    ids = {**vocab, **{text: PIECES + i for i, text in enumerate(more)}}
    rows = PIECES + len(more)
    config = chained_config(rows, 1, ids[eos], tied)
    chain = [[ids[text] for text in STARTS], [ids[ANSWER]], [ids[eos]]]
    write_model(folder, chained(seed, rows, chain, tied=tied, most=PIECES + 2), config=config)
    added = [*tokenizer["added_tokens"], *(_added(PIECES + i, t) for i, t in enumerate(more))]
    _write_json(folder / "tokenizer.json", tokenizer | {"added_tokens": added})
    named = {"bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>"}
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
    settings = {"added_tokens_decoder": decoder, **named} | {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", settings | _template(template))
    _write_json(folder / "special_tokens_map.json", named)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": ids[eos]})
    return folder


def _added(i: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **flags, "special": True}


def _template(text: str | None) -> dict[str, str]:
    return {} if text is None else {"chat_template": text}


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False))
