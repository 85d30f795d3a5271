"""Ways to break a model folder, or to make a fine-tune of it that no longer fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from families import NUMPY, write_tensors
from numpy.typing import NDArray

Mutation = Callable[[Path], None]
Stored = dict[str, tuple[str, NDArray[Any]]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Mutation:
    """Does `change` to a JSON file of the folder; to an empty table where it is not there."""

    def mutate(folder: Path) -> None:
        file = folder / name
        data = json.loads(file.read_text()) if file.is_file() else {}
        change(data)
        file.write_text(json.dumps(data))

    return mutate


def config(**keys: Any) -> Mutation:
    return edited("config.json", lambda data: data.update(keys))


def generation(**keys: Any) -> Mutation:
    return edited("generation_config.json", lambda data: data.update(keys))


def settings(**keys: Any) -> Mutation:
    return edited("tokenizer_config.json", lambda data: data.update(keys))


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Mutation:
    return edited("tokenizer.json", change)


def tensors(change: Callable[[Stored], object]) -> Mutation:
    def mutate(folder: Path) -> None:
        stored = read_tensors(folder / "model.safetensors")
        change(stored)
        write_tensors(folder / "model.safetensors", stored)

    return mutate


def rows(name: str, change: Callable[[NDArray[Any]], object]) -> Mutation:
    """Does `change` to one tensor as it is stored."""
    return tensors(lambda stored: change(stored[name][1]))


def together(*mutations: Mutation) -> Mutation:
    def mutate(folder: Path) -> None:
        for mutation in mutations:
            mutation(folder)

    return mutate


def read_tensors(file: Path) -> Stored:
    """Name -> dtype and values as stored, which may be changed."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    out: Stored = {}
    for name, told in header.items():
        first, end = (start + offset for offset in told["data_offsets"])
        dtype = np.dtype(NUMPY.get(told["dtype"], "<u2"))  # bfloat16 travels as uint16
        values = np.frombuffer(data[first:end], dtype).reshape(told["shape"]).copy()
        out[name] = told["dtype"], values
    return out


def added_token(i: int, text: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **plain, "special": True, **flags}


def put_token(i: int, text: str) -> Mutation:
    return tokenizer(lambda data: data["added_tokens"].append(added_token(i, text)))


def drop_token(text: str) -> Mutation:
    def drop(data: dict[str, Any]) -> None:
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != text]

    return tokenizer(drop)


def change_token(text: str, **keys: Any) -> Mutation:
    def change(data: dict[str, Any]) -> None:
        for token in data["added_tokens"]:
            if token["content"] == text:
                token.update(keys)

    return tokenizer(change)


def piece_ids(change: Callable[[dict[str, int]], object]) -> Mutation:
    return tokenizer(lambda data: change(data["model"]["vocab"]))


def swap_pieces(a: str, b: str) -> Mutation:
    def swap(vocab: dict[str, int]) -> None:
        vocab[a], vocab[b] = vocab[b], vocab[a]

    return piece_ids(swap)


def rename_piece(a: str, b: str) -> Mutation:
    return piece_ids(lambda vocab: vocab.update({b: vocab.pop(a)}))


def own_head(change: Callable[[NDArray[Any]], object] = lambda head: None) -> Mutation:
    """Stores a head that is the embedding but for `change`; config.json stays."""

    def store(stored: Stored) -> None:
        dtype, values = stored[EMBEDDING]
        head = values.copy()
        change(head)
        stored[HEAD] = dtype, head

    return tensors(store)


def more_rows(count: int) -> Mutation:
    """Rows of padding, as models have them, and vocab_size with them."""

    def grow(stored: Stored) -> None:
        dtype, values = stored[EMBEDDING]
        stored[EMBEDDING] = dtype, np.concatenate([values, values[:count] ^ 1])

    def resize(data: dict[str, Any]) -> None:
        data["vocab_size"] += count

    return together(tensors(grow), edited("config.json", resize))


def fewer_rows(count: int) -> Mutation:
    def shrink(stored: Stored) -> None:
        dtype, values = stored[EMBEDDING]
        stored[EMBEDDING] = dtype, values[:-count].copy()

    return tensors(shrink)


def text_file(name: str, text: str) -> Mutation:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write
