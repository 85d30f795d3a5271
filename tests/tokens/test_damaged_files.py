"""Files that others wrote: whatever they hold, there are findings or one line that refuses them."""

import json
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import added_token

from merge.errors import SourceError
from merge.shipped import shipped
from merge.sources.opening import open_model
from merge.tokens import doctor
from merge.tokens.vocabularies import Vocabularies
from merge.tokens.vocabulary import read_vocabulary

JUNK = (None, [], {}, "", "x", -1, 1 << 40, 0.5, True, [None], [[1]], {"x": None}, {"id": {}})
NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
)
MORE: dict[str, Any] = {  # what zoo:base has not, so that it can be damaged
    "special_tokens_map.json": {"eos_token": {"content": "</s>"}, "unk_token": "<unk>"},
    "tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{ 1 }}"}]},
    "tokenizer.json": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]},
    },
    "config.json": {"rope_scaling": {"type": "linear", "factor": 2.0}, "text_config": None},
}


def whole(name: str) -> dict[str, Any]:
    file = shipped("evals/zoo/base") / name
    data: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return data | deepcopy(MORE.get(name, {}))


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, value in _items(data):
        yield from paths(value, (*path, key))


def _items(data: Any) -> list[tuple[Any, Any]]:
    if isinstance(data, dict):
        return list(data.items())[:12]
    return list(enumerate(data))[:3] if isinstance(data, list) else []


PLACES = [(name, path) for name in NAMES for path in paths(whole(name)) if path]


@settings(max_examples=400)
@given(place=st.sampled_from(PLACES), junk=st.sampled_from(JUNK))
def test_any_value_in_any_place_is_told_or_refused(
    place: tuple[str, tuple[Any, ...]], junk: Any
) -> None:
    name, path = place
    data = {n: whole(n) for n in NAMES}
    if "chat_template" not in path:  # which takes a process to render
        del data["tokenizer_config.json"]["chat_template"]
    table: Any = data[name]
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = junk
    base = open_model("zoo:base")
    model = replace(base, label="other", config=data["config.json"])
    files = {n: json.dumps(d).encode() for n, d in data.items()}
    with suppress(SourceError):
        vocabulary = read_vocabulary("other", files, 69)
        assert vocabulary is not None
        found = doctor._within(model, vocabulary)
        found += doctor._between([base, model], [Vocabularies().of(base), vocabulary])
        doctor.recipe_lines(found)


@st.composite
def tokenizers_drawn(draw: st.DrawFn) -> dict[str, Any]:
    """A few pieces, and added tokens in any order, of which some are pieces too; ids are any, with holes."""
    ids = st.lists(st.integers(0, 12), min_size=8, max_size=8, unique=True)
    pieces = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True))
    texts = draw(st.lists(st.sampled_from(["a", "b", "<1>", "<2>", "<3>"]), unique=True))
    vocab = dict(zip(pieces, draw(ids), strict=False))
    added = [
        added_token(i, text, special=draw(st.booleans()))
        for i, text in zip(draw(ids), texts, strict=False)
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    return {"version": "1.0", "added_tokens": added, "model": model}


@settings(max_examples=300)
@given(tokenizers_drawn())
def test_ids_that_move_are_those_that_the_library_moves(data: dict[str, Any]) -> None:
    from tokenizers import Tokenizer

    vocabulary = read_vocabulary("drawn", {"tokenizer.json": json.dumps(data).encode()})
    assert vocabulary is not None
    found = [f for f in doctor.examined_files(vocabulary, None) if f.code == "added-id-moves"]
    told = {text: ids[1] for f in found for text, ids in f.evidence["ids"].items()}
    library = Tokenizer.from_str(json.dumps(data))
    read = {t["content"]: library.token_to_id(t["content"]) for t in data["added_tokens"]}
    ids = {t["content"]: t["id"] for t in data["added_tokens"]}
    assert told == {text: i for text, i in read.items() if i != ids[text]}


def test_a_template_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for file in shipped("evals/zoo/base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match=r"chat_template\.jinja is not text"):
        doctor.diagnosed([open_model(str(tmp_path))], load=False)
