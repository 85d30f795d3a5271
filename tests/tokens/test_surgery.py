"""Surgery on a real model: the tokens change their names or places, what it says does not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import contents, write_tensors
from methods.cases import read_values
from real import loaded

from merge.errors import PlanError
from merge.pipeline import run_recipe
from merge.sources.model import read_json

REAL = Path(__file__).resolve().parents[3] / "shared" / "real" / "stories260k"
EMBED = "model.embed_tokens.weight"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real Llama is not here")
Rename = Callable[[int], int]


def renumbered(folder: Path, new: Rename, *, seed: int = 0) -> Path:
    """The real model's tokenizer with other ids, before a random embedding of 16 columns."""
    shutil.copytree(REAL, folder)
    tokenizer = read_json(folder / "tokenizer.json")
    tokenizer["model"]["vocab"] = {t: new(i) for t, i in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = new(token["id"])
    special = tokenizer["post_processor"]["special_tokens"]["<s>"]
    special["ids"] = [new(i) for i in special["ids"]]
    write_json(folder / "tokenizer.json", tokenizer)
    for name in ("config.json", "generation_config.json"):
        told = read_json(folder / name)
        for key in ("bos_token_id", "eos_token_id"):
            ids = told[key]
            told[key] = [new(i) for i in ids] if isinstance(ids, list) else new(ids)
        write_json(folder / name, told)
    values = np.random.default_rng(seed).standard_normal((512, 16), dtype=np.float32)
    write_tensors(folder / "model.safetensors", {EMBED: ("F32", values)})
    return folder


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False))


def surgery(folder: Path, text: str, **options: Any) -> Path:
    """The result of a recipe on the real model."""
    (folder / "r.yaml").write_text(f"model: {REAL}\n{text}")
    return run_recipe(folder / "r.yaml", folder / "out", **options).folder


def told(folder: Path) -> str:
    """Greedy text from the beginning."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer("", return_tensors="pt").input_ids
    out = loaded(folder).generate(start, max_new_tokens=60, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


def logits(folder: Path, text: str = "Once upon a time") -> Any:
    """Of the next token after every token of a text, [tokens, vocabulary] torch float64."""
    import torch
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return loaded(folder)(ids).logits[0].double()


def test_with_its_own_tokenizer_permuted_it_says_the_same(tmp_path: Path) -> None:
    """The rows follow the ids, whatever rows the model has that lends them."""
    order = np.random.default_rng(1).permutation(512)
    renumbered(tmp_path / "permuted", lambda i: int(order[i]))
    out = surgery(tmp_path, "tokenizer: {source: permuted}\n")
    assert told(out) == told(REAL)
    assert told(out).startswith("Once upon a time, there was a little girl named Lily.")
    assert np.array_equal(read_values(out)[EMBED][order], read_values(REAL)[EMBED])
    assert contents(out)["tokenizer.json"] == contents(tmp_path / "permuted")["tokenizer.json"]
    assert read_json(out / "config.json")["eos_token_id"] == order[2]


def test_a_swap_renames_and_nothing_more(tmp_path: Path) -> None:
    unify = "{from: </s>, to: <0x03>, models: [stories260k]}"
    out = surgery(tmp_path, f"stop: {{eos: <0x03>, also: none, unify: {unify}}}\n")
    ids = read_json(REAL / "tokenizer.json")["model"]["vocab"]
    old, new = ids["</s>"], ids["<0x03>"]
    expected = logits(REAL)
    expected[:, [old, new]] = expected[:, [new, old]]
    assert logits(out).equal(expected)
    assert told(out) == told(REAL)
    assert read_json(out / "generation_config.json")["eos_token_id"] in (new, [new])


def test_a_copy_gives_the_end_a_second_name(tmp_path: Path) -> None:
    """Both names together have more than the mass that one had, and twice that at most."""
    unify = "{from: </s>, to: <0x03>, how: copy, models: [stories260k]}"
    out = surgery(tmp_path, f"stop: {{eos: <0x03>, unify: {unify}}}\n")
    ids = read_json(REAL / "tokenizer.json")["model"]["vocab"]
    old, new = ids["</s>"], ids["<0x03>"]
    before, after = (logits(folder).softmax(-1) for folder in (REAL, out))
    gained = after[:, [old, new]].sum(1) / before[:, old]
    assert (gained > 1).all()
    assert (gained <= 2 * (1 + 2**-40)).all()  # sums of float64
    assert read_json(out / "generation_config.json")["eos_token_id"] == [new, 1, old]


def test_a_swap_of_what_begins_texts_too_is_refused(tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(REAL, both)
    settings = read_json(both / "tokenizer_config.json")
    write_json(both / "tokenizer_config.json", settings | {"bos_token": "</s>"})
    (tmp_path / "r.yaml").write_text(
        "model: both\nstop: {eos: <0x03>, unify: {from: </s>, to: <0x03>, models: [both]}}\n"
    )
    with pytest.raises(PlanError, match="begins the texts of both as well"):
        run_recipe(tmp_path / "r.yaml", tmp_path / "out")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A donor with 60 pieces that the real model lacks, in the place of some that it has."""
    folder = renumbered(tmp_path / "foreign", lambda i: i)
    tokenizer = read_json(folder / "tokenizer.json")
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    last = max(vocab.values())
    texts = {i: t for t, i in vocab.items()}
    for gone in range(last - 59, last + 1):  # the last pieces are letters
        del vocab[texts[gone]]
    pairs = [
        (a, b) for a in list(vocab)[260:330] for b in list(vocab)[260:330] if a + b not in vocab
    ]
    for number, (a, b) in enumerate(pairs[:60]):
        vocab[a + b] = last - 59 + number
        merges.append([a, b] if isinstance(merges[0], list) else f"{a} {b}")
    write_json(folder / "tokenizer.json", tokenizer)
    return folder


@pytest.mark.parametrize("how", ["mean", "subword", "omp", "procrustes"])
def test_shared_tokens_keep_their_rows_and_new_ones_get_made_rows(
    how: str, foreign: Path, tmp_path: Path
) -> None:
    out = surgery(tmp_path, f"tokenizer: {{source: foreign, missing: {how}}}\n", threads=1)
    before, after = read_values(REAL)[EMBED], read_values(out)[EMBED]
    ids, new = (read_json(f / "tokenizer.json")["model"]["vocab"] for f in (REAL, out))
    shared = [(i, new[text]) for text, i in ids.items() if text in new]
    made = [i for text, i in new.items() if text not in ids]
    assert len(shared) == 452
    assert all(np.array_equal(after[j], before[i]) for i, j in shared)
    assert len(made) == 60
    assert np.abs(after[made]).max(axis=1).all()
    (tmp_path / "more").mkdir()
    text = f"tokenizer: {{source: {foreign}, missing: {how}}}\n"
    again = surgery(tmp_path / "more", text, threads=4)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    report = read_json(out / "mergetool.json").get("rows_made", [])
    assert [r["how"] for r in report] == [how]
    for made_rows in report:
        assert made_rows["rows"] == 60
        assert 10 <= len(made_rows["errors"]) <= 40  # about one of ten words that both have
        assert 0 < made_rows["median_error"] < 2


def test_tokens_that_nobody_has_rows_for_are_an_error(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"60 tokens of the result are in none of the merged models"
    ):
        surgery(tmp_path, "tokenizer: {source: foreign}\n")


def test_the_seed_of_hashing_changes_no_byte(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {REAL}}}]\n"
        "tokenizer: {source: foreign, missing: omp}\nstop: {eos: </s>}\n"
    )
    run = "import sys; from merge.pipeline import run_recipe; run_recipe(sys.argv[1], sys.argv[2])"
    run = run.replace("sys.argv[2]", "__import__('pathlib').Path(sys.argv[2])")
    results = []
    for seed in ("1", "2"):
        out = tmp_path / f"out{seed}"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", run, str(tmp_path / "r.yaml"), str(out)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        results.append(contents(out))
    assert results[0] == results[1]


def test_a_transplant_that_would_never_stop_is_refused_with_the_line_that_resolves_it(
    tmp_path: Path,
) -> None:
    """The end of the lent vocabulary is a token that the model has, and does not end with."""
    folder = renumbered(tmp_path / "lender", lambda i: i)
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", settings | {"eos_token": "<0x03>"})
    end = read_json(folder / "tokenizer.json")["model"]["vocab"]["<0x03>"]
    for name in ("config.json", "generation_config.json"):
        write_json(folder / name, read_json(folder / name) | {"eos_token_id": end})
    with pytest.raises(PlanError, match="eos-differs") as refused:
        surgery(tmp_path, "tokenizer: {source: lender}\n")
    line = str(refused.value).partition("each on its line: ")[2].strip("`")
    out = surgery(tmp_path, f"tokenizer: {{source: lender}}\n{line}\n")
    assert read_json(out / "generation_config.json")["eos_token_id"] == [end, 1, 2]
