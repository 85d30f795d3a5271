"""Asking transformers for modules runs no code of strangers and builds nothing without end."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft_models import MODELS, saved

import merge.adapters.modules
from merge.adapters.modules import asked_modules, modules_of
from merge.errors import SourceError
from merge.sources.opening import open_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(MODELS["llama"](), tmp_path / "llama")


def changed(model: Path, **keys: Any) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | keys))
    return model


def refusal(model: Path) -> str:
    with pytest.raises(SourceError) as caught:
        asked_modules(open_model(str(model)))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_modules_in_the_current_folder_are_not_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "transformers", "json", "resource"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    model = open_model(str(llama))
    assert asked_modules(model) == modules_of(model)
    assert not (tmp_path / "ran").exists()


def test_more_layers_than_tensors_are_not_built(llama: Path) -> None:
    found = "num_hidden_layers is 1000000000, but its files hold 21 tensors"
    assert found in refusal(changed(llama, num_hidden_layers=10**9))


def test_what_takes_too_much_memory_or_time_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(llama, model_type="bert", architectures=["BertModel"], num_labels=10**9)
    monkeypatch.setattr(merge.adapters.modules, "BYTES", 2 << 30)
    assert "transformers cannot build 'BertModel' (MemoryError" in refusal(llama)
    monkeypatch.setattr(merge.adapters.modules, "SECONDS", 0.01)
    assert "transformers has not built what config.json describes" in refusal(llama)


def test_code_of_a_model_is_not_run(llama: Path, tmp_path: Path) -> None:
    (llama / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    changed(llama, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    assert "transformers cannot build" in refusal(llama)
    assert not (tmp_path / "ran").exists()
