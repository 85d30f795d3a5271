"""A mixture reads texts as its base does, though transformers goes by the model_type, which is another."""

import json
import shutil
from pathlib import Path

import pytest
from real import LLAMA
from routed_models import adapter, base, in_one_process, mixture
from transformers import AutoTokenizer

TEXTS = ["Once upon a time", "  two  spaces, a\nline", "Zoë über 12", "<s> and </s>"]


@pytest.mark.skipif(not LLAMA.is_dir(), reason="the real Llama does not lie beside the repository")
@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen2"])
def test_texts_are_read_alike(kind: str, tmp_path: Path) -> None:
    model = base(kind, tmp_path / "base", vocab_size=512)
    shutil.copy(LLAMA / "tokenizer.json", model)
    one = adapter(model, tmp_path / "one", 4, target_modules="all-linear")
    settings = json.loads((LLAMA / "tokenizer_config.json").read_text())
    for declared in ("PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", None):
        told = settings | {"tokenizer_class": declared} if declared else {}
        (model / "tokenizer_config.json").write_text(json.dumps(told))
        with in_one_process():
            folder = mixture(tmp_path, model, {"one": one}, name=str(declared))
        before = AutoTokenizer.from_pretrained(model)
        after = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert type(before) is type(after), declared
        assert before(TEXTS)["input_ids"] == after(TEXTS)["input_ids"], declared
