"""Where a model stops: what it says of it in all files, and that it does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edited import laid_out, with_files, with_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.errors import PlanError, RecipeError
from merge.recipe import parse_recipe
from merge.tokens.sections import StopSection
from merge.tokens.stop import stopped
from merge.tokens.vocabulary import (
    CONFIG,
    GENERATION,
    SETTINGS,
    SPECIALS,
    TOKENIZER,
    Vocabulary,
    folder_files,
    read_vocabulary,
)

Real = Callable[[str], Vocabulary]
STORIES = Path(__file__).parents[3] / "shared/real/stories260k"
CASES = [
    ("mistral_v1", "<|im_end|>"),  # a new token
    ("mistral_v3", "[/INST]"),  # one that its pieces have
    ("llama3", "<|eot_id|>"),
    ("llama2", "▁the"),  # an ordinary piece
    ("gpt2", "<|im_end|>"),  # bos is eos
]
ENTRY = {
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}


def case(real: Real, name: str, text: str) -> Vocabulary:
    vocabulary = real(name)
    return vocabulary if text in vocabulary.ids else with_tokens(vocabulary, text)


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """What may lie beside a tokenizer.json: all the forms in which folders tell their eos, or do not."""
    eos = draw(st.sampled_from([2, [2, 5], None]))
    config: dict[str, Any] = {"model_type": "llama", "bos_token_id": 1, "torch_dtype": "float16"}
    config |= draw(st.sampled_from([{"eos_token_id": eos}, {}]))
    config |= draw(st.sampled_from([{}, {"text_config": {"eos_token_id": eos, "rope_theta": 1e6}}]))
    generation = {"_from_model_config": True, "eos_token_id": eos, "temperature": 0.6}
    for key in draw(st.sets(st.sampled_from(sorted(generation)))):
        del generation[key]
    table: dict[str, Any] = {"eos_token": {"content": "</s>", **ENTRY}}
    forms = st.sampled_from(
        [table, {"eos_token": "</s>", "pad_token": "</s>"}, {"pad_token": "</s>"}]
    )
    decoder = {"added_tokens_decoder": {"2": {"content": "</s>", **ENTRY}}}
    told = (
        draw(forms) | draw(st.sampled_from([{}, decoder])) | {"tokenizer_class": "LlamaTokenizer"}
    )
    return {
        CONFIG: config,
        GENERATION: draw(st.sampled_from([generation or None, None])),
        SETTINGS: draw(st.sampled_from([told, None])),
        SPECIALS: draw(st.one_of(st.none(), forms)),
    }


@pytest.mark.parametrize(("name", "text"), CASES)
def test_every_file_agrees_on_the_eos(real: Real, name: str, text: str) -> None:
    tokens = case(real, name, text)

    @settings(max_examples=8)  # a vocabulary is parsed and written in each
    @given(folders())
    def agree(files: dict[str, Any]) -> None:
        before = with_files(tokens, files)
        edits = stopped(before, [], StopSection(eos=text, also="none"), {}, "r.yaml:3")
        after = with_files(before, edits)
        eos = before.ids[text]
        assert after.named("eos_token") == text
        assert after.ids[text] == eos
        assert after.stop_ids == (eos,)
        assert (
            after.settings["tokenizer_class"] == "PreTrainedTokenizerFast" or SETTINGS not in edits
        )
        sections = [after.config.get("text_config"), after.config]
        told = [t["eos_token_id"] for t in sections if t and "eos_token_id" in t]
        assert told
        assert all(value in (eos, [eos]) for value in told)
        if after.specials is not None:
            content = after.specials["eos_token"]
            assert text in (content, isinstance(content, dict) and content["content"])
        assert "_from_model_config" not in (after.generation or {}) or GENERATION not in edits
        assert [t.special for t in after.added if t.id == eos] == [True]
        # nothing else moves: other keys keep their values and order, and a second time changes nothing
        assert after.texts == before.texts
        mine = ("eos_token_id", "eos_token", "_from_model_config", "tokenizer_class")
        for old, new in ((before.config, after.config), (before.settings, after.settings)):
            kept = [
                (k, v)
                for k, v in old.items()
                if k not in (*mine, "text_config", "added_tokens_decoder")
            ]
            assert [(k, v) for k, v in new.items() if (k, v) in kept] == kept
        assert stopped(after, [], StopSection(eos=text, also="none"), {}, "") == {}

    agree()


def appends(vocabulary: Vocabulary, kind: str) -> Vocabulary:
    """Its tokenizer puts bos before a text and eos after it, said in one of the ways there are."""
    bos, eos = str(vocabulary.named("bos_token")), str(vocabulary.named("eos_token"))
    ids = vocabulary.ids
    token = {t: {"SpecialToken": {"id": t, "type_id": 0}} for t in (bos, eos)}
    a, b = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [token[bos], a, token[eos]],
        "pair": [token[bos], a, token[eos], b, token[eos]]
        if bos != eos
        else [token[bos], a, b, token[eos]],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (bos, eos)},
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    made = {
        "template": template,
        "sequence": {"type": "Sequence", "processors": [byte_level, template]},
        "roberta": {
            "type": "RobertaProcessing",
            "sep": [eos, ids[eos]],
            "cls": [bos, ids[bos]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
    }[kind]
    return with_files(vocabulary, {TOKENIZER: {**vocabulary.tokenizer, "post_processor": made}})


@pytest.mark.parametrize("kind", ["template", "sequence", "roberta"])
@pytest.mark.parametrize(("name", "text"), CASES)
def test_tokenizers_append_the_new_eos_and_keep_bos(
    real: Real, name: str, text: str, kind: str
) -> None:
    from tokenizers import Tokenizer

    before = appends(case(real, name, text), kind)
    if kind == "roberta" and before.named("bos_token") == before.named("eos_token"):
        pytest.skip("sep and cls are one token: which of them is the eos cannot be told apart")
    edits = stopped(before, [], StopSection(eos=text), {}, "")
    after = with_files(before, edits)
    old, new = (Tokenizer.from_str(json.dumps(dict(v.tokenizer))) for v in (before, after))
    for pair in ([], ["over"]):
        ids = [tokenizer.encode("a merge", *pair).ids for tokenizer in (old, new)]
        assert ids[0][-1] == before.ids[str(before.named("eos_token"))]
        assert ids[1][0] == ids[0][0]
        assert ids[1][-1] == before.ids[text]
        assert len(ids[0]) == len(ids[1])


@pytest.mark.parametrize(("name", "text"), CASES)
@pytest.mark.parametrize("stale", [True, False])
def test_transformers_loads_what_was_written(
    real: Real, tmp_path: Path, name: str, text: str, stale: bool
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    files = {CONFIG: {"model_type": "llama", "eos_token_id": 2}}
    if stale:  # it would override tokenizer_config.json
        files[SPECIALS] = {"eos_token": str(real(name).named("eos_token"))}
    before = with_files(case(real, name, text), files)
    after = with_files(before, stopped(before, [before], StopSection(eos=text), {}, ""))
    folder = laid_out(after, tmp_path / "edited")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == text
    assert tokenizer.eos_token_id == before.ids[text]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [before.ids[text], 2]
    ids = tokenizer.encode("Nun, vier Modelle" + text, add_special_tokens=False)
    raw = AutoTokenizer.from_pretrained(laid_out(before, tmp_path / "before"))
    assert ids[:-1] == raw.encode("Nun, vier Modelle", add_special_tokens=False)
    assert ids[-1] == before.ids[text]
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == "Nun,vierModelle"


def german(real: Real) -> list[Vocabulary]:
    """Four fine-tunes of one model: two stop at 2, two at 32000."""
    plain = real("mistral_v1")
    chatty = with_tokens(plain, "<|im_end|>", "<|im_start|>")
    told = [(plain, 2, None), (chatty, 32000, 32000), (chatty, 2, [32000]), (plain, 2, 2)]
    return [
        with_files(v, {CONFIG: {"eos_token_id": c}, GENERATION: g and {"eos_token_id": g}})
        for v, c, g in told
    ]


def test_a_merge_stops_wherever_a_parent_did(real: Real) -> None:
    parents = german(real)
    result = with_files(parents[1], {GENERATION: {"top_p": 0.9, "eos_token_id": 32000}})
    edits = stopped(result, parents, StopSection(eos="<|im_end|>"), {}, "")
    assert list(edits) == [GENERATION, SETTINGS]  # the rest says so already
    assert json.loads(edits[GENERATION]) == {"top_p": 0.9, "eos_token_id": [32000, 2]}
    assert list(json.loads(edits[GENERATION])) == ["top_p", "eos_token_id"]
    listed = stopped(result, parents, StopSection(eos="</s>", also=["<|im_start|>"]), {}, "")
    assert json.loads(listed[GENERATION])["eos_token_id"] == [2, 32001]
    alone = stopped(result, parents, StopSection(eos="</s>", also="none"), {}, "")
    assert json.loads(alone[GENERATION])["eos_token_id"] == [2]


def test_stop_tokens_are_matched_by_text_and_alias(real: Real) -> None:
    plain, other = real("mistral_v1"), with_tokens(real("mistral_v1"), "<x>", "<|end_of_turn|>")
    result = with_tokens(plain, "<|im_end|>")
    parent = with_files(other, {GENERATION: {"eos_token_id": [32001, 2]}})
    alias = {"<|im_end|>": ["<|end_of_turn|>"]}
    edits = stopped(result, [parent], StopSection(eos="</s>"), alias, "")
    assert json.loads(edits[GENERATION])["eos_token_id"] == [2, 32000]
    with pytest.raises(
        PlanError, match=r"r.yaml:7: mistral_v1 stops at '<\|end_of_turn\|>', which"
    ):
        stopped(result, [parent], StopSection(eos="</s>"), {}, "r.yaml:7")
    lost = with_files(plain, {GENERATION: {"eos_token_id": 40000}})
    with pytest.raises(PlanError, match="stops at 40000, which is no token"):
        stopped(result, [lost], StopSection(eos="</s>"), {}, "")


def test_without_an_eos_only_the_list_of_generation_grows(real: Real) -> None:
    parents = german(real)
    result = with_files(
        parents[1], {CONFIG: {"bos_token_id": 1, "eos_token_id": 32000}, GENERATION: None}
    )
    edits = stopped(result, parents, StopSection(), {}, "")
    assert {k: json.loads(v) for k, v in edits.items()} == {
        GENERATION: {"bos_token_id": 1, "eos_token_id": [32000, 2]}
    }
    assert stopped(with_files(result, edits), parents, StopSection(), {}, "") == {}
    assert stopped(result, [result], StopSection(), {}, "") == {}
    forgotten = with_files(result, {GENERATION: {"top_p": 0.9}})  # generate would never stop
    edits = stopped(forgotten, [], StopSection(also="none"), {}, "")
    assert json.loads(edits[GENERATION]) == {"top_p": 0.9, "eos_token_id": [32000]}


def test_what_only_json_can_hold_is_kept(real: Real) -> None:
    half = b'{"eos_token": "</s>", "note": "\\ud800 \xc3\xa4"}'
    edits = stopped(
        with_files(real("mistral_v1"), {SETTINGS: half}), [], StopSection(eos="<s>"), {}, ""
    )
    assert json.loads(edits[SETTINGS])["note"] == "\ud800 ä"


def test_an_unknown_text_is_refused_with_the_nearest(real: Real) -> None:
    result = with_tokens(real("mistral_v1"), "<|im_start|>")
    with pytest.raises(
        PlanError, match=r"r:1: stop.eos is '<\|im_end\|>'.*did you mean '<\|im_start\|>'"
    ):
        stopped(result, [], StopSection(eos="<|im_end|>"), {}, "r:1")
    with pytest.raises(PlanError, match=r"stop\.also is 'bye bye'"):
        stopped(result, [], StopSection(also=["bye bye"]), {}, "")


def test_an_empty_section_is_refused_and_an_empty_table_stops_where_any_model_does(
    real: Real,
) -> None:
    text = "merge_method: passthrough\nmodels: [{model: a}]\nstop:"
    with pytest.raises(
        RecipeError, match=r"recipe:3: stop is empty; it must have eos, also or unify"
    ):
        parse_recipe(text)
    section = parse_recipe(f"{text} {{}}").sections.stop
    assert section == StopSection()
    parents = german(real)
    edits = stopped(with_files(parents[1], {GENERATION: None}), parents, section, {}, "")
    assert json.loads(edits[GENERATION])["eos_token_id"] == [32000, 2]


def test_a_real_model_stops_at_its_new_eos(tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip("the real model does not lie beside the repository")
    import torch
    from transformers import AutoModelForCausalLM

    def greedy(folder: Path) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        found = model.generate(torch.tensor([[1, 403, 407]]), max_new_tokens=40, do_sample=False)
        return [int(i) for i in found[0]]

    before = read_vocabulary("stories", folder_files(STORIES))
    assert before is not None
    told = greedy(STORIES)
    token = next(i for i in told[12:] if i not in told[:12])
    after = with_files(
        before, stopped(before, [before], StopSection(eos=before.texts[token]), {}, "")
    )
    folder = laid_out(after, tmp_path / "edited")
    (folder / "model.safetensors").symlink_to(STORIES / "model.safetensors")
    assert greedy(folder) == told[: told.index(token) + 1]
