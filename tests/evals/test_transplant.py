"""The comparison of transplants runs and tells what it saw."""

import math
from pathlib import Path

import pytest

from evals.tokens.donor import Recipe, train_donor
from evals.tokens.score import bits_per_byte
from evals.tokens.transplant import WAYS, table, transplanted

LLAMA = Path(__file__).resolve().parents[3] / "shared" / "real" / "stories260k"
STORIES = [
    "Once upon a time, there was a little girl named Lily.",
    "She saw a big, red ball.\nThe end.",
]


@pytest.fixture(scope="module")
def llama() -> Path:
    if not LLAMA.is_dir():
        pytest.skip("the real models do not lie beside the repository")
    return LLAMA


def test_every_way_gives_a_model_that_speaks_the_donors_tokens(llama: Path, tmp_path: Path) -> None:
    """Some rows are made, and what is told of them is what the run did; the loss is finite."""
    recipe = Recipe(pieces=300, hidden=32, layers=1, steps=2, rows=2, length=8)
    (tmp_path / "donor").mkdir()
    train_donor(STORIES, tmp_path / "donor", recipe)
    tokenizer = (tmp_path / "donor" / "tokenizer.json").read_bytes()
    for how in WAYS:
        folder, made = transplanted(llama, tmp_path / "donor", how, tmp_path / how)
        assert made["how"] == how
        assert made["rows"] > 0
        assert (folder / "tokenizer.json").read_bytes() == tokenizer
        assert math.isfinite(bits_per_byte(folder, STORIES))


def test_the_table_tells_what_failed() -> None:
    figures = {
        "untouched": 0.5,
        "ours": {"mean": {"bits_per_byte": 1.25, "held_out_error": 0.75}},
        "peer": {"stb": {"failed": "TypeError"}},
    }
    assert table(figures).splitlines()[1:] == [
        f"{'the Llama with its own tokenizer':44}   0.5000",
        f"{'mergetool mean':44}   1.2500         0.750",
        f"{'tokensurgeon stb':44}  failed: TypeError",
    ]
