"""Synthetic Llama checkpoints: shapes, config, tokenizer, and weight files without data."""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

BYTES = 2  # per value: everything is bfloat16


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model, in values; `shards` is its number of weight files."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    shards: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the file."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            found |= {f"model.layers.{i}.{name}.weight": s for name, s in self._layer().items()}
        found["model.norm.weight"] = (self.hidden,)
        return found if self.tied else found | {"lm_head.weight": (self.vocab, self.hidden)}

    def _layer(self) -> dict[str, tuple[int, ...]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def values(self) -> int:
        return sum(prod(shape) for shape in self.tensors().values())

    @property
    def nbytes(self) -> int:
        return BYTES * self.values


SHAPES: Mapping[str, Shape] = {
    "1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, True, 2),  # Llama-3.2-1B
    "small": Shape(512, 8, 8, 2, 64, 2048, 32064, True, 2),
    "70b": Shape(8192, 80, 64, 8, 128, 28672, 128256, False, 30),  # Llama-3.1-70B
    "wide": Shape(8192, 1, 1, 1, 64, 64, 128256, True, 1),  # one tensor of 2.1 GB, hardly a rest
    "wide-small": Shape(2048, 1, 1, 1, 64, 64, 32064, True, 1),
    "tokens": Shape(16384, 1, 1, 1, 64, 64, 262144, True, 1),  # an embedding of 8.6 GB
    "tokens-small": Shape(2048, 1, 1, 1, 64, 64, 32768, True, 1),
}


@dataclass(frozen=True)
class Place:
    """Where the values of a tensor lie: file name and byte offset."""

    name: str
    file: str
    offset: int
    values: int


def write_model(folder: Path, shape: Shape) -> None:
    """A whole checkpoint in a new `folder` whose weights are zeros that take no room on disk."""
    folder.mkdir(parents=True)
    files = _shards(shape)
    for file, tensors in files.items():
        header = _header(tensors)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(BYTES * prod(s) for s in tensors.values()))
    index = {
        "metadata": {"total_size": shape.nbytes},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    if len(files) > 1:
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())


def give_tokens(folder: Path, shape: Shape, own: Sequence[str]) -> None:
    """A checkpoint's tokenizer.json anew, with a token for every row; `own` are the last of them."""
    tokenizer = _tokenizer()
    words = range(len(tokenizer["added_tokens"]), shape.vocab - len(own))
    tokenizer["model"]["vocab"] |= {f"t{i}": i for i in words}
    first = shape.vocab - len(own)
    tokenizer["added_tokens"] += [_added(i, text) for i, text in enumerate(own, first)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))  # on one line, in little memory


def places(shape: Shape) -> Iterator[Place]:
    """Every tensor of a checkpoint that `write_model` makes."""
    for file, tensors in _shards(shape).items():
        offset = len(_header(tensors))
        for name, size in tensors.items():
            yield Place(name, file, offset, prod(size))
            offset += BYTES * prod(size)


def _shards(shape: Shape) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> its tensors; a file is closed when it has its share of the bytes."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    done = 0
    for name, size in shape.tensors().items():
        if done >= shape.nbytes * len(groups) / shape.shards:
            groups.append({})
        groups[-1][name] = size
        done += BYTES * prod(size)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def _header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + BYTES * prod(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _config(shape: Shape) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _tokenizer() -> dict[str, Any]:
    """The smallest tokenizer that the tokenizers library accepts: three special tokens."""
    tokens = ["<unk>", "<s>", "</s>"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, token) for i, token in enumerate(tokens)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "unk_token": "<unk>",
        },
    }


def _added(i: int, token: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": token, "special": True} | plain


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 131072,
    }


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
