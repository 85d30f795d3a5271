"""Vocabularies for tests: real ones, where their files lie beside the repository, and small trained ones."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from merge.tokens.vocabulary import SETTINGS, TOKENIZER, Vocabulary, folder_files, read_vocabulary

REAL = Path(__file__).parents[3] / "shared/real/tokenizers"
TEXT = """Once upon a time there was a merge of four models, and it did not stop. Der Rat beriet:
"Nun, vier Modelle, ein Ende?" Each of them ended its texts otherwise; über Nacht fand man das Zeichen.
def stop(text): return text.endswith("</s>")  # 2, 32000, 32000, 2"""


@pytest.fixture(scope="session")
def real_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders llama2, mistral_v1, mistral_v3, llama3 and gpt2 as Hugging Face lays them out, and bert."""
    if not REAL.is_dir():
        pytest.skip("the real tokenizers do not lie beside the repository")
    from tokenizers import BertWordPieceTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    subprocess.run([sys.executable, REAL / "convert.py", folder], check=True)
    (folder / "bert").mkdir()
    bert = BertWordPieceTokenizer(str(REAL / "bert_uncased/vocab.txt"))
    bert.save(str(folder / "bert" / TOKENIZER))
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("unk", "sep", "pad", "cls", "mask")}
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "bert" / SETTINGS).write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="session")
def real(real_tokenizers: Path) -> Callable[[str], Vocabulary]:
    """One of the real vocabularies, read once."""
    read: dict[str, Vocabulary] = {}

    def vocabulary(name: str) -> Vocabulary:
        if name not in read:
            found = read_vocabulary(name, folder_files(real_tokenizers / name))
            assert found is not None
            read[name] = found
        return read[name]

    return vocabulary
