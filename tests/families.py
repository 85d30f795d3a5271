"""Builders of tiny checkpoints: a base and fine-tunes of it, with the files that real ones have."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "BOOL": "?",
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 2,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
Tensors = Mapping[str, tuple[str, NDArray[Any]]]


def stored(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """`values` as safetensors stores them in `dtype`; bfloat16 by truncation, as uint16."""
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    return values.astype(np.dtype(NUMPY[dtype]))


def shapes(layers: int = 2, hidden: int = 8, vocabulary: int = 16) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Llama-like model."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        out[f"model.layers.{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        out[f"model.layers.{layer}.mlp.up_proj.weight"] = (2 * hidden, hidden)
        out[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
    out["model.norm.weight"] = (hidden,)
    out["lm_head.weight"] = (vocabulary, hidden)
    return out


def drawn(seed: int, like: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, NDArray[Any]]:
    """Random float32 tensors; the same for the same seed."""
    random = np.random.default_rng(seed)
    wanted = shapes() if like is None else like
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in wanted.items()}


def typed(
    values: Mapping[str, NDArray[Any]], dtype: str = "F32"
) -> dict[str, tuple[str, NDArray[Any]]]:
    return {name: (dtype, stored(value, dtype)) for name, value in values.items()}


def write_model(
    folder: Path,
    tensors: Tensors,
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    vocabulary: Sequence[str] | None = None,
) -> Path:
    """A model folder; `vocabulary` makes its tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    files = {}
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = names[i::shards]
        write_tensors(folder / file, {name: tensors[name] for name in part})
        files |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}, indent=2))
    if vocabulary is not None:
        vocab = {token: i for i, token in enumerate(vocabulary)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": vocabulary[0]}
        tokenizer = {"model": model, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_tensors(file: Path, tensors: Tensors) -> None:
    """A safetensors file, by a writer that is not ours; the library's takes no plain bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    write_raw(file, json.dumps(header).encode(), data)


def write_raw(file: Path, header: bytes, data: bytes = b"") -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def family(
    folder: Path,
    *names: str,
    like: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str = "F32",
    shards: int = 1,
) -> dict[str, Path]:
    """A base and fine-tunes of it (base plus small random task vectors), one folder each."""
    base = drawn(0, like)
    out = {"base": write_model(folder / "base", typed(base, dtype), shards=shards)}
    for seed, name in enumerate(names, start=1):
        delta = drawn(seed, like)
        tuned = {key: value + np.float32(0.1) * delta[key] for key, value in base.items()}
        out[name] = write_model(folder / name, typed(tuned, dtype), shards=shards)
    return out


def write_recipe(file: Path, **keys: Any) -> Path:
    """A recipe file; `models` may be given as {name: parameters}."""
    models = keys.pop("models")
    if isinstance(models, Mapping):
        models = [{"model": str(m)} | ({"parameters": p} if p else {}) for m, p in models.items()]
    file.write_text(yaml.safe_dump({"models": models} | keys, sort_keys=False))
    return file


def ties_recipe(file: Path, models: Mapping[str, Path], **keys: Any) -> Path:
    """TIES of all models but the base, by paths relative to the recipe."""
    own = {m.name: {"weight": 0.5, "density": 0.6} for name, m in models.items() if name != "base"}
    return write_recipe(
        file, models=own, base_model=models["base"].name, merge_method="ties", **keys
    )


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by relative path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
