"""A tiny Mistral whose weights know one chain: after some tokens comes an answer, after that an end."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from families import Tensors, drawn, typed
from numpy.typing import NDArray

HIDDEN, INNER = 16, 8
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def chained_config(rows: int, bos: int, eos: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": rows,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "sliding_window": None,
        "bos_token_id": bos, "eos_token_id": eos, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    }  # fmt: skip


def chained(
    seed: int, rows: int, chain: Sequence[Sequence[int]], *, tied: bool, most: int | None = None
) -> Tensors:
    """Noise that all share, a little of their own, and the chain: the MLP turns the direction of a start
    into that of the answer, and that into the direction of the end.

    chain: ids of starts, of answers, of ends. most: rows of the largest model that shall share the noise.
    """
    layer = "model.layers.0."
    like: dict[str, tuple[int, ...]] = {
        EMBED: (rows, HIDDEN),
        f"{layer}self_attn.q_proj.weight": (16, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (8, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (8, HIDDEN),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, 16),
        f"{layer}mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{layer}mlp.up_proj.weight": (INNER, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, INNER),
        **({} if tied else {HEAD: (rows, HIDDEN)}),
    }
    whole = like | dict.fromkeys({EMBED, HEAD} & like.keys(), (most or rows, HIDDEN))
    shared, own = drawn(0, whole), drawn(seed, like)
    values = {
        n: np.float32(0.02) * shared[n][: len(own[n])] + np.float32(0.002) * own[n] for n in like
    }
    for name in {EMBED, HEAD} & like.keys():
        for direction, ids in enumerate(chain):
            values[name][[*ids], direction] += 1
    for step in range(len(chain) - 1):
        values[f"{layer}mlp.gate_proj.weight"][step, step] += 1
        values[f"{layer}mlp.up_proj.weight"][step, step] += 1
        values[f"{layer}mlp.down_proj.weight"][step + 1, step] += 1
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    ones: dict[str, NDArray[Any]] = {f"{n}.weight": np.ones(HIDDEN, np.float32) for n in norms}
    return typed(values | ones, "BF16")
