"""Whose tokens a result has: laws on real tokenizers under drawn texts, and odd shapes of vocabularies."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import (
    ENGLISH,
    GERMAN,
    byte_level,
    library,
    metaspace,
    unigram,
    vocabulary,
    with_tokens,
    wordpiece,
)
from tokenizers import AddedToken, Tokenizer

from merge.errors import PlanError
from merge.tokens.growth import moved_token
from merge.tokens.meaning import canonical, counterparts
from merge.tokens.sections import TokenizerSection
from merge.tokens.union import United, first_difference, unite
from merge.tokens.vocabulary import SETTINGS, TOKENIZER, Vocabulary, read_vocabulary

Real = Callable[[str], Vocabulary]
CHATML = ("<|im_end|>", "<|im_start|>")
WORDS = [
    "the",
    " Über",
    "naïve",
    "日本語",
    "🙂",
    "\n\n",
    "  ",
    "    ",
    "2026",
    "</",
    "[INST",
    "▁",
    "é",
    "def x():",
    ".",
]
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=12).map("".join)
GUARDED = [("llama2", "mistral_v1"), ("mistral_v1", "llama2"), ("mistral_v1", "mistral_v3")]


def united(source: Vocabulary, /, *others: Vocabulary, **section: Any) -> United:
    return unite(source, others, TokenizerSection(**section), "r.yaml:7")


def chatty(found: Vocabulary, *tokens: str) -> Vocabulary:
    """The vocabulary of a fine-tune of the model with that one."""
    grown = json.loads(with_tokens(library(found), *tokens).to_str())
    return vocabulary(grown, f"{found.label}-chat")


def result(source: Vocabulary, found: United) -> Vocabulary:
    read = read_vocabulary("result", {**source.files, **found.files})
    assert read is not None
    return read


def check_maps(source: Vocabulary, others: tuple[Vocabulary, ...], found: United) -> None:
    """What holds for every result: sizes, kept ids, and equal texts where two schemes are one."""
    whole = result(source, found)
    assert whole.size == found.size
    assert moved_token(whole.tokenizer, whole.ids, "") is None
    for text, i in source.ids.items():
        assert whole.ids[text] == i
    for vocab, ids in zip((source, *others), found.maps, strict=True):
        assert ids.dtype == np.int64
        assert ids.shape == (found.size,)
        assert all(vocab.texts[own] == whole.texts[i] for i, own in enumerate(ids) if own >= 0)
        for i, text in whole.texts.items():
            assert (ids[i] >= 0) == (text in vocab.ids)


@pytest.mark.parametrize("name", ["llama2", "mistral_v1", "llama3", "gpt2", "bert"])
def test_text_without_the_new_tokens_has_the_ids_that_it_had(real: Real, name: str) -> None:
    source = real(name)
    other = chatty(source, *CHATML)
    found = united(source, other)
    check_maps(source, (other,), found)
    assert found.size == source.size + 2
    before, after = library(source), library(source, found.files)

    @given(texts)
    def law(text: str) -> None:
        ids = before.encode(text).ids
        assert after.encode(text).ids == ids
        assert after.decode(ids) == before.decode(ids)

    law()
    assert after.encode(CHATML[0], add_special_tokens=False).ids[-1] == source.size


@pytest.mark.parametrize(("name", "other"), GUARDED)
def test_a_full_union_keeps_base_ids_and_only_joins_what_the_base_splits(
    real: Real, name: str, other: str
) -> None:
    found = united(real(name), real(other), source="union")
    check_maps(real(name), (real(other),), found)
    assert (np.sort(found.maps[1])[-real(other).size :] == np.arange(real(other).size)).all()
    before, after = library(real(name)), library(real(name), found.files)

    @given(texts.filter(lambda text: "[" not in text))  # mistral_v3 adds tokens such as [INST]
    def law(text: str) -> None:
        short, long = after.encode(text), before.encode(text)
        assert after.decode(short.ids) == before.decode(long.ids)
        assert {end for _, end in short.offsets} <= {end for _, end in long.offsets}
        assert len(short.ids) <= len(long.ids)

    law()


def test_a_full_union_of_byte_level_vocabularies_reads_what_both_have_learnt() -> None:
    english, german = byte_level(ENGLISH), vocabulary(byte_level(GERMAN), "german")
    source = vocabulary(with_tokens(english, "<|user|>"))
    found = united(source, german, source="union")
    check_maps(source, (german,), found)
    text = "Once upon a time beriet der Rat über vier Modelle"
    after = library(source, found.files)
    assert after.decode(after.encode(text).ids) == text
    assert len(after.encode(text).ids) < len(english.encode(text).ids)
    assert after.encode("<|user|>").ids == [source.ids["<|user|>"]]
    model = json.loads(found.files[TOKENIZER])["model"]
    ours = source.tokenizer["model"]["merges"]
    assert model["merges"][: len(ours)] == ours


def test_a_full_union_keeps_words_that_no_merges_reach() -> None:
    """Llama 3 has such: a whole word is looked up before merges are tried."""

    def unreachable(data: Any) -> None:
        data["model"]["ignore_merges"] = True
        data["model"]["merges"] = [m for m in data["model"]["merges"] if "".join(m) != "Ġmodels"]

    source = vocabulary(byte_level(size=350), change=unreachable)
    found = united(source, vocabulary(byte_level(GERMAN)), source="union")
    for tokenizer in (library(source), library(source, found.files)):
        assert tokenizer.encode(" models").ids == [source.ids["Ġmodels"]]


@pytest.mark.parametrize("merges", ["ab", [["a"]], [["a", 1]], {"a": "b"}, [None], ["a b c"]])
def test_merges_that_are_none_are_refused(merges: Any) -> None:
    damaged = vocabulary(
        byte_level(GERMAN), "bad", lambda data: data["model"].update(merges=merges)
    )
    for source, other in [(vocabulary(byte_level()), damaged), (damaged, vocabulary(byte_level()))]:
        with pytest.raises(PlanError, match=r"^bad: tokenizer.json: .* is no merge of two pieces$"):
            united(source, other, source="union")


def test_naming_a_token_keeps_what_it_is_and_special_changes_what_is_new() -> None:
    source, other = (
        vocabulary(byte_level()),
        vocabulary(with_tokens(byte_level(GERMAN), "<|user|>"), "german"),
    )
    told = {"Der": {}, "<|end|>": {"special": False}, "<|tool|>": {}}
    found = united(source, other, source="union", tokens=told, alias={"<|end|>": ["<|user|>"]})
    added = {token.text: token.special for token in result(source, found).added[3:]}
    assert added == {"<|end|>": False, "<|tool|>": True}
    assert result(source, found).ids["Der"] >= source.size
    with pytest.raises(PlanError, match=r"the result has no token '<\|x\|>'; give it"):
        united(source, other, source="union", alias={"<|x|>": ["Der"]})


def test_permuting_the_ids_of_a_model_changes_its_map_and_nothing_else(real: Real) -> None:
    source, other = real("llama2"), chatty(real("mistral_v1"), *CHATML)

    @settings(max_examples=10)  # each reads 32,000 tokens anew
    @given(st.integers(0, 1 << 32))
    def law(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(np.arange(3, 32000)).tolist()
        ids = [0, 1, 2, *order, 32000, 32001]  # new id of each old one

        def permute(data: Any) -> None:
            data["model"]["vocab"] = {t: ids[i] for t, i in data["model"]["vocab"].items()}

        moved = vocabulary(dict(other.tokenizer), other.label, permute)
        plain, permuted = united(source, other), united(source, moved)
        assert permuted.files == plain.files
        has = plain.maps[1] >= 0
        assert (permuted.maps[1][has] == np.array(ids)[plain.maps[1][has]]).all()
        assert (permuted.maps[1][~has] == -1).all()

    law()


def test_four_german_models_share_one_new_token(real: Real) -> None:
    mistral = real("mistral_v1")
    disco, sauerkraut = (chatty(mistral, *CHATML) for _ in range(2))
    found = united(mistral, disco, sauerkraut, mistral)
    assert found.size == 32002
    assert [ids[32000] for ids in found.maps] == [-1, 32000, 32000, -1]
    assert result(mistral, found).ids["<|im_start|>"] == 32001
    assert "'<|im_end|>' (32000)" in found.notes[0]


def test_equal_vocabularies_change_no_file(real: Real) -> None:
    for section in ({}, {"source": "union"}):
        found = united(real("gpt2"), real("gpt2"), **section)
        assert (found.files, found.size, found.notes) == ({}, 50257, ())
        assert (found.maps[1] == np.arange(50257)).all()


@pytest.mark.parametrize("trained", [byte_level, metaspace, unigram, wordpiece])
def test_every_kind_of_vocabulary_takes_new_tokens(trained: Callable[..., Tokenizer]) -> None:
    source = vocabulary(trained())
    other = vocabulary(with_tokens(trained(), *CHATML), "chat")
    found = united(source, other, tokens={"<|tool|>": {}, "<note>": {"special": False}})
    check_maps(source, (other,), found)
    added = result(source, found).added
    assert [t.text for t in added[-4:]] == [*CHATML, "<|tool|>", "<note>"]
    assert [t.special for t in added[-4:]] == [True, True, True, False]
    assert (found.maps[0][-4:] == -1).all()


def test_ids_of_the_file_hold_where_there_are_holes_between_them() -> None:
    def holed(data: Any) -> None:
        data["added_tokens"].append(data["added_tokens"][0] | {"id": 400, "content": "<|far|>"})

    source, other = (
        vocabulary(byte_level(), "holed", holed),
        vocabulary(with_tokens(byte_level(), "<|x|>")),
    )
    found = united(source, other)
    check_maps(source, (other,), found)
    assert found.size == 402
    assert (found.maps[0][source.size - 100 : 400] == -1).all()
    assert "holed: tokenizers reads '<|far|>' with another id" in found.notes[0]


def test_holes_in_a_vocabulary_that_counts_its_ids_are_refused() -> None:
    def holed(data: Any) -> None:
        data["added_tokens"].append(data["added_tokens"][0] | {"id": 400, "content": "<|far|>"})

    source, other = (
        vocabulary(unigram(), "holed", holed),
        vocabulary(with_tokens(unigram(), "<|x|>")),
    )
    with pytest.raises(PlanError, match=r"^r.yaml:7: holed: its ids have holes.*specials: base$"):
        united(source, other)
    assert united(source, other, specials="base").files == {}


def test_an_id_that_no_embedding_has_is_refused() -> None:
    huge = vocabulary(
        byte_level(), "huge", lambda data: data["model"]["vocab"].update(x=(1 << 31) - 1)
    )
    with pytest.raises(
        PlanError, match=r"^r.yaml:7: huge: a token has id 2147483647; ids below 16777216"
    ):
        united(huge)


def test_a_token_that_is_a_piece_as_well_keeps_its_id() -> None:
    """Llama 3's layout: added tokens stand in the model's vocabulary too."""

    def inside(data: Any) -> None:
        for token in data["added_tokens"]:
            data["model"]["vocab"][token["content"]] = token["id"]

    source = vocabulary(with_tokens(byte_level(), "<|eot|>"), "inside", inside)
    other = vocabulary(with_tokens(byte_level(GERMAN), "<|eot|>", "<|x|>"), "german")
    for section in ("base", "union"):
        check_maps(source, (other,), united(source, other, source=section))


def test_specials_base_appends_nothing_but_what_tokens_names() -> None:
    source, other = vocabulary(byte_level()), vocabulary(with_tokens(byte_level(), *CHATML), "chat")
    none = united(source, other, specials="base")
    assert (none.files, none.size) == ({}, source.size)
    assert "chat: 2 of its tokens are not in the result: '<|im_end|>' (300)" in none.notes[0]
    one = united(source, other, specials="base", tokens={"<|im_start|>": {}})
    assert one.size == source.size + 1
    assert one.maps[1][-1] == other.ids["<|im_start|>"]


def test_other_flags_are_an_error_unless_the_base_decides() -> None:
    wide = AddedToken("<|im_end|>", normalized=False, special=True, lstrip=True)
    source = vocabulary(with_tokens(byte_level(), "<|im_end|>"), "leo")
    other = vocabulary(with_tokens(byte_level(), wide), "disco")
    with pytest.raises(
        PlanError, match=r"disco: the token '<\|im_end\|>' is added \(special, lstrip\), but "
    ):
        united(source, other)
    assert united(source, other, conflict="base").files == {}
    piece = vocabulary(
        byte_level(), "plain", lambda data: data["model"]["vocab"].update({"<|im_end|>": 300})
    )
    with pytest.raises(PlanError, match="is an ordinary piece, but added"):
        united(source, piece)
    with pytest.raises(PlanError, match="disco"):  # two that the source lacks
        united(vocabulary(byte_level()), source, other)


def test_the_same_id_for_another_text_gets_another_id() -> None:
    source = vocabulary(with_tokens(byte_level(), "<|a|>"))
    other = vocabulary(with_tokens(byte_level(), "<|b|>"))
    found = united(source, other)
    assert [int(i) for i in found.maps[1][300:]] == [-1, 300]


def test_a_token_under_an_alias_is_the_other_one() -> None:
    source = vocabulary(with_tokens(byte_level(), "<|im_end|>"))
    other = vocabulary(with_tokens(byte_level(), "<|end_of_turn|>", "<|x|>"), "gemma")
    third = vocabulary(with_tokens(byte_level(), "<|end_of_turn|>"), "third")
    alias = {"<|im_end|>": ["<|end_of_turn|>"]}
    found = united(source, other, alias=alias)
    assert [t.text for t in result(source, found).added[-2:]] == ["<|im_end|>", "<|x|>"]
    assert [int(i) for i in found.maps[1][300:]] == [300, 301]
    # appended itself where the source has neither, under the name that counts
    found = united(vocabulary(byte_level()), third, alias=alias)
    assert [int(i) for i in found.maps[1][300:]] == [300]
    assert b"end_of_turn" not in found.files[TOKENIZER]


@pytest.mark.parametrize(
    ("alias", "message"),
    [
        ({"<|a|>": ["<|none|>"]}, "no model has the token '<|none|>'"),
        ({"<s>": ["</s>"], "<|a|>": ["</s>"]}, "would count as two tokens"),
        ({"<s>": ["</s>"], "</s>": ["<unk>"]}, "would count as two tokens"),
        ({"<|nobody|>": ["</s>"]}, "the result has no token '<|nobody|>'; give it in tokens"),
    ],
)
def test_an_alias_that_cannot_be_meant(alias: dict[str, list[str]], message: str) -> None:
    source = vocabulary(with_tokens(byte_level(), "<|a|>"))
    with pytest.raises(PlanError) as error:
        united(source, source, alias=alias)
    assert str(error.value).startswith("r.yaml:7: alias: ")
    assert message in str(error.value)


def test_a_full_union_refuses_what_does_not_split_text_alike(real: Real) -> None:
    def decode(data: Any) -> None:
        data["decoder"] = {"type": "Fuse"}

    def split(data: Any) -> None:
        data["pre_tokenizer"]["use_regex"] = False

    source = vocabulary(byte_level())
    for other, named in [
        (vocabulary(byte_level(GERMAN), change=decode), "its decoder is not"),
        (vocabulary(byte_level(GERMAN), change=split), "its pre_tokenizer is not"),
        (vocabulary(metaspace()), "its normalizer is not"),
        (vocabulary(unigram(), "uni"), "uni has a Unigram vocabulary"),
        (vocabulary(wordpiece(), "word"), "word has a WordPiece vocabulary"),
        (real("llama3"), "its pre_tokenizer is not"),
    ]:
        with pytest.raises(PlanError, match=rf"^r.yaml:7: .*{named}.*; say source: base$"):
            united(source, other, source="union")
    fallback = vocabulary(
        byte_level(GERMAN), change=lambda data: data["model"].update(byte_fallback=True)
    )
    with pytest.raises(PlanError, match="its byte_fallback is True, not None"):
        united(source, fallback, source="union")


def test_pieces_of_two_schemes_correspond_by_what_they_spell(real: Real) -> None:
    gpt2, llama, bert = real("gpt2"), real("llama2"), real("bert")
    ids = counterparts(llama, gpt2, {})
    for ours, theirs in {"▁the": "Ġthe", "ing": "ing", "▁": "Ġ", "é": "Ã©", "▁été": "ĠÃ©tÃ©",
                         "ü": "Ã¼", "<0x0A>": "Ċ", "<0xE2>": "â", "▁▁": "ĠĠ"}.items():  # fmt: skip
        own = gpt2.ids.get(theirs, -1)
        assert ids[llama.ids[ours]] == own, ours
    assert ids[llama.ids["▁the"]] >= 0
    assert ids[llama.ids["ü"]] >= 0
    words = counterparts(llama, bert, {})
    assert words[llama.ids["▁house"]] == bert.ids["house"]
    assert words[llama.ids["ing"]] == bert.ids["##ing"]
    assert words[llama.ids["▁,"] if "▁," in llama.ids else llama.ids[","]] == bert.ids[","]


@pytest.mark.parametrize(
    ("a", "b"),
    [("gpt2", "llama2"), ("llama2", "gpt2"), ("mistral_v3", "llama3"), ("llama3", "mistral_v3")],
)
def test_counterparts_decode_to_the_same_text_and_none_is_used_twice(
    real: Real, a: str, b: str
) -> None:
    source, other = real(a), real(b)
    ids = counterparts(source, other, {})
    used = ids[ids >= 0]
    assert len(set(used.tolist())) == len(used) > 10_000
    ours, theirs = library(source), library(other)
    plain = {t.id for t in source.added}, {t.id for t in other.added}
    for i, own in enumerate(ids.tolist()):
        if own >= 0 and i not in plain[0]:
            assert own not in plain[1]
            assert ours.decode([i]).strip() == theirs.decode([own]).strip()


def test_a_donor_with_one_token_for_both_roles_gives_its_eos(real: Real) -> None:
    gpt2, llama = real("gpt2"), real("llama2")
    both, eos = gpt2.ids["<|endoftext|>"], llama.ids["</s>"]
    assert counterparts(gpt2, llama, {})[both] == eos
    there = counterparts(llama, gpt2, {})
    assert there[eos] == both
    assert there[llama.ids["<s>"]] == -1  # not the same row for two tokens
    assert canonical(gpt2)["\0eos"] == both
    assert "\0bos" not in canonical(gpt2)


def test_an_alias_holds_across_schemes(real: Real) -> None:
    gpt2, llama = real("gpt2"), real("llama2")
    found = united(llama, gpt2, alias={"<s>": ["<|endoftext|>"]})
    assert found.maps[1][llama.ids["<s>"]] == gpt2.ids["<|endoftext|>"]
    assert found.maps[1][llama.ids["</s>"]] == -1


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(
    ("name", "section"), [("llama2", "union"), ("mistral_v1", "base"), ("llama3", "base")]
)
def test_transformers_reads_the_ids_that_the_file_tells(
    real: Real, tmp_path: Path, name: str, section: str, decoder: bool
) -> None:
    """As a fine-tune of Llama lies on disk: with Llama's classes, for which transformers builds a
    tokenizer anew; and the same after one save."""
    from transformers import AutoTokenizer

    listed = {str(t.id): {"content": t.text, "special": True} for t in real(name).added}
    more = {"added_tokens_decoder": listed} if decoder else {}
    told = {**real(name).settings, "tokenizer_class": "LlamaTokenizerFast", "legacy": False, **more}
    files = {
        TOKENIZER: real(name).files[TOKENIZER], SETTINGS: json.dumps(told).encode(),
        "config.json": b'{"model_type": "llama", "eos_token_id": 2, "bos_token_id": 1}',
    }  # fmt: skip
    source = read_vocabulary(name, files)
    assert source is not None
    other = chatty(real("mistral_v1" if name == "llama2" else name), *CHATML)
    found = united(source, other, source=section)
    for file, content in {**files, **found.files}.items():
        (tmp_path / file).write_bytes(
            content if isinstance(content, bytes) else content.read_bytes()
        )
    raw = library(source, found.files)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    auto.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert auto.eos_token == source.settings["eos_token"]
    for text in ["Hi <|im_start|>user\n  Über\n<|im_end|>", "</s>[INST] x", "".join(WORDS)]:
        assert auto(text)["input_ids"] == again(text)["input_ids"] == raw.encode(text).ids


def test_names_that_a_class_implied_are_written_down() -> None:
    """GPT-2's own tokenizer_config.json names no token: its class does."""
    files = {
        TOKENIZER: byte_level().to_str().encode(), SETTINGS: b'{"model_max_length": 1024}',
        "config.json": b'{"model_type": "gpt2", "bos_token_id": 2, "eos_token_id": 2}',
        "added_tokens.json": b"{}",
    }  # fmt: skip
    source = read_vocabulary("gpt2", files)
    assert source is not None
    found = united(source, tokens={"<|x|>": {}})
    told = json.loads(found.files[SETTINGS])
    assert (told["eos_token"], told["bos_token"], told["model_max_length"]) == (
        "</s>",
        "</s>",
        1024,
    )
    assert json.loads(found.files["added_tokens.json"])["<|x|>"] == 300


def test_the_bytes_do_not_depend_on_the_hash_seed(real_tokenizers: Path) -> None:
    script = """if True:
        import hashlib, sys
        from pathlib import Path
        from merge.tokens.sections import TokenizerSection
        from merge.tokens.union import unite
        from merge.tokens.vocabulary import folder_files, read_vocabulary
        names = ("llama2", "mistral_v1", "mistral_v3")
        a, *b = [read_vocabulary(n, folder_files(Path(sys.argv[1]) / n)) for n in names]
        found = unite(a, b, TokenizerSection(source="union"), "")
        parts = [*found.files.values(), *(m.tobytes() for m in found.maps), *map(str.encode, found.notes)]
        print([hashlib.sha256(p).hexdigest() for p in parts])"""
    runs = [
        subprocess.run([sys.executable, "-c", script, real_tokenizers], check=True, capture_output=True,
                       env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] != b""


def test_the_first_difference_in_words() -> None:
    plain, chat = vocabulary(byte_level()), vocabulary(with_tokens(byte_level(), "<|a|>"))
    other = vocabulary(with_tokens(byte_level(), "<|b|>", "<|a|>"))
    assert first_difference(plain, vocabulary(byte_level())) is None
    assert first_difference(plain, chat) == "it has the token '<|a|>' (id 300) besides"
    assert first_difference(chat, plain) == "it lacks the token '<|a|>' (id 300)"
    assert first_difference(chat, other) == "token '<|a|>' has id 301, not 300"


def test_flags_of_added_tokens_cannot_be_changed() -> None:
    with pytest.raises(PlanError, match=r"tokens.<s>: special is false, .* whose flags are kept"):
        united(vocabulary(byte_level()), tokens={"<s>": {"special": False}})


def test_an_ordinary_piece_becomes_special_by_its_id() -> None:
    """Of the source, or one that a union takes in."""
    plain, german = vocabulary(byte_level()), vocabulary(byte_level(GERMAN), "german")
    piece = max((text for text in plain.pieces if text.isascii() and text.isalpha()), key=len)
    for other, text in (((), piece), ((german,), "Der")):
        source = "union" if other else "base"
        found = united(plain, *other, source=source, tokens={text: {"special": True}})
        after = result(plain, found)
        check_maps(plain, other, found)
        (token,) = [token for token in after.added if token.text == text]
        assert token.special
        assert token.id == after.ids[text] == plain.ids.get(text, token.id)
        tokenizer = library(plain, found.files)
        assert tokenizer.encode(f"{text}{text}").ids == [token.id, token.id]
        assert tokenizer.decode([token.id]) == ""
