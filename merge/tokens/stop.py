"""At which tokens a model stops: eos by its text, and in every file where it lives."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge.anatomy import TEXT_SECTIONS
from merge.errors import PlanError
from merge.lines import nearest
from merge.tokens.sections import StopSection
from merge.tokens.vocabulary import (
    CONFIG,
    GENERATION,
    SETTINGS,
    SPECIALS,
    TOKENIZER,
    VERBATIM,
    AddedToken,
    Vocabulary,
    json_bytes,
    listed_ids,
    token_text,
    verbatim_settings,
)

# what transformers takes from config.json as long as there is no generation_config.json
GENERATING = (
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens", "do_sample", "temperature", "top_k", "top_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_beams", "early_stopping",
    "max_length", "min_length",
)  # fmt: skip


def stopped(
    result: Vocabulary,
    parents: Sequence[Vocabulary],
    section: StopSection,
    alias: Mapping[str, Sequence[str]],
    where: str,
) -> dict[str, bytes]:
    """The files of `result` that change so that it stops where `section` says, by name.

    Without `section.eos` the result keeps its own, and only generation_config.json learns what else stops.
    alias: text in the result -> texts that other models have for it. Raises PlanError for a text that the
    result's vocabulary lacks, and for a parent that stops at an id without a token.
    """
    more = _more(result, parents, section, alias, where)
    if section.eos is None:
        own = _own_ids(result)
        return _changed({GENERATION: (result.generation, _generation(result, _joined(own, more)))})
    token = _token(result, _known(result, section.eos, f"{where}: stop.eos"))
    ids = _joined([token.id], more)
    tables = {GENERATION: (result.generation, _generation(result, ids))}
    if CONFIG in result.files:
        tables[CONFIG] = (result.config, _config(result.config, ids))
    tables[SETTINGS] = (result.settings, _settings(result, token))
    if result.specials is not None:
        tables[SPECIALS] = (result.specials, _specials(result.specials, token))
    tables[TOKENIZER] = (result.tokenizer, _tokenizer(result, token))
    return _changed(tables)


def _changed(
    tables: Mapping[str, tuple[Mapping[str, Any] | None, Mapping[str, Any]]],
) -> dict[str, bytes]:
    return {name: json_bytes(new) for name, (old, new) in tables.items() if new != (old or {})}


def _joined(first: Iterable[int], more: Iterable[int]) -> list[int]:
    first = list(first)
    return [*first, *sorted(set(more) - set(first))]


def _more(
    result: Vocabulary,
    parents: Sequence[Vocabulary],
    section: StopSection,
    alias: Mapping[str, Sequence[str]],
    where: str,
) -> set[int]:
    """Ids of the result at which it stops besides its eos."""
    if section.also == "none":
        return set()
    if section.also != "auto":
        return {_known(result, text, f"{where}: stop.also") for text in section.also}
    return {i for parent in parents for i in _met(result, parent, alias, where)}


def _met(
    result: Vocabulary, parent: Vocabulary, alias: Mapping[str, Sequence[str]], where: str
) -> set[int]:
    """The parent's stop tokens as ids of the result; a token and what it is an alias of both count."""
    found = set()
    for i in _own_ids(parent):
        if (text := parent.texts.get(i)) is None:
            what = f"{where}: {parent.label} stops at {i}, which is no token of its vocabulary"
            raise PlanError(f"{what}; list the stop tokens of the result under stop.also")
        names = [text, *(stands for stands, others in alias.items() if text in others)]
        ids = {result.ids[name] for name in names if name in result.ids}
        if not ids:
            raise PlanError(
                f"{where}: {parent.label} stops at {text!r}, which the result's vocabulary lacks; take it in"
                " (tokenizer: {specials: union}), say under tokenizer.alias what stands for it, or list the"
                " stop tokens of the result under stop.also"
            )
        found |= ids
    return found


def _own_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Where a model stops, or was meant to where its generation_config.json does not say it."""
    if vocabulary.stop_ids:
        return vocabulary.stop_ids
    for table in _text_tables(vocabulary.config):
        if ids := listed_ids(table.get("eos_token_id")):
            return ids
    text = vocabulary.named("eos_token") or ""
    return (vocabulary.ids[text],) if text in vocabulary.ids else ()


def _text_tables(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """config.json and its sections for the language model."""
    return [
        config,
        *(config[key] for key in TEXT_SECTIONS if isinstance(config.get(key), dict)),
    ]


def _known(result: Vocabulary, text: str, where: str) -> int:
    if text in result.ids:
        return result.ids[text]
    close = nearest(text, [token.text for token in result.added])
    quoted = json.dumps(text, ensure_ascii=False)
    raise PlanError(
        f"{where} is {text!r}; the vocabulary has no such token{close}; name one that it has, or add it with"
        f" tokenizer: {{tokens: {{{quoted}: {{}}}}}}"
    )


def _token(result: Vocabulary, token_id: int) -> AddedToken:
    """The token as a special one, added or not so far."""
    added = {token.id: token for token in result.added}
    token = added.get(token_id) or AddedToken(token_id, result.texts[token_id])
    return replace(token, special=True)


def _config(config: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """A list stays a list, of all stop ids; one id stays one."""
    sections = [key for key in TEXT_SECTIONS if isinstance(config.get(key), dict)]
    new = {**config, **{key: _with_eos(config[key], ids) for key in sections}}
    return _with_eos(new, ids) if "eos_token_id" in config or not sections else new


def _with_eos(table: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    listed = isinstance(table.get("eos_token_id"), list)
    return {**table, "eos_token_id": list(ids) if listed else ids[0]}


def _generation(result: Vocabulary, ids: Sequence[int]) -> Mapping[str, Any]:
    """Without `_from_model_config`: transformers 4 would read config.json again instead of this file."""
    table = result.generation
    if tuple(ids) == result.stop_ids and (table is not None or len(ids) < 2):
        return table or {}
    if table is None:
        told = {
            key: value for t in reversed(_text_tables(result.config)) for key, value in t.items()
        }
        table = {key: told[key] for key in GENERATING if told.get(key) is not None}
    return {
        **{key: value for key, value in table.items() if key != "_from_model_config"},
        "eos_token_id": list(ids),
    }


def _settings(result: Vocabulary, token: AddedToken) -> Mapping[str, Any]:
    settings = result.settings
    new = dict(settings)
    if token_text(settings.get("eos_token")) != token.text:
        new["eos_token"] = token.text
    table = settings.get("added_tokens_decoder")
    if isinstance(table, dict):
        entry = table.get(str(token.id))
        entry = {**(entry if isinstance(entry, dict) else {}), **_flags(token)}
        new["added_tokens_decoder"] = {**table, str(token.id): entry}
    return verbatim_settings(result) | new | VERBATIM if new != settings else settings


def _specials(specials: Mapping[str, Any], token: AddedToken) -> Mapping[str, Any]:
    """The text, or a table with the token's flags, as it was."""
    old = specials.get("eos_token")
    if token_text(old) == token.text:
        return specials
    return {**specials, "eos_token": _flags(token) if isinstance(old, dict) else token.text}


def _flags(token: AddedToken) -> dict[str, Any]:
    keys = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": token.text, **{key: getattr(token, key) for key in keys}}


def _tokenizer(result: Vocabulary, token: AddedToken) -> dict[str, Any]:
    new = dict(result.tokenizer)
    if token not in result.added:
        others = [entry for entry in new.get("added_tokens") or () if entry["id"] != token.id]
        entry = {"id": token.id, **_flags(token)}
        new["added_tokens"] = sorted([*others, entry], key=lambda entry: entry["id"])
    old = result.named("eos_token")
    if old is not None and old != token.text and isinstance(new.get("post_processor"), dict):
        is_bos = old == result.named("bos_token")
        new["post_processor"] = _processor(new["post_processor"], old, token, is_bos)
    return new


def _processor(
    processor: Mapping[str, Any], old: str, token: AddedToken, is_bos: bool
) -> dict[str, Any]:
    """It appends `token` where it appended the text `old`, which may be what it puts first, too."""
    new = dict(processor)
    match processor:
        case {"type": "Sequence", "processors": list(parts)}:
            new["processors"] = [_processor(part, old, token, is_bos) for part in parts]
        case {"type": "BertProcessing" | "RobertaProcessing", "sep": [text, _]} if text == old:
            new["sep"] = [token.text, token.id]
        case {"type": "TemplateProcessing", "single": list(), "pair": list()}:
            for key in ("single", "pair"):
                new[key] = _pieces(processor[key], old, token.text, is_bos)
            new["special_tokens"] = _spelled(new, token)
    return new


def _pieces(pieces: Sequence[Any], old: str, text: str, is_bos: bool) -> list[Any]:
    """Where one token is both bos and eos, what follows the last sequence is the eos."""
    last = max((i for i, piece in enumerate(pieces) if "Sequence" in piece), default=-1)
    return [
        {"SpecialToken": {**piece["SpecialToken"], "id": text}}
        if piece.get("SpecialToken", {}).get("id") == old and (i > last or not is_bos)
        else piece
        for i, piece in enumerate(pieces)
    ]


def _spelled(processor: Mapping[str, Any], token: AddedToken) -> dict[str, Any]:
    """The ids of the tokens that the pieces name."""
    used = {p.get("SpecialToken", {}).get("id") for p in processor["single"] + processor["pair"]}
    kept = {k: v for k, v in (processor.get("special_tokens") or {}).items() if k in used}
    new = {"id": token.text, "ids": [token.id], "tokens": [token.text]}
    return {**kept, token.text: new} if token.text in used else kept
