"""Whole merges of models with holes between their ids, and of models that begin and end with one token."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chain import EMBED, HEAD
from families import contents, typed, write_recipe, write_tensors
from german import CHATML, IM_END, IM_START
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.cases import read_values
from numbered import grown, ids_of, renumbered, rows_of, write_chain
from real import loaded
from small_vocabularies import NAMES, byte_level

from merge.errors import PlanError
from merge.pipeline import run_recipe
from merge.sources.model import read_json

LLAMA = Path(__file__).parents[3] / "shared/real/stories260k"
BOTH = "<|endoftext|>"  # GPT-2's beginning and end
Renumber = Callable[[int], int]


def with_gaps(gaps: Sequence[tuple[int, int]]) -> Renumber:
    """gaps: (at, width): ids from `at` on are so much larger."""
    return lambda i: i + sum(width for at, width in gaps if at <= i)


def answered(folder: Path, text: str) -> list[str]:
    """The tokens that a model says after `text`, at most 8."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = loaded(folder).generate(ids, max_new_tokens=8, do_sample=False)
    return list(tokenizer.convert_ids_to_tokens(out[0, ids.shape[1] :]))


holes = st.lists(st.tuples(st.integers(0, 299), st.integers(1, 40)), min_size=1, max_size=4)


def test_models_with_holes_between_their_ids_merge_by_token(tmp_path: Path) -> None:
    """Each has holes of its own, so that hardly a row has the number that it has in the other model."""
    from transformers import AutoTokenizer

    plain = json.loads(byte_level().to_str())
    chain = (["?"], ["M"], ["</s>"])

    @settings(max_examples=6)
    @given(st.tuples(holes, holes), st.tuples(*[st.integers(0, 5)] * 2), *[st.booleans()] * 2)
    def law(gaps: Any, padding: tuple[int, int], tied: bool, one_end: bool) -> None:
        told = NAMES | ({"bos_token": "</s>"} if one_end else {})
        tables = [renumbered(plain, with_gaps(gaps[0]))]
        tables += [grown(renumbered(plain, with_gaps(gaps[1])), ["<|x|>"], inside=True)]
        for i in (0, 1):
            place = tmp_path / f"m{i}"
            write_chain(place, tables[i], told, chain, seed=1 + i, tied=tied, padding=padding[i])
        recipe = write_recipe(
            tmp_path / "r.yaml",
            models={"m0": {"weight": 1.0}, "m1": {"weight": 1.0}},
            merge_method="linear",
            tokenizer={"source": "m0"},
        )
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        out = run_recipe(recipe, tmp_path / "out").folder
        m0, m1, result = (rows_of(folder) for folder in (tmp_path / "m0", tmp_path / "m1", out))
        assert result.ids == {**m0.ids, "<|x|>": 1 + max(m0.ids.values())}
        assert result.values.keys() == m0.values.keys()
        for name, rows in result.values.items():
            assert len(rows) == max(len(m0.values[name]), 1 + max(result.texts))
            assert np.isfinite(rows).all()
            mean = sum(m.values[name][[m.ids[text] for text in m0.ids]] for m in (m0, m1)) / 2
            found = rows[[*m0.ids.values()]]
            assert (np.abs(found - mean) <= 2.0**-8 * np.abs(mean)).all()  # rounded to bfloat16
            assert np.array_equal(rows[result.ids["<|x|>"]], m1.values[name][m1.ids["<|x|>"]])
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert {text: tokenizer.convert_tokens_to_ids(text) for text in result.ids} == result.ids
        assert tokenizer("<|x|>?").input_ids == [result.ids["<|x|>"], m0.ids["?"]]
        assert answered(out, "So?") == ["M", "</s>"]

    law()


@pytest.mark.skipif(not LLAMA.is_dir(), reason="the real Llama is not here")
def test_a_real_model_says_the_same_with_holes_between_its_ids_and_without_them_again(
    tmp_path: Path,
) -> None:
    new = with_gaps([(3, 5), (300, 90)])
    lender = tmp_path / "holed"
    shutil.copytree(LLAMA, lender)
    table = renumbered(read_json(LLAMA / "tokenizer.json"), new)
    rows = 1 + max(ids_of(table).values())
    (lender / "tokenizer.json").write_text(json.dumps(table, ensure_ascii=False))
    for name in ("config.json", "generation_config.json"):
        told = read_json(LLAMA / name)
        ids = {key: told[key] for key in ("bos_token_id", "eos_token_id")}
        moved = {k: [*map(new, i)] if isinstance(i, list) else new(i) for k, i in ids.items()}
        told |= moved | ({"vocab_size": rows} if name == "config.json" else {})
        (lender / name).write_text(json.dumps(told))
    embedding = np.random.default_rng(0).standard_normal((rows, 16), dtype=np.float32)
    write_tensors(lender / "model.safetensors", typed({EMBED: embedding}))
    there = rewritten(tmp_path / "there", LLAMA, lender)
    ids = read_json(LLAMA / "tokenizer.json")["model"]["vocab"].values()
    before, after = (read_values(folder)[EMBED] for folder in (LLAMA, there))
    assert len(after) == rows
    assert np.array_equal(after[[new(i) for i in ids]], before[[*ids]])
    assert told_story(there) == told_story(LLAMA)
    back = rewritten(tmp_path / "back", there, LLAMA)
    assert np.array_equal(read_values(back)[EMBED], before)
    assert contents(back)["tokenizer.json"] == contents(LLAMA)["tokenizer.json"]
    assert told_story(back) == told_story(LLAMA)


def rewritten(folder: Path, model: Path, lender: Path) -> Path:
    """The model with the lender's tokenizer."""
    folder.mkdir()
    recipe = {"model": str(model), "tokenizer": {"source": str(lender)}}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return run_recipe(folder / "r.yaml", folder / "out").folder


def told_story(folder: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer("", return_tensors="pt").input_ids
    out = loaded(folder).generate(start, max_new_tokens=40, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


@pytest.fixture
def one_token_for_both(real_tokenizers: Path, tmp_path: Path) -> Path:
    """A folder with two models on GPT-2's tokenizer: `plain` ends as it begins, `chat` with <|im_end|>."""
    table = read_json(real_tokenizers / "gpt2" / "tokenizer.json")
    told = read_json(real_tokenizers / "gpt2" / "tokenizer_config.json")
    for seed, (name, more, end) in enumerate(
        [("plain", (), BOTH), ("chat", (IM_END, IM_START), IM_END)], start=1
    ):
        own = told | {"eos_token": end} | ({"chat_template": CHATML} if more else {})
        folder = tmp_path / name
        write_chain(
            folder, grown(table, more, inside=False), own, (["Ċ"], ["Yes"], [end]), seed=seed
        )
    return tmp_path


def chat_recipe(folder: Path, how: str) -> Path:
    """The two merged, `plain` lending the ids, so that answers end with <|im_end|>."""
    unify = {"from": BOTH, "to": IM_END, "how": how, "models": ["plain"]}
    return write_recipe(
        folder / f"{how}.yaml",
        models={"plain": {"weight": 1.0}, "chat": {"weight": 1.0}},
        merge_method="linear",
        tokenizer={"source": "plain"},
        stop={"eos": IM_END, "unify": unify},
        chat_template={"from": "model:chat"},
    )


def test_a_model_that_ends_as_it_begins_learns_another_end_and_keeps_its_beginning(
    one_token_for_both: Path,
) -> None:
    folder = one_token_for_both
    out = run_recipe(chat_recipe(folder, "copy"), folder / "out").folder
    plain, chat, result = (rows_of(f) for f in (folder / "plain", folder / "chat", out))
    for name in (EMBED, HEAD):
        for text, own in ((BOTH, BOTH), (IM_END, BOTH), ("Yes", "Yes")):
            mean = (plain.values[name][plain.ids[own]] + chat.values[name][chat.ids[text]]) / 2
            found = result.values[name][result.ids[text]]
            assert (np.abs(found - mean) <= 2.0**-8 * np.abs(mean)).all()  # rounded to bfloat16
        start = result.ids[IM_START]
        assert np.array_equal(result.values[name][start], chat.values[name][chat.ids[IM_START]])
    told = read_json(out / "tokenizer_config.json")
    assert (told["bos_token"], told["eos_token"]) == (BOTH, IM_END)
    config = read_json(out / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (50256, result.ids[IM_END])
    prompt = f"{IM_START}user\nIs it?{IM_END}\n{IM_START}assistant\n"
    assert answered(out, prompt) == ["Yes", IM_END]


def test_its_end_cannot_be_swapped_away(one_token_for_both: Path) -> None:
    folder = one_token_for_both
    with pytest.raises(PlanError, match=r"begins the texts of plain as well.*how: copy"):
        run_recipe(chat_recipe(folder, "swap"), folder / "out")


def test_models_that_end_as_they_begin_are_merged_as_any(one_token_for_both: Path) -> None:
    """Without a word about stopping, since both end alike; one lends its ids, one has a token more."""
    folder = one_token_for_both
    table = read_json(folder / "plain" / "tokenizer.json")
    told = read_json(folder / "plain" / "tokenizer_config.json")
    write_chain(
        folder / "more", grown(table, ["<|x|>"], inside=False), told, (["Ċ"], ["Yes"], [BOTH]),
        seed=3,
    )  # fmt: skip
    recipe = write_recipe(
        folder / "r.yaml",
        models={"plain": {"weight": 1.0}, "more": {"weight": 1.0}},
        merge_method="linear",
    )
    out = run_recipe(recipe, folder / "out").folder
    assert answered(out, f"{BOTH}Is it?\n") == ["Yes", BOTH]
