"""Chat templates: those that are built in, where they go, and what is found wrong with them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from edited import laid_out, with_files, with_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import metaspace, vocabulary
from small_vocabularies import with_tokens as with_special

from merge.errors import PlanError
from merge.tokens.render import render, render_apart
from merge.tokens.sections import StopSection, TemplateSection
from merge.tokens.stop import stopped
from merge.tokens.templates import BUILTIN, template_findings, templated
from merge.tokens.vocabulary import (
    CONFIG,
    GENERATION,
    SETTINGS,
    TEMPLATE,
    TOKENIZER,
    Vocabulary,
)

Real = Callable[[str], Vocabulary]
Messages = list[dict[str, str]]
PUBLISHED = Path(__file__).parents[3] / "shared/real/tokenizers/templates/chat_templates"
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
# built in -> published. The published one of Gemma starts without bos, that of Mistral puts the system
# message before [INST]; the models' makers write it inside, as in the text that a test below spells out.
SAME = {
    "alpaca": "alpaca", "chatml": "chatml", "gemma": "gemma-it", "llama2": "llama-2-chat",
    "llama3": "llama-3-instruct", "mistral": "mistral-instruct", "phi3": "phi-3", "vicuna": "vicuna",
    "zephyr": "zephyr",
}  # fmt: skip
FULL = [
    ("system", "Be brief."),
    ("user", " Hi\n"),
    ("assistant", "Hello."),
    ("user", "Bye"),
    ("assistant", "So?"),
]
HERE = Path()


def chat(*turns: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in turns]


def builtin(name: str) -> str:
    return (Path(templated.__code__.co_filename).parent / "builtin" / f"{name}.jinja").read_text()


def published(name: str) -> str:
    """As its makers publish it: the indentation and the line ends are for reading."""
    if not PUBLISHED.is_dir():
        pytest.skip("the published templates do not lie beside the repository")
    text = (PUBLISHED / f"{name}.jinja").read_text()
    if text.startswith("{%-"):  # it says itself what white space goes
        return text
    return text.replace("    ", "").replace("\n", "")


def written(template: str, messages: Messages, prompt: bool) -> str:
    asked = {"messages": messages, "generation_prompt": prompt}
    return render(template, NAMES, [asked])[0]["text"]


def rendered(vocabulary: Vocabulary, messages: Messages, *, generation_prompt: bool) -> str:
    """What its template makes of messages, in the process that templates run in."""
    asked = {"messages": messages, "generation_prompt": generation_prompt}
    named = ("bos_token", "eos_token", "unk_token", "pad_token")
    names = {name: text for name in named if (text := vocabulary.named(name)) is not None}
    return render_apart(vocabulary.template or "", names, [asked])[0]["text"]


def clean(real: Real, name: str) -> Vocabulary:
    """A model that this template fits: bos, eos, control tokens, and a stop token that ends its answers."""
    base = real("llama3" if name == "llama3" else "mistral_v1")
    vocabulary = with_tokens(base, *(t for t in BUILTIN[name] if t not in base.ids))
    ends = [t for t in BUILTIN[name] if "end" in t or "eot" in t]
    ends = [t for t in ends if "header" not in t] or [str(vocabulary.named("eos_token"))]
    files = {
        TEMPLATE: builtin(name).encode(),
        GENERATION: {"eos_token_id": [vocabulary.ids[ends[0]]]},
    }
    return with_files(vocabulary, files)


def told(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in template_findings(vocabulary)]


@pytest.mark.parametrize("name", SAME)
def test_a_built_in_template_writes_what_the_published_one_does(name: str) -> None:
    ours, theirs = builtin(name), published(SAME[name])
    bos = "<s>" if name == "gemma" else ""

    @settings(max_examples=60)
    @given(
        st.lists(st.text(max_size=12), min_size=1, max_size=5),
        st.none() if name == "mistral" else st.none() | st.text(max_size=12),
        st.booleans(),
    )
    def same(turns: list[str], system: str | None, prompt: bool) -> None:
        messages = chat(*((("user", "assistant")[i % 2], text) for i, text in enumerate(turns)))
        messages = chat(*([("system", system)] if system is not None else [])) + messages
        assert written(ours, messages, prompt) == bos + written(theirs, messages, prompt)

    same()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mistral", "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Bye [/INST] So?</s>"),
        (
            "exaone",
            "[|system|]Be brief.[|endofturn|]\n[|user|] Hi\n\n[|assistant|]Hello.[|endofturn|]\n"
            "[|user|]Bye\n[|assistant|]So?[|endofturn|]\n[|assistant|]",
        ),
    ],
)
def test_a_built_in_template_writes_this(name: str, text: str) -> None:
    assert written(builtin(name), chat(*FULL), True) == text


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma", "alpaca", "vicuna"])
def test_formats_without_room_for_it_refuse_messages_out_of_turn(name: str) -> None:
    asked = {"messages": chat(("user", "a"), ("user", "b")), "generation_prompt": False}
    assert "take turns" in render(builtin(name), NAMES, [asked])[0]["error"]


@pytest.mark.parametrize("name", BUILTIN)
def test_a_model_that_a_template_fits_has_no_findings(real: Real, name: str) -> None:
    assert told(clean(real, name)) == []


@pytest.mark.parametrize(
    "change",
    [  # as reasoning models have it: the last answer shows its thought, or only the prompt asks for one
        ("message['content']", "THOUGHT + message['content']"),
        ("assistant\\n'", "assistant\\n<think>\\n'"),
        ("message['content']", "message['content'][0].text"),  # a model of images takes parts
        ("bos_token", "raise_exception('No system.') if messages[0].role == 'system' else bos_token"),
    ],
)  # fmt: skip
def test_other_ways_of_real_templates_are_no_findings(real: Real, change: tuple[str, str]) -> None:
    thought = "('<think>\\n</think>' if loop.last and message.role == 'assistant' else '')"
    template = builtin("chatml").replace(*change).replace("THOUGHT", thought)
    assert template != builtin("chatml")
    assert told(with_files(clean(real, "chatml"), {TEMPLATE: template.encode()})) == []


def every_template() -> Mapping[str, str]:
    theirs = {file.stem: published(file.stem) for file in sorted(PUBLISHED.glob("*.jinja"))}
    return theirs | {f"builtin:{name}": builtin(name) for name in BUILTIN}


def test_a_template_renders_as_in_transformers(real: Real, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary = with_files(real("mistral_v1"), {CONFIG: {"model_type": "llama"}})
    tokenizer = AutoTokenizer.from_pretrained(laid_out(vocabulary, tmp_path))
    for label, template in every_template().items():
        ours = with_files(vocabulary, {TEMPLATE: template.encode()})
        for messages, prompt in ((chat(*FULL), False), (chat(*FULL[1:4]), True)):
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
            )
            assert rendered(ours, messages, generation_prompt=prompt) == theirs, label


def test_tags_that_transformers_adds_render_as_there(real: Real, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = (
        "{%- set ns = namespace(n=0) %}{%- for m in messages %}\n"
        "  {%- if m.role == 'system' %}{%- continue %}{%- endif %}\n"
        "  {%- generation %}{% set ns.n = ns.n + 1 %}{{ [ns.n, m.content, dict(a='<ä>')] | tojson }}"
        "{%- endgeneration %}\n{%- endfor %}{{ tools is none }}{{ documents }}{{ x }}\n"
        "{% if true %}\n y\n  {% endif %}\n"
    )
    vocabulary = with_files(
        real("mistral_v1"), {TEMPLATE: template.encode(), CONFIG: {"model_type": "llama"}}
    )
    tokenizer = AutoTokenizer.from_pretrained(laid_out(vocabulary, tmp_path))
    theirs = tokenizer.apply_chat_template(chat(*FULL), tokenize=False)
    assert rendered(vocabulary, chat(*FULL), generation_prompt=False) == theirs


# Which template a result gets, and where it goes


def wanted(section: Any) -> TemplateSection:
    return TemplateSection.model_validate(section)


@pytest.mark.parametrize("name", BUILTIN)
def test_control_tokens_must_be_in_the_vocabulary(real: Real, name: str) -> None:
    plain = real("mistral_v1")
    if not BUILTIN[name]:
        assert templated(plain, {}, wanted(name), "r:1", HERE)
        return
    with pytest.raises(PlanError, match=f"r:1: builtin:{name} writes") as caught:
        templated(plain, {}, wanted(name), "r:1", HERE)
    for text in BUILTIN[name]:
        assert f'"{text}": {{}}' in str(caught.value)  # as the recipe would add it
    loose = wanted({"from": f"builtin:{name}", "require_control_tokens": False})
    assert templated(plain, {}, loose, "r:1", HERE)
    assert templated(with_tokens(plain, *BUILTIN[name]), {}, wanted(name), "r:1", HERE)


def test_what_a_model_has_as_control_tokens_the_result_must_have_too(real: Real) -> None:
    """[INST] is text to one Mistral and a control token to the next."""
    plain = real("mistral_v1")
    inst = {TEMPLATE: builtin("mistral").encode()}
    parents = {"text": with_files(plain, inst), "control": with_files(real("mistral_v3"), inst)}
    assert templated(plain, parents, wanted("model:text"), "", HERE)
    word = {"id": 32000, "content": "INST", "special": False, "normalized": True}
    table = {**plain.tokenizer, "added_tokens": [*plain.tokenizer["added_tokens"], word]}
    parents["word"] = with_files(
        parents["text"], {TOKENIZER: table}
    )  # added, but to control nothing
    assert templated(plain, parents, wanted("model:word"), "", HERE)
    with pytest.raises(
        PlanError, match=r"model:control writes '\[/INST\]', '\[INST\]', no single token"
    ):
        templated(plain, parents, wanted("model:control"), "", HERE)


@pytest.mark.parametrize("jinja", [None, b"old"])
@pytest.mark.parametrize(
    "listed",
    [
        None,
        "old",
        [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "old"}],
        [],
    ],
)
def test_it_goes_where_the_folder_has_its_template(
    real: Real, tmp_path: Path, jinja: bytes | None, listed: Any
) -> None:
    from transformers import AutoTokenizer

    settings = {**real("mistral_v1").settings, "chat_template": listed}
    if listed is None:
        del settings["chat_template"]
    files = {TEMPLATE: jinja, SETTINGS: settings, CONFIG: {"model_type": "llama"}}
    before = with_files(real("mistral_v1"), files)
    edits = templated(before, {}, wanted("zephyr"), "", HERE)
    after = with_files(before, edits)
    assert (TEMPLATE in edits) == (jinja is not None)
    assert after.template == builtin("zephyr")
    assert "template-twice" not in dict(told(after))
    if listed and isinstance(listed, list):
        assert {"name": "tool_use", "template": "tools"} in after.settings["chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(laid_out(after, tmp_path))
    assert tokenizer.get_chat_template() == builtin("zephyr")
    assert templated(after, {}, wanted("zephyr"), "", HERE) == {}


def test_a_processor_gets_the_same_template(real: Real) -> None:
    old = {"chat_template.json": {"chat_template": "old"}, TEMPLATE: b"old"}
    edits = templated(with_files(real("mistral_v1"), old), {}, wanted("zephyr"), "", HERE)
    assert json.loads(edits["chat_template.json"]) == {"chat_template": builtin("zephyr")}


def test_auto_takes_the_first_that_can_be_spelled(real: Real) -> None:
    plain = with_files(real("mistral_v1"), {GENERATION: {"eos_token_id": 2}})
    chatty = with_tokens(plain, "<|im_start|>", "<|im_end|>")
    chatml = with_files(chatty, {TEMPLATE: builtin("chatml").encode()})
    zephyr = with_files(plain, {TEMPLATE: builtin("zephyr").encode()})
    parents = {"plain": plain, "chatml": chatml, "zephyr": zephyr}
    for result, name in ((plain, "zephyr"), (chatty, "chatml")):
        edits = templated(result, parents, wanted("auto"), "", HERE)
        assert with_files(result, edits).template == builtin(name)
    own = with_files(plain, {TEMPLATE: builtin("vicuna").encode()})
    assert templated(own, {"zephyr": zephyr}, wanted("auto"), "", HERE) == {}
    assert templated(plain, {"plain": plain}, wanted("auto"), "", HERE) == {}
    with pytest.raises(PlanError, match=r"model:chatml writes '<\|im_start\|>', '<\|im_end\|>'"):
        templated(plain, {"chatml": chatml}, wanted("auto"), "", HERE)


def test_a_template_comes_from_a_file_or_as_text(real: Real, tmp_path: Path) -> None:
    plain = real("mistral_v1")
    (tmp_path / "mine.jinja").write_text(builtin("vicuna"))
    for section in ("file:mine.jinja", builtin("vicuna")):
        edits = templated(plain, {}, wanted(section), "", tmp_path)
        assert with_files(plain, edits).template == builtin("vicuna")


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("model:leao", r"no model 'leao' \(did you mean 'leo'\?\); those with a tokenizer: leo"),
        ("model:leo", "has no chat template; those that have one: none"),
        ("chatlm", r"no chat template 'chatlm' is built in \(did you mean 'chatml'\?\)"),
        ("file:none.jinja", r"none\.jinja cannot be read \(No such file"),
        ("hub:x", "allowed: auto, model:NAME, builtin:NAME, file:PATH"),
        ("{% if %}", r"chat_template\.text fails with this vocabulary: .*line 1"),
        ("{{ messages[9].content + pad_token }}", "chat_template.text fails"),
        ("{{ bos_token }}", "it leaves out the messages"),
        ({"from": "auto", "text": "{{ x }}"}, "both from and text"),
    ],
)
def test_a_template_that_cannot_be_had_is_refused(
    real: Real, tmp_path: Path, section: Any, what: str
) -> None:
    parents = {"leo": real("mistral_v1")}
    with pytest.raises(PlanError, match=f"r:9: .*{what}"):
        templated(real("mistral_v1"), parents, wanted(section), "r:9", tmp_path)


# What is found wrong


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("chatml", {TEMPLATE: b"{% for %}"}, [("template-broken", "error")]),
        ("chatml", {TEMPLATE: b"{{ messages[0].nothing.more }}"}, [("template-broken", "error")]),
        ("chatml", {GENERATION: {"eos_token_id": 2}}, [("template-never-stops", "error")]),
        ("zephyr", {GENERATION: {"eos_token_id": 1}}, [("template-never-stops", "error")]),
        ("zephyr", {TEMPLATE: builtin("zephyr").replace(" + eos_token", "").encode()},
         [("template-never-stops", "warning")]),
        ("vicuna", {TEMPLATE: builtin("vicuna").replace(" + eos_token", "").encode()},
         [("template-never-stops", "warning")]),
        ("chatml", {TEMPLATE: builtin("chatml").replace("im_start", "im_begin").encode()},
         [("template-unspellable", "warning")]),
        ("mistral", {TEMPLATE: builtin("chatml").encode()},
         [("template-unspellable", "error"), ("template-never-stops", "error")]),
        ("chatml", {TEMPLATE: builtin("chatml").replace("assistant", "helper").encode()},
         [("template-prompt-differs", "warning")]),
        ("chatml", {TEMPLATE: builtin("chatml").replace("add_generation_prompt", "false").encode()},
         [("template-prompt-differs", "warning")]),
        ("llama2", {TEMPLATE: b"<s>" + builtin("llama2").encode()}, [("template-double-bos", "error")]),
        ("chatml", {SETTINGS: {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ 1 }}"}},
         [("template-twice", "warning")]),
    ],
)  # fmt: skip
def test_each_fault_has_its_own_code(
    real: Real, name: str, files: dict[str, Any], found: Any
) -> None:
    assert told(with_files(clean(real, name), files)) == found


def test_two_fine_tunes_that_disagree_make_a_whole_model(real: Real) -> None:
    """One speaks ChatML and stops at 32000, one speaks [INST] and stops at 2."""
    disco, kafka = clean(real, "chatml"), clean(real, "mistral")
    careless = with_files(disco, {TEMPLATE: kafka.files[TEMPLATE]})
    assert told(careless) == [("template-never-stops", "error")]
    section = StopSection(eos="<|im_end|>")
    stops = with_files(careless, stopped(careless, [disco, kafka], section, {}, ""))
    assert stops.stop_ids == (32001, 2)
    assert told(stops) == []  # [INST], and an answer ends in the new eos
    edits = templated(stops, {"disco": disco}, wanted("model:disco"), "", HERE)
    assert told(with_files(stops, edits)) == []


def test_text_of_the_template_without_a_token_is_found() -> None:
    """A line end that the vocabulary lacks; what the messages say is not the template's."""
    control = ("<|im_start|>", "<|im_end|>")
    roles = "system user assistant"
    for texts, lost in (
        ([roles], ["\n"]),
        ([f"{roles}\n"], []),
        (["user assistant\n"], ["y", "m"]),
    ):
        small = vocabulary(with_special(metaspace(texts, size=60), *control), eos_token=control[1])
        generation = {"eos_token_id": small.ids[control[1]]}
        files = {TEMPLATE: builtin("chatml").encode(), GENERATION: generation}
        found = template_findings(with_files(small, files))
        assert [f.code for f in found] == ["template-unknown-text"] * bool(lost)
        assert [text for f in found for text in f.evidence["texts"]] == lost


def test_the_name_of_the_unknown_itself_is_no_lost_text(real: Real) -> None:
    """GPT-2 has one token for the end, the beginning and what is unknown."""
    plain = real("gpt2")
    end = str(plain.named("eos_token"))
    files = {
        SETTINGS: {**plain.settings, "unk_token": end},
        GENERATION: {"eos_token_id": plain.ids[end]},
        TEMPLATE: builtin("vicuna").encode(),
    }
    assert told(with_files(plain, files)) == []


def test_ids_that_have_no_rows_are_found(real: Real) -> None:
    from dataclasses import replace

    whole = clean(real, "chatml")
    assert told(replace(whole, rows=32002)) == []
    assert told(replace(whole, rows=32001)) == [("template-id-beyond-rows", "error")]


def test_a_tokenizer_that_does_not_load_is_found(real: Real) -> None:
    whole = clean(real, "zephyr")
    broken = with_files(whole, {TOKENIZER: {"added_tokens": whole.tokenizer["added_tokens"]}})
    assert told(broken) == [("tokenizer-broken", "error")]


def test_a_model_without_template_has_no_findings(real: Real) -> None:
    assert told(real("mistral_v1")) == []


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 seconds"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "writes more than 1048576"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{{ raise_exception('not\nso') }}", "not so"),
        ("{{ " + "(" * 99999 + " }}", "recursion"),
    ],
)  # fmt: skip
def test_a_template_can_do_no_harm(real: Real, template: str, what: str) -> None:
    hostile = with_files(real("mistral_v1"), {TEMPLATE: template.encode()})
    (found,) = template_findings(hostile)
    assert (found.code, found.severity) == ("template-broken", "error")
    assert re.match(f"the chat template in chat_template.jinja fails: .*{what}", found.what)
