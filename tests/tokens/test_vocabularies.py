"""Vocabularies of opened models: read once, and told apart by their text before they are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import drawn, typed, write_model
from small_vocabularies import byte_level, metaspace, unigram, wordpiece
from tokenizers import Tokenizer

from merge.sources.model import Model
from merge.sources.opening import open_model
from merge.tokens.vocabularies import Vocabularies

Change = Callable[[dict[str, Any]], object]


def opened(folder: Path, tokenizer: str) -> Model:
    write_model(folder, typed(drawn(1)), config={"eos_token_id": 2})
    (folder / "tokenizer.json").write_text(tokenizer)
    return open_model(str(folder))


def changed(tokenizer: Tokenizer, change: Change) -> str:
    data = json.loads(tokenizer.to_str())
    change(data)
    return json.dumps(data)


def test_files_are_read_once(tmp_path: Path) -> None:
    model, read = opened(tmp_path / "m", byte_level().to_str()), Vocabularies()
    assert read.beside(model).stop_ids == (2,)
    assert not read.beside(model).ids
    whole = read.of(model)
    shutil.rmtree(tmp_path / "m")
    assert read.of(model) is whole
    assert whole.ids["<s>"] == 1
    assert whole.rows == 16


def test_equal_tokenizers_are_kept_once(tmp_path: Path) -> None:
    models = [opened(tmp_path / name, byte_level().to_str()) for name in "ab"]
    read = Vocabularies()
    first, second = (read.of(model) for model in models)
    assert first.tokenizer is second.tokenizer
    assert first.label != second.label


BESIDE = [  # other parts than tokens and ways to split text
    lambda data: data.update(truncation={"max_length": 9}, padding=None),
    lambda data: data.update(post_processor={"type": "ByteLevel"}),
    lambda data: data.update(decoder=None),
]
OF_TOKENS = [
    lambda data: data.update(normalizer={"type": "Lowercase"}),
    lambda data: data.update(pre_tokenizer={"type": "Whitespace"}),
    lambda data: data["added_tokens"][1].update(lstrip=True),
    lambda data: data["added_tokens"].pop(),
    lambda data: data["model"]["vocab"].update({"more": 999}),
    lambda data: data["model"]["merges"].pop(),
]


@pytest.mark.parametrize("make", [byte_level, metaspace, unigram, wordpiece])
def test_what_is_no_matter_of_tokens_is_not_told_apart(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    tokenizer, read = make(), Vocabularies()
    plain = opened(tmp_path / "plain", changed(tokenizer, lambda data: None))
    for number, change in enumerate(BESIDE):
        other = opened(tmp_path / f"{number}", changed(tokenizer, change))
        assert read.spelling(other) == read.spelling(plain)


@pytest.mark.parametrize("change", OF_TOKENS)
def test_what_is_a_matter_of_tokens_is_told_apart(change: Change, tmp_path: Path) -> None:
    read = Vocabularies()
    plain = opened(tmp_path / "plain", changed(byte_level(), lambda data: None))
    other = opened(tmp_path / "other", changed(byte_level(), change))
    assert read.spelling(other) != read.spelling(plain)


def test_files_whose_keys_are_in_another_order_are_read_to_compare_them(tmp_path: Path) -> None:
    tokenizer = byte_level()
    plain = opened(tmp_path / "plain", tokenizer.to_str())
    turned = dict(reversed(json.loads(tokenizer.to_str()).items()))
    other = opened(tmp_path / "other", json.dumps(turned))
    without = open_model(str(write_model(tmp_path / "without", typed(drawn(1)))))
    read = Vocabularies()
    assert read.spelling(other) != read.spelling(plain)
    assert read.difference(plain, other) is None
    assert read.difference(plain, without) is None
    more = opened(tmp_path / "more", changed(tokenizer, OF_TOKENS[4]))
    assert read.difference(plain, more) == "it has the token 'more' (id 999) besides"
