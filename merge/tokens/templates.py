"""Chat templates: where a result's comes from, and whether the vocabulary can spell it and stops after it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merge.errors import PlanError, SourceError
from merge.lines import nearest
from merge.tokens.dialogue import Dialogue, own_text, probed
from merge.tokens.findings import Finding
from merge.tokens.library import library_errors, read_tokenizer
from merge.tokens.render import LONGEST
from merge.tokens.sections import TemplateSection
from merge.tokens.vocabulary import (
    LIKE_CONTROL,
    NAMES,
    OF_PROCESSORS,
    SETTINGS,
    TEMPLATE,
    Vocabulary,
    json_bytes,
    token_text,
    verbatim_settings,
)

# the templates in builtin/, each with its control tokens besides bos and eos. What the others write around
# messages is text: "[INST]" of Llama 2 and Mistral 7B v0.1, "<|user|>" of Zephyr.
BUILTIN: Mapping[str, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "vicuna": (),
    "zephyr": (),
}
SHOWN = 3  # texts told of in words


@dataclass(frozen=True)
class _Choice:
    """A template, how an error names it, and which texts must be tokens where it writes them. guessed: so
    must those that look like control tokens."""

    text: str
    told: str
    control: frozenset[str] = frozenset()
    guessed: bool = True


def templated(
    result: Vocabulary,
    parents: Mapping[str, Vocabulary],
    section: TemplateSection,
    where: str,
    beside: Path,
) -> dict[str, bytes]:
    """The files of `result` that change so that it has the template that `section` asks for, by name.

    result: with its stop tokens as they will be. Without `from` it keeps its own or, if its vocabulary cannot
    spell that, gets the first of the parents' that it can. beside: the folder of the recipe. Raises PlanError
    for a template that is not there, does not render, or writes control tokens that are none.
    """
    problems = []
    for choice in _choices(result, parents, section, where, beside):
        problem = _problem(result, choice, section.require_control_tokens)
        if not problem:
            return _placed(result, choice.text)
        problems.append(problem)
    if problems:
        raise PlanError(f"{where}: {problems[0]}")
    return {}


def template_findings(vocabulary: Vocabulary) -> list[Finding]:
    """What is wrong with the template of a model, or between it and the vocabulary; [] without one.

    Codes: template-twice, template-broken, template-unspellable, template-never-stops,
    template-prompt-differs, template-double-bos, template-unknown-text, template-id-beyond-rows."""
    twice = list(_twice(vocabulary))
    if vocabulary.template is None:
        return twice
    dialogues, problem = probed(vocabulary.template, _names(vocabulary))
    if problem:
        what = f"the chat template in {vocabulary.template_file} fails: {problem}"
        return [*twice, _finding(vocabulary, "template-broken", "error", what, problem=problem)]
    return [
        *twice,
        *_unspellable_finding(vocabulary, dialogues),
        *_never_stops(vocabulary, dialogues[0]),
        *_prompt_differs(vocabulary, dialogues[0]),
        *_of_ids(vocabulary, dialogues),
    ]


def _names(vocabulary: Vocabulary) -> dict[str, str]:
    return {name: text for name in NAMES if (text := vocabulary.named(name)) is not None}


def _spelled(vocabulary: Vocabulary) -> set[str]:
    """Texts that are one token each wherever they stand; loaders add the named ones."""
    named = {text for text in _names(vocabulary).values() if text in vocabulary.ids}
    return named | {token.text for token in vocabulary.added}


# Choosing


def _choices(
    result: Vocabulary,
    parents: Mapping[str, Vocabulary],
    section: TemplateSection,
    where: str,
    beside: Path,
) -> list[_Choice]:
    """What `section` names: one, or where it names none the result's own and the parents'."""
    if section.text is not None and section.from_ is not None:
        raise PlanError(f"{where}: chat_template has both from and text; give one of them")
    if section.text is not None:
        return [_Choice(section.text, "chat_template.text")]
    if section.from_ in (None, "auto"):
        own = [_of(v, "the chat template") for v in [result] if v.template is not None]
        return own + [_of(v, f"model:{k}") for k, v in parents.items() if v.template is not None]
    kind, _, name = str(section.from_).partition(":")
    if kind == "model":
        return [_of_model(parents, name, where)]
    if kind == "builtin":
        return [_of_builtin(name, where)]
    if kind == "file":
        return [_Choice(_file_text(name, where, beside), f"file:{name}")]
    what = f"{where}: chat_template.from is {section.from_!r}"
    raise PlanError(f"{what}; allowed: auto, model:NAME, builtin:NAME, file:PATH")


def _of(vocabulary: Vocabulary, told: str) -> _Choice:
    """What its own vocabulary has as control tokens it must have as such."""
    return _Choice(vocabulary.template or "", told, frozenset(vocabulary.control))


def _of_model(parents: Mapping[str, Vocabulary], name: str, where: str) -> _Choice:
    if name not in parents:
        what = f"{where}: chat_template.from names no model {name!r}{nearest(name, list(parents))}"
        raise PlanError(f"{what}; those with a tokenizer: {', '.join(parents)}")
    if parents[name].template is None:
        having = [label for label, parent in parents.items() if parent.template is not None]
        what = f"{where}: chat_template.from is model:{name}, which has no chat template"
        raise PlanError(f"{what}; those that have one: {', '.join(having) or 'none'}")
    return _of(parents[name], f"model:{name}")


def _of_builtin(name: str, where: str) -> _Choice:
    if name not in BUILTIN:
        what = f"{where}: no chat template {name!r} is built in{nearest(name, list(BUILTIN))}"
        raise PlanError(f"{what}; these are: {', '.join(BUILTIN)}")
    text = (Path(__file__).parent / "builtin" / f"{name}.jinja").read_text(encoding="utf-8")
    return _Choice(text, f"builtin:{name}", frozenset(BUILTIN[name]), guessed=False)


def _file_text(name: str, where: str, beside: Path) -> str:
    path = beside / name if (beside / name).is_file() else Path(name)
    try:
        if path.stat().st_size > LONGEST:
            raise PlanError(f"{where}: {path} has more than {LONGEST} bytes; it is no template")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{where}: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise PlanError(f"{where}: {path} is not UTF-8 text") from None


def _problem(result: Vocabulary, choice: _Choice, require: bool) -> str:
    """Why the result cannot have the template; "" if it can."""
    dialogues, problem = probed(choice.text, _names(result))
    if problem:
        return f"{choice.told} fails with this vocabulary: {problem}"
    lacking = _lacking(result, choice, dialogues) if require else ()
    if not lacking:
        return ""
    listed = ", ".join(repr(text) for text in lacking)
    return (
        f"{choice.told} writes {listed}, no single token of the result's vocabulary; add"
        f" tokenizer: {{{_adding(lacking)}}}, or say chat_template: {{require_control_tokens: false}}"
    )


def _lacking(result: Vocabulary, choice: _Choice, dialogues: Sequence[Dialogue]) -> tuple[str, ...]:
    """What the template writes as control tokens, and the result does not have as such."""
    spelled = _spelled(result)
    written = "\n".join(text for d in dialogues for text in (d.full, d.prompt))
    looks = _unspellable(result, dialogues) if choice.guessed else ()
    known = sorted(text for text in choice.control - spelled if text in written)
    return tuple(dict.fromkeys([*looks, *known]))


def _adding(texts: Iterable[str]) -> str:
    quoted = (json.dumps(text, ensure_ascii=False) for text in texts)
    return f"tokens: {{{', '.join(f'{text}: {{}}' for text in quoted)}}}"


def _placed(result: Vocabulary, text: str) -> dict[str, bytes]:
    """Into chat_template.jinja where there is one, and wherever else the folder has its template."""
    edits = {}
    if TEMPLATE in result.files and text != result.template:
        edits[TEMPLATE] = text.encode()
    told = result.settings.get("chat_template")
    new = _with_default(told, text)
    if new != told and (told is not None or TEMPLATE not in result.files):
        edits[SETTINGS] = json_bytes(verbatim_settings(result) | {"chat_template": new})
    if OF_PROCESSORS in result.files and text != result.template:
        edits[OF_PROCESSORS] = json_bytes({"chat_template": text})
    return edits


def _with_default(told: Any, text: str) -> Any:
    """`text`, or a list of named templates in which it is the default."""
    if not isinstance(told, list):
        return text
    entry = {"name": "default", "template": text}
    if not any(_is_default(other) for other in told):
        return [entry, *told]
    return [{**other, **entry} if _is_default(other) else other for other in told]


def _is_default(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("name") == "default"


# Findings


def _finding(
    vocabulary: Vocabulary,
    code: str,
    severity: Literal["error", "warning"],
    what: str,
    *,
    fix: str = "",
    **evidence: Any,
) -> Finding:
    told = {"file": vocabulary.template_file, **evidence}
    return Finding(code, severity, (vocabulary.label,), what, told, fix)


def _twice(vocabulary: Vocabulary) -> Iterator[Finding]:
    told = vocabulary.settings.get("chat_template")
    if isinstance(told, list):
        told = next((entry.get("template") for entry in told if _is_default(entry)), None)
    if vocabulary.template_file == TEMPLATE and told not in (None, vocabulary.template):
        what = f"{TEMPLATE} and {SETTINGS} have two templates that differ; the former counts"
        fix = f"chat_template: {{from: {json.dumps(f'model:{vocabulary.label}')}}}"
        files = [TEMPLATE, SETTINGS]
        yield _finding(vocabulary, "template-twice", "warning", what, fix=fix, files=files)


def _unspellable(vocabulary: Vocabulary, dialogues: Sequence[Dialogue]) -> tuple[str, ...]:
    """Texts that look like control tokens, are meant so, and are none.

    Meant so: an answer ends in one of their kind, or others of their kind are tokens. Otherwise they are text
    by design, as "[INST]" is to Llama 2 and "<|user|>" to Zephyr, whose answers end in eos."""
    marks = dict.fromkeys(mark for dialogue in dialogues for mark in dialogue.marks)
    spelled = _spelled(vocabulary)
    ends = {m.group() for d in dialogues if (m := LIKE_CONTROL.match(d.tails[-1]))}
    roles = set(_names(vocabulary).values())  # bos and eos are tokens with every template
    meant = {_kind(mark) for mark in marks if mark in spelled - roles}
    if not _stops(vocabulary, dialogues):
        meant |= {_kind(mark) for mark in ends}
    return tuple(mark for mark in marks if mark not in spelled and _kind(mark) in meant)


def _kind(mark: str) -> str:
    """Brackets, and whether there are bars in them."""
    return mark[0] + ("|" if mark[1] in "|｜" else "")


def _unspellable_finding(
    vocabulary: Vocabulary, dialogues: Sequence[Dialogue]
) -> Iterator[Finding]:
    """An error where the end of an answer is concerned; a model may have learnt the rest as text."""
    if not (texts := _unspellable(vocabulary, dialogues)):
        return
    listed = ", ".join(repr(text) for text in texts)
    what = f"the chat template writes {listed}, no single token of the vocabulary"
    ending = any(d.tails[-1].startswith(texts) for d in dialogues)
    fix = f"tokenizer:\n  {_adding(texts)}"
    severity: Literal["error", "warning"] = "error" if ending else "warning"
    yield _finding(vocabulary, "template-unspellable", severity, what, fix=fix, texts=list(texts))


def _stops(vocabulary: Vocabulary, dialogues: Sequence[Dialogue]) -> bool:
    """Whether a stop token follows an answer."""
    spelled = _spelled(vocabulary)
    stops = [vocabulary.texts.get(i) for i in vocabulary.stop_ids]
    texts = tuple(text for text in stops if text in spelled)
    return any(tail.startswith(texts) for d in dialogues for tail in d.tails)


def _never_stops(vocabulary: Vocabulary, dialogue: Dialogue) -> Iterator[Finding]:
    """An error where another control token follows an answer; a warning where none does, since a model may
    have learnt more than its template shows. A model without stop tokens is another finding."""
    if not vocabulary.stop_ids or _stops(vocabulary, [dialogue]):
        return
    tail = dialogue.tails[-1]
    text = _first_control(vocabulary, tail)
    stops = f"generate stops at {list(vocabulary.stop_ids)}"
    evidence: dict[str, Any] = {"after": text or tail[:40], "stop_ids": list(vocabulary.stop_ids)}
    if not text:
        what = f"no stop token follows the assistant's text in the chat template; {stops}"
        yield _finding(vocabulary, "template-never-stops", "warning", what, **evidence)
        return
    what = f"after the assistant's text comes {text!r}, "
    if text in _spelled(vocabulary):
        fix = f"stop: {{eos: {json.dumps(text, ensure_ascii=False)}}}"
        what += f"token {vocabulary.ids[text]}; {stops}"
    else:
        fix = ""
        what += f"which is no single token; {stops}"
    yield _finding(vocabulary, "template-never-stops", "error", what, fix=fix, **evidence)


def _first_control(vocabulary: Vocabulary, tail: str) -> str:
    """The token, or what looks like one, that `tail` starts with; "" where it is text."""
    tokens = [text for text in _spelled(vocabulary) if text and tail.startswith(text)]
    match = LIKE_CONTROL.match(tail)
    return max(tokens, key=len) if tokens else match.group() if match else ""


def _prompt_differs(vocabulary: Vocabulary, dialogue: Dialogue) -> Iterator[Finding]:
    """Warnings: a template may mean it. What it lacks is how answers start if the first one does so, too."""
    code, between = "template-prompt-differs", dialogue.unasked
    if between is None:
        what = "the generation prompt of the chat template is not how an answer starts in it"
        yield _finding(vocabulary, code, "warning", what, prompt=dialogue.prompt[-80:])
        return
    marks = (m.group() for m in LIKE_CONTROL.finditer(between))
    if lacking := [mark for mark in marks if mark in dialogue.prompt]:
        what = f"the generation prompt lacks {lacking[0]!r}, with which answers start in the chat template"
        yield _finding(vocabulary, code, "warning", what, lacks=between[:80])


def _of_ids(vocabulary: Vocabulary, dialogues: Sequence[Dialogue]) -> Iterator[Finding]:
    """What is wrong with the ids that a dialogue becomes: two bos, lost text, rows that do not exist."""
    texts = [text for d in dialogues for text in (d.full, d.prompt)]
    try:
        with library_errors(vocabulary.label):
            tokenizer = read_tokenizer(vocabulary.tokenizer)
            read = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
            encoded = [found.ids for found in read]
    except SourceError as error:
        what = str(error).removeprefix(f"{vocabulary.label}: ")
        yield _finding(vocabulary, "tokenizer-broken", "error", what)
        return
    bos = vocabulary.ids.get(vocabulary.named("bos_token") or "")
    if bos is not None and any(ids[:2] == [bos, bos] for ids in encoded):
        what = f"the chat template starts with bos (token {bos}) twice"
        yield _finding(vocabulary, "template-double-bos", "error", what, id=bos)
    # of the first dialogue: a template that takes text writes out the tables of a message in parts
    if lost := _lost(vocabulary, texts[:2], read[:2]):
        listed = ", ".join(map(repr, lost[:SHOWN])) + ", ..." * (len(lost) > SHOWN)
        what = (
            f"the chat template writes {listed}, for which there is no token: it is read as unknown"
        )
        yield _finding(vocabulary, "template-unknown-text", "warning", what, texts=lost)
    beyond = sorted({i for ids in encoded for i in ids if i >= (vocabulary.rows or i + 1)})
    if beyond:
        what = (
            f"the chat template writes token {beyond[0]}; the embedding has {vocabulary.rows} rows"
        )
        yield _finding(vocabulary, "template-id-beyond-rows", "error", what, ids=beyond)


def _lost(vocabulary: Vocabulary, texts: Sequence[str], read: Sequence[Any]) -> list[str]:
    """What a template wrote itself of `texts` and was `read` as the token for what is unknown, but for that
    token's own text. A model may have learnt to read a template so."""
    model = vocabulary.tokenizer.get("model", {})
    names = {vocabulary.named("unk_token"), token_text(model.get("unk_token"))} - {None}
    ids = (model.get("unk_id"), *(vocabulary.ids.get(name) for name in names if name))
    unknown = {i for i in ids if isinstance(i, int)}
    parts = [
        own_text(text, *place)
        for text, found in zip(texts, read, strict=True)
        for i, place in zip(found.ids, found.offsets, strict=True)
        if i in unknown
    ]
    return [part for part in dict.fromkeys(parts) if part and part.strip() not in names]
