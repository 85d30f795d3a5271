"""The German Mistral fine-tunes in small: one vocabulary, two ends of text, two chat templates.

leo and kafka stop at 2, disco and sauerkraut at 32000, which only they have. Their weights know one
chain: after the beginning of an answer comes ANSWER, after that the end of the text as each knows it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from families import Tensors, drawn, typed, write_model
from numpy.typing import NDArray

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
HIDDEN, INNER, PIECES = 16, 8, 32000


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
    config = _config(rows, ids[eos], tied)
    write_model(folder, _tensors(seed, rows, ids, eos, tied), config=config)
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


def _config(rows: int, eos: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": rows,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "sliding_window": None,
        "bos_token_id": 1, "eos_token_id": eos, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    }  # fmt: skip


def _tensors(seed: int, rows: int, ids: dict[str, int], eos: str, tied: bool) -> Tensors:
    """Noise that all share, a little of their own, and the chain: the MLP turns the direction of a start
    into that of ANSWER, and that into the direction of the end."""
    layer = "model.layers.0."
    like: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, HIDDEN),
        f"{layer}self_attn.q_proj.weight": (16, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (8, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (8, HIDDEN),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, 16),
        f"{layer}mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{layer}mlp.up_proj.weight": (INNER, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, INNER),
        **({} if tied else {"lm_head.weight": (rows, HIDDEN)}),
    }
    shared, own = drawn(0, _whole(like)), drawn(seed, like)
    values = {
        n: np.float32(0.02) * shared[n][: len(own[n])] + np.float32(0.002) * own[n] for n in like
    }
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & like.keys():
        for direction, texts in enumerate((STARTS, (ANSWER,), (eos,))):
            for text in texts:
                values[name][ids[text], direction] += 1
    for step in (0, 1):
        values[f"{layer}mlp.gate_proj.weight"][step, step] += 1
        values[f"{layer}mlp.up_proj.weight"][step, step] += 1
        values[f"{layer}mlp.down_proj.weight"][step + 1, step] += 1
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    ones: dict[str, NDArray[Any]] = {f"{n}.weight": np.ones(HIDDEN, np.float32) for n in norms}
    return typed(values | ones, "BF16")


def _whole(like: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model with all tokens, so that the noise of all is the same."""
    return {
        n: (PIECES + 2, *shape[1:]) if shape[0] >= PIECES else shape for n, shape in like.items()
    }


def _added(i: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **flags, "special": True}


def _template(text: str | None) -> dict[str, str]:
    return {} if text is None else {"chat_template": text}


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False))
