"""Is one folder whole? What its files say about tokens, against each other and against its tensors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from merge.anatomy import NUMBER, embedding_and_head
from merge.sources import TensorInfo
from merge.sources.model import text_config
from merge.tokens.findings import Finding, Severity
from merge.tokens.vocabulary import (
    CONFIG,
    GENERATION,
    NAMES,
    SETTINGS,
    SPECIALS,
    TOKENIZER,
    Vocabulary,
    token_text,
)

WITH_HEAD = ("ForCausalLM", "LMHeadModel")  # architectures that cannot do without


def file_findings(
    vocabulary: Vocabulary, tensors: Mapping[str, TensorInfo] | None
) -> Iterator[Finding]:
    """What is wrong between the files, and, where `tensors` are known, between files and headers."""
    yield from _eos(vocabulary)
    yield from _stale_map(vocabulary)
    yield from _moved_ids(vocabulary)
    yield from _decoder(vocabulary)
    yield from _post_processor(vocabulary)
    yield from _pad_is_eos(vocabulary)
    yield from _beyond_rows(vocabulary, tensors)
    if tensors is not None:
        yield from _tying(vocabulary, tensors)


def control_tokens(vocabulary: Vocabulary) -> list[str]:
    """The control tokens that the chat template writes."""
    template = vocabulary.template or ""
    return sorted({text for text in vocabulary.control if text in template})


def eos_places(vocabulary: Vocabulary) -> dict[str, tuple[int, ...]]:
    """Ids of the end token by the file that names it; files that name none, or one that is not there,
    are left out."""
    text = _eos_text(vocabulary)
    named = None if text is None else vocabulary.ids.get(text)
    places = {
        GENERATION: () if vocabulary.generation is None else vocabulary.stop_ids,
        CONFIG: replace(vocabulary, generation=None).stop_ids,
        SETTINGS: () if named is None else (named,),
    }
    return {name: ids for name, ids in places.items() if ids}


def stop_file(vocabulary: Vocabulary) -> str:
    """The file that `generate` takes the end tokens from."""
    return CONFIG if vocabulary.generation is None else GENERATION


def stop_lines(text: str) -> str:
    """The lines of a recipe that end texts at `text` in all files."""
    return f"stop:\n  eos: {quoted(text)}\n"


def quoted(text: str) -> str:
    """`text` as YAML reads it back, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _eos(vocabulary: Vocabulary) -> Iterator[Finding]:
    """Whether all files end texts at the same known tokens, and `generate` does so too."""
    text = _eos_text(vocabulary)
    fix = stop_lines(text) if text is not None and text in vocabulary.ids else ""
    if vocabulary.generation is not None and not vocabulary.stop_ids:
        what = f"{GENERATION} has no eos_token_id, and nothing else counts: it never stops"
        evidence = {"file": GENERATION}
        yield Finding("eos-missing", "error", (vocabulary.label,), what, evidence, fix)
    if vocabulary.ids:
        yield from _unknown_eos(vocabulary, text, fix)
    yield from _unlike_eos(vocabulary, text, fix)


def _unlike_eos(vocabulary: Vocabulary, text: str | None, fix: str) -> Iterator[Finding]:
    """Every file must name tokens at which `generate` stops; that it stops at others too is well."""
    places, told = eos_places(vocabulary), stop_file(vocabulary)
    appended = _appended(vocabulary)
    if appended and text and appended not in (text, vocabulary.named("sep_token")):
        places[f"the post-processor of {TOKENIZER}"] = (vocabulary.ids.get(appended, -1),)
    others = {name: ids for name, ids in places.items() if not {*ids} <= {*vocabulary.stop_ids}}
    if told in places and others:
        stops, rest = _spelt(vocabulary, places[told]), _listed(vocabulary, others)
        what = f"it stops at {stops} ({told}), but the end token is {rest}"
        yield Finding("eos-disagrees", "error", (vocabulary.label,), what, {"ids": places}, fix)


def _unknown_eos(vocabulary: Vocabulary, text: str | None, fix: str) -> Iterator[Finding]:
    lost = {
        name: unknown
        for name, ids in eos_places(vocabulary).items()
        if (unknown := [i for i in ids if i not in vocabulary.texts])
    }
    said = [f"{ids} ({name})" for name, ids in lost.items()]
    if text is not None and text not in vocabulary.ids:
        said.append(f"{text!r} ({SETTINGS})")
    if said:
        what = f"no token has the id or the text of the end token: {', '.join(said)}"
        yield Finding("eos-unknown", "error", (vocabulary.label,), what, {"ids": lost}, fix)


def _eos_text(vocabulary: Vocabulary) -> str | None:
    """eos_token of tokenizer_config.json, or of special_tokens_map.json where that has none; whether
    the two agree is another question."""
    files = (vocabulary.settings, vocabulary.specials or {})
    texts = (token_text(file.get("eos_token")) for file in files)
    return next((text for text in texts if text is not None), None)


def _spelt(vocabulary: Vocabulary, ids: tuple[int, ...]) -> str:
    return " and ".join(f"{i} {vocabulary.texts.get(i, '(no token)')!r}" for i in ids)


def _listed(vocabulary: Vocabulary, places: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{_spelt(vocabulary, ids)} ({name})" for name, ids in places.items())


def _processors(vocabulary: Vocabulary) -> list[Mapping[str, Any]]:
    outer = tables(vocabulary.tokenizer.get("post_processor"))
    return [inner for one in outer for inner in tables(one.get("processors", one))]


def _appended(vocabulary: Vocabulary) -> str | None:
    """The token that the tokenizer itself puts after a text."""
    for processor in _processors(vocabulary):
        for last in tables(processor.get("single"))[-1:]:
            for token in tables(last.get("SpecialToken")):
                return str(token.get("id"))
    return None


def _post_processor(vocabulary: Vocabulary) -> Iterator[Finding]:
    """Ids that the post-processor writes without looking their tokens up."""
    wrong = {}
    for processor in _processors(vocabulary):
        for told in tables(processor.get("special_tokens")):
            for token in tables(list(told.values())):
                right = [vocabulary.ids.get(text) for text in _texts(token.get("tokens"))]
                if token.get("ids") != right:
                    wrong[str(token.get("id"))] = (token.get("ids"), right)
    if wrong:
        said = ", ".join(f"{text!r} is {old}, not {new}" for text, (old, new) in wrong.items())
        what = f"the post-processor of {TOKENIZER} writes other ids than the vocabulary has: {said}"
        yield Finding("post-processor-ids", "error", (vocabulary.label,), what, {"ids": wrong})


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def tables(value: Any) -> list[Mapping[str, Any]]:
    """The tables in a list of a file, or a table by itself; what is none is not there."""
    listed = value if isinstance(value, list) else [value]
    return [table for table in listed if isinstance(table, dict)]


def _stale_map(vocabulary: Vocabulary) -> Iterator[Finding]:
    """An error where the map is what counts (see Vocabulary.named)."""
    files = (vocabulary.settings, vocabulary.specials or {})
    both = {name: tuple(token_text(file.get(name)) for file in files) for name in NAMES}
    stale = {n: texts for n, texts in both.items() if None not in texts and texts[0] != texts[1]}
    if not stale:
        return
    counts = "added_tokens_decoder" not in vocabulary.settings
    said = ", ".join(f"{name} is {b!r}, not {a!r}" for name, (a, b) in stale.items())
    what = f"{SPECIALS} differs from {SETTINGS}{' and is what counts' * counts}: {said}"
    text = stale.get("eos_token", (None,))[0]
    fix = stop_lines(text) if text else ""
    severity: Severity = "error" if counts else "warning"
    yield Finding("stale-special-tokens-map", severity, (vocabulary.label,), what, stale, fix)


def _moved_ids(vocabulary: Vocabulary) -> Iterator[Finding]:
    """The library that reads tokenizer.json gives an added token the id of the piece with its text, else it
    counts on from the number of pieces in the order of the file, whatever id the file says."""
    free, moved = len(vocabulary.pieces), {}
    for token in vocabulary.tokenizer.get("added_tokens") or ():
        gets = vocabulary.pieces.get(token["content"], free)
        free += token["content"] not in vocabulary.pieces
        if gets != token["id"]:
            moved[token["content"]] = (token["id"], gets)
    if moved:
        text, (told, gets) = next(iter(moved.items()))
        more = f", and {len(moved) - 1} more" * (len(moved) > 1)
        what = f"{TOKENIZER} says that {text!r} is {told}, but it is read as {gets}{more}"
        yield Finding("added-id-moves", "error", (vocabulary.label,), what, {"ids": moved})


def _decoder(vocabulary: Vocabulary) -> Iterator[Finding]:
    """added_tokens_decoder repeats the added tokens; transformers adds those that it finds there alone."""
    told = {
        i: token_text(token)
        for table in tables(vocabulary.settings.get("added_tokens_decoder"))
        for i, token in table.items()
    }
    unlike = {i: text for i, text in told.items() if text != vocabulary.texts.get(_number(i))}
    if unlike and vocabulary.ids:
        said = ", ".join(f"{i} is {text!r}" for i, text in [*unlike.items()][:3])
        what = f"added_tokens_decoder in {SETTINGS} differs from {TOKENIZER}: {said}, not there"
        yield Finding("added-tokens-differ", "error", (vocabulary.label,), what, {"ids": unlike})


def _number(key: str) -> int:
    return int(key) if NUMBER.fullmatch(key) else -1


def _pad_is_eos(vocabulary: Vocabulary) -> Iterator[Finding]:
    pad = vocabulary.named("pad_token")
    if pad is not None and pad == vocabulary.named("eos_token"):
        what = f"padding and the end of a text are one token, {pad!r}: training on it hides the end"
        evidence = {"ids": [vocabulary.ids.get(pad)]}
        yield Finding("pad-is-eos", "warning", (vocabulary.label,), what, evidence)


def _beyond_rows(
    vocabulary: Vocabulary, tensors: Mapping[str, TensorInfo] | None
) -> Iterator[Finding]:
    told = vocabulary_size(vocabulary.config)
    names = embedding_and_head(tensors or {})
    stored = {name: tensors[name].rows for name in names if name and tensors}
    rows = min([*stored.values()] or [vocabulary.rows or told or vocabulary.size])
    if beyond := sorted(i for i in vocabulary.texts if i >= rows):
        first = f"{beyond[0]} {vocabulary.texts[beyond[0]]!r}"
        what = f"{len(beyond)} tokens, the first {first}, have no row: there are {rows}"
        evidence = {"ids": beyond[:100], "rows": stored}
        yield Finding("id-beyond-rows", "error", (vocabulary.label,), what, evidence)
    if told is not None and (unlike := {n: r for n, r in stored.items() if r != told}):
        said = ", ".join(f"{name} has {count} rows" for name, count in unlike.items())
        what = f"{said}, but vocab_size is {told} in {CONFIG}: it will not load"
        yield Finding("vocab-size-differs", "error", (vocabulary.label,), what, {"rows": stored})


def _tying(vocabulary: Vocabulary, tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    """As far as headers tell; an untied head must be stored where the architecture has one."""
    embedding, head = embedding_and_head(tensors)
    tied = said_tied(vocabulary.config)
    kind = "".join(_texts(vocabulary.config.get("architectures"))[:1])
    what = ""
    if tied and embedding and head and tensors[embedding].shape != tensors[head].shape:
        what = f"{CONFIG} ties {head} to {embedding}, whose shape is another"
    if tied is False and embedding and not head and kind.endswith(WITH_HEAD):
        what = f"{CONFIG} says that the head is not tied, but none is stored beside {embedding}"
    if what:
        evidence = {"tensors": [embedding, head], "tie_word_embeddings": tied}
        yield Finding("tying-disagrees", "error", (vocabulary.label,), what, evidence)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """vocab_size of the text model, where config.json has it."""
    told = text_config(config).get("vocab_size", config.get("vocab_size"))
    return told if isinstance(told, int) else None


def said_tied(config: Mapping[str, Any]) -> bool | None:
    """tie_word_embeddings of the text model; None where config.json leaves it to the architecture."""
    said = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return None if said is None else bool(said)
