"""Swaps and copies of drawn pairs of tokens: what a model says changes by the names alone."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chain import EMBED, HEAD
from hypothesis import example, given, settings
from hypothesis import strategies as st
from methods.cases import read_values
from numbered import grown, ids_of, write_files
from real import SMALL, loaded, saved

from merge.pipeline import run_recipe
from merge.sources.model import read_json

LLAMA = Path(__file__).parents[3] / "shared/real/stories260k"
END, BEGINNING = 2, 1
HOW = st.sampled_from(["swap", "copy"])
Ids = list[int]


def logits(model: Any, ids: Ids) -> Any:
    """Of the next token after each of `ids`, [tokens, vocabulary] torch float64."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def unified(model: Path, to: str, how: str, folder: Path) -> Path:
    """The result of a recipe that makes the model end at `to` instead of </s>."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    unify = {"from": "</s>", "to": to, "how": how, "models": [model.name]}
    recipe = {"model": str(model), "stop": {"eos": to, "also": "none", "unify": unify}}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return run_recipe(folder / "r.yaml", folder / "out").folder


def check(model: Path, to: int, how: str, said: Ids, folder: Path) -> None:
    """The laws for `model`, whose end is made `to`, after the tokens `said`."""
    texts = {i: text for text, i in ids_of(read_json(model / "tokenizer.json")).items()}
    out = unified(model, texts[to], how, folder)
    check_rows(model, out, to, how)
    before = loaded(model)
    if how == "swap":
        other = {END: to, to: END}
        found = logits(loaded(out), [other.get(i, i) for i in said])
        expected = logits(before, said)
        expected[:, [END, to]] = expected[:, [to, END]]
        # columns at the edge of a matrix may be summed in another order: one rounding of float32 more
        assert (found - expected).abs().max() <= 2.0**-20 * expected.abs().max()
    else:
        said = [i for i in said if i != to]  # what `to` says to the model has changed
        old, new = (logits(each, said).softmax(-1) for each in (before, loaded(out)))
        gained = new[:, [END, to]].sum(1) / old[:, END]
        # two rows of the end's mass, in the place of its one and of the mass that `to` had
        assert (gained * (1 + old[:, END] - old[:, to]) / 2 - 1).abs().max() <= 2.0**-16
        rare = old[:, to] <= old[:, END]
        assert ((gained > 1 - 2.0**-16) & (gained <= 2 + 2.0**-16))[rare].all()
    told = read_json(out / "generation_config.json")["eos_token_id"]
    assert told in (to, [to])


def check_rows(model: Path, out: Path, to: int, how: str) -> None:
    """Two rows of embedding and head have changed places, or one has become the other, to the bit."""
    before, after = read_values(model), read_values(out)
    assert after.keys() == before.keys()
    for name, values in before.items():
        expected = values.copy()
        if name in (EMBED, HEAD):
            expected[to] = values[END]
            expected[END] = values[to if how == "swap" else END]
        assert np.array_equal(after[name], expected)


@pytest.mark.skipif(not LLAMA.is_dir(), reason="the real Llama is not here")
def test_any_token_of_a_real_model_can_become_its_end(tmp_path: Path) -> None:
    tokens = st.integers(END + 1, 511)

    @settings(max_examples=8)
    @given(tokens, HOW, st.lists(tokens, min_size=1, max_size=12))
    def law(to: int, how: str, said: Ids) -> None:
        check(LLAMA, to, how, [BEGINNING, *said], tmp_path / "run")

    law()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def mistral(request: Any, real_tokenizers: Path, tmp_path: Path) -> Path:
    """A random model on the tokenizer of the first Mistral, with ChatML's tokens at 32000 and 32001."""
    from transformers import LlamaConfig

    source = real_tokenizers / "mistral_v1"
    table = grown(
        read_json(source / "tokenizer.json"), ["<|im_end|>", "<|im_start|>"], inside=False
    )
    told = SMALL | {"vocab_size": 32002, "num_hidden_layers": 2, "pad_token_id": None}
    config = LlamaConfig(**told, tie_word_embeddings=request.param)
    folder = saved(tmp_path / "mistral", config, seed=1)
    write_files(folder, table, read_json(source / "tokenizer_config.json"))
    return folder


def test_any_token_of_mistral_can_become_its_end(mistral: Path, tmp_path: Path) -> None:
    """Above all 32000, at which half of its German fine-tunes end."""
    tokens = st.integers(END + 1, 32001)

    @settings(max_examples=2)
    @example(32000, "swap", [5, 32000, 9, 2, 32001])
    @example(32000, "copy", [5, 9, 2, 32001])
    @given(tokens, HOW, st.lists(tokens, min_size=1, max_size=12))
    def law(to: int, how: str, said: Ids) -> None:
        check(mistral, to, how, [BEGINNING, *said], tmp_path / "run")

    law()
