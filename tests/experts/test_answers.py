"""What transformers has told of a base is asked once, and anew where anything differs that decides it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grounds import tokenized
from routed_models import base

from merge.experts.lora import classes
from merge.experts.lora.answers import MOST, keep, kept, key_of
from merge.experts.lora.classes import asked_classes, classes_of
from merge.sources.model import Model
from merge.sources.opening import open_model


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were asked about; each time in this process, and with an empty cache before."""
    found: list[str] = []

    def here(ask: Callable[[Model], Any], model: Model) -> Any:
        found.append(model.folder.name)
        return json.loads(json.dumps(vars(ask(model)), default=sorted))

    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classes, "asked", here)
    classes._answered.cache_clear()
    return found


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tokenized(base("llama", tmp_path / "llama"))


def test_what_was_told_is_not_asked_again(asked: list[str], llama: Path) -> None:
    wanted = classes_of(open_model(str(llama)))
    assert asked_classes(open_model(str(llama))) == wanted
    assert asked_classes(open_model(str(llama))) == wanted  # in this process
    classes._answered.cache_clear()
    assert asked_classes(open_model(str(llama))) == wanted  # in another
    assert asked == ["llama"]


@pytest.mark.parametrize("what", ["config", "tokenizer", "settings", "code", "version"])
def test_whatever_decides_it_is_asked_about_anew(
    what: str, asked: list[str], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asked_classes(open_model(str(llama)))
    if what == "config":
        config = json.loads((llama / "config.json").read_text()) | {"attention_bias": True}
        (llama / "config.json").write_text(json.dumps(config))
    elif what == "tokenizer":
        (llama / "tokenizer.json").write_text("none")
    elif what == "settings":
        (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    elif what == "code":
        monkeypatch.setattr(classes, "__file__", __file__)
    else:
        monkeypatch.setattr("merge.experts.lora.answers.version", lambda name: "0")
    after = asked_classes(open_model(str(llama)))
    assert asked == ["llama"] * 2
    assert (after == before) == (what in ("code", "version"))


@pytest.mark.parametrize("damage", ["", "[]", "{}", "null", "code", "no folder"])
def test_a_damaged_answer_counts_as_none(
    damage: str, asked: list[str], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = asked_classes(open_model(str(llama)))
    (file,) = (tmp_path / "cache" / "classes").iterdir()
    if damage == "code":
        told = json.loads(file.read_text()) | {"model": "X\nimport os"}
        file.write_text(json.dumps(told))
    elif damage == "no folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "file"))
    else:
        file.write_text(damage)
    classes._answered.cache_clear()
    assert asked_classes(open_model(str(llama))) == wanted
    assert asked == ["llama"] * 2


def test_only_the_last_answers_are_kept(asked: list[str], tmp_path: Path) -> None:
    for number in range(MOST + 5):
        keep(str(number), number)
    assert kept(str(MOST + 4)) == MOST + 4
    assert len(list((tmp_path / "cache" / "classes").iterdir())) == MOST


def test_a_key_is_the_same_for_the_same(llama: Path) -> None:
    assert key_of(open_model(str(llama))) == key_of(open_model(str(llama)))
