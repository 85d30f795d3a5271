"""Tokenizers with other ids or more tokens, and tiny models with a row for each id."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain import EMBED, HEAD, chained, chained_config
from families import drawn, typed, write_model
from methods.cases import read_values
from mutations import added_token
from numpy.typing import NDArray

from merge.sources.model import read_json

Table = dict[str, Any]  # of a tokenizer.json
INNER = "model.layers.0.mlp.up_proj.weight"


def ids_of(table: Mapping[str, Any]) -> dict[str, int]:
    return {**table["model"]["vocab"], **{t["content"]: t["id"] for t in table["added_tokens"]}}


def renumbered(table: Table, new: Callable[[int], int]) -> Table:
    """With other ids, also where the post-processor has them."""
    vocab = {text: new(i) for text, i in table["model"]["vocab"].items()}
    added = [token | {"id": new(token["id"])} for token in table["added_tokens"]]
    processor = copy.deepcopy(table.get("post_processor"))
    for part in processors(processor):
        for token in (part.get("special_tokens") or {}).values():
            token["ids"] = [new(i) for i in token["ids"]]
    model = table["model"] | {"vocab": vocab}
    return table | {"model": model, "added_tokens": added, "post_processor": processor}


def processors(processor: Any) -> Iterator[Table]:
    if processor is not None:
        yield from processor.get("processors", [processor])


def grown(table: Table, texts: Sequence[str], *, inside: bool) -> Table:
    """With these as special tokens at its end; inside: they are pieces as well, as in Llama 3's."""
    first = 1 + max(ids_of(table).values())
    added = [added_token(first + i, text) for i, text in enumerate(texts)]
    vocab = table["model"]["vocab"]
    if inside:
        tokens = [*table["added_tokens"], *added]
        vocab = vocab | {token["content"]: token["id"] for token in tokens}
    model = table["model"] | {"vocab": vocab}
    return table | {"model": model, "added_tokens": [*table["added_tokens"], *added]}


def write_chain(
    folder: Path,
    table: Table,
    told: Mapping[str, Any],
    chain: Sequence[Sequence[str]],
    *,
    seed: int,
    tied: bool = False,
    padding: int = 0,
) -> Path:
    """A model that loads, and answers as `chain` says. told: its tokenizer_config.json."""
    ids = ids_of(table)
    rows = 1 + max(ids.values()) + padding
    bos, eos = (ids[told[name]] for name in ("bos_token", "eos_token"))
    numbers = [[ids[text] for text in texts] for texts in chain]
    config = chained_config(rows, bos, eos, tied)
    write_model(folder, chained(seed, rows, numbers, tied=tied), config=config)
    write_files(folder, table, told)
    ends = {"bos_token_id": bos, "eos_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def write_rows(
    folder: Path,
    table: Table,
    told: Mapping[str, Any],
    *,
    seed: int,
    tied: bool = False,
    padding: int = 0,
    order: NDArray[Any] | None = None,
) -> "Rows":
    """A model with random rows of 4 columns, and little else; its rows and its tokenizer.

    order: a permutation of all ids, which must have no holes; rows and tokens go there together.
    """
    rows = 1 + max(ids_of(table).values()) + padding
    values = drawn(seed, {EMBED: (rows, 4), INNER: (8, 4)} | ({} if tied else {HEAD: (rows, 4)}))
    if order is not None:
        table = renumbered(table, lambda i: int(order[i]))
        for name in {EMBED, HEAD} & values.keys():
            values[name][order] = values[name][: len(order)].copy()
    config = {
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "eos_token_id": ids_of(table)[told["eos_token"]],
    }
    write_model(folder, typed(values, "BF16"), config=config)
    write_files(folder, table, told)
    return rows_of(folder)


def write_files(folder: Path, table: Table, told: Mapping[str, Any]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(table, ensure_ascii=False))
    settings = {**told, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@dataclass(frozen=True)
class Rows:
    """What a folder's files say: ids by text and texts by id, and the rows of embedding and head."""

    ids: Mapping[str, int]
    texts: Mapping[int, str]
    values: Mapping[str, NDArray[Any]]

    def of(self, text: str | None, number: int) -> int:
        """The row of a token; of no token, the row of that number if it stands for none; -1: none."""
        if text is not None:
            return self.ids.get(text, -1)
        return number if number < len(self.values[EMBED]) and number not in self.texts else -1


def rows_of(folder: Path) -> Rows:
    ids = ids_of(read_json(folder / "tokenizer.json"))
    values = {name: rows for name, rows in read_values(folder).items() if name in (EMBED, HEAD)}
    return Rows(ids, {i: text for text, i in ids.items()}, values)
