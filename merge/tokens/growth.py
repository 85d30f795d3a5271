"""A tokenizer's files with tokens appended: edited as data, and read again by `tokenizers` as a check."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from merge.errors import PlanError
from merge.tokens.library import library_errors, read_tokenizer
from merge.tokens.meaning import model_type
from merge.tokens.vocabulary import (
    ADDED,
    FLAGS,
    SETTINGS,
    TOKENIZER,
    AddedToken,
    Vocabulary,
    verbatim_settings,
)

New = Mapping[str, AddedToken | None]  # by text, in order of id; None: an ordinary piece
PARTS = ("normalizer", "pre_tokenizer", "decoder")
SPELLING = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


def grown_files(
    source: Vocabulary,
    others: Sequence[Vocabulary],
    new: New,
    raised: Sequence[AddedToken],
    where: str,
) -> dict[str, bytes]:
    """The files of `source` that change when `new` is appended, ids from source.size on, and pieces that it
    has become the added tokens `raised`.

    Foreign pieces bring the merges of `others` that make them, after all of the source's. PlanError where
    `tokenizers` would give a token another id than it has here.
    """
    ids = {text: i for i, text in enumerate(new, source.size)}
    tokens = [(token.id, token) for token in raised]
    tokens += [(ids[text], token) for text, token in new.items() if token is not None]
    tokenizer = dict(source.tokenizer)
    tokenizer["added_tokens"] = [
        *(tokenizer.get("added_tokens") or ()),
        *({"id": i, "content": token.text} | _flags(token) for i, token in tokens),
    ]
    everything = {**source.ids, **ids}
    if None in new.values():
        tokenizer["model"] = _grown_bpe(source, others, everything)
    moved = moved_token(tokenizer, everything, where)
    if moved is not None and None not in new.values():
        tokenizer["model"] = _with_all(source, everything, where)
        moved = moved_token(tokenizer, everything, where)
    if moved is not None:
        raise PlanError(
            f"{where}: {source.label}: {moved!r} has id {everything[moved]}, but another one once tokens are "
            "appended; take a tokenizer without holes between its ids, or specials: base"
        )
    return {TOKENIZER: _json(tokenizer, where)} | _beside(source, tokens, where)


def mixing_problem(source: Vocabulary, other: Vocabulary) -> str | None:
    """Why pieces of `other` cannot be added to those of `source`, or None."""
    for vocabulary in (source, other):
        if (kind := model_type(vocabulary)) != "BPE":
            return (
                f"{vocabulary.label} has a {kind} vocabulary; only BPE vocabularies can be united"
            )
    for key in PARTS:
        if source.tokenizer.get(key) != other.tokenizer.get(key):
            return f"its {key} is not that of {source.label}"
    for key in SPELLING:
        a, b = (v.tokenizer["model"].get(key) or None for v in (source, other))
        if a != b:
            return f"its {key} is {b!r}, not {a!r} as in {source.label}"
    return None


def moved_token(tokenizer: Mapping[str, Any], ids: Mapping[str, int], where: str) -> str | None:
    """The first token that the library `tokenizers` reads with another id than in `ids`, or None."""
    with library_errors(f"{where}: the united vocabulary"):
        read = read_tokenizer(tokenizer).get_vocab()
    return next((text for text, i in ids.items() if read.get(text) != i), None)


def _grown_bpe(
    source: Vocabulary, others: Sequence[Vocabulary], ids: Mapping[str, int]
) -> dict[str, Any]:
    """The BPE model of all tokens. Added tokens are in it too: `tokenizers` numbers those that are not
    from the number of pieces on.

    ignore_merges stays the source's: of Llama 3's pieces, which have it, no merges reach 695.
    """
    model = dict(source.tokenizer["model"])
    prefix = len(model.get("continuing_subword_prefix") or "")
    merges = dict.fromkeys(_merges(source))
    for other in (v for v in others if mixing_problem(source, v) is None):
        for left, right in _merges(other):
            if left in ids and right in ids and left + right[prefix:] in ids:
                merges.setdefault((left, right))
    return model | {"vocab": dict(ids), "merges": [*map(list, merges)]}


def _merges(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """Raises PlanError for what is no pair."""
    for merge in vocabulary.merges:
        match merge:
            case [str(left), str(right)]:
                yield left, right
            case _:
                raise PlanError(
                    f"{vocabulary.label}: {TOKENIZER}: {merge!r} is no merge of two pieces"
                )


def _with_all(source: Vocabulary, ids: Mapping[str, int], where: str) -> dict[str, Any]:
    """The model with every added token in its vocabulary, where an id is told and not counted."""
    model = dict(source.tokenizer["model"])
    if not isinstance(model.get("vocab"), dict):
        raise PlanError(
            f"{where}: {source.label}: its ids have holes, and tokens cannot be appended to a "
            f"{model_type(source)} vocabulary with holes; say specials: base"
        )
    return model | {"vocab": dict(ids)}


def _beside(
    source: Vocabulary, tokens: Iterable[tuple[int, AddedToken]], where: str
) -> dict[str, bytes]:
    """tokenizer_config.json and added_tokens.json, where the source has them."""
    found: dict[str, bytes] = {}
    if SETTINGS in source.files:
        settings = verbatim_settings(source)
        if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
            told = {str(i): {"content": token.text} | _flags(token) for i, token in tokens}
            settings["added_tokens_decoder"] = decoder | told
        found[SETTINGS] = _json(settings, where, indent=2)
    if ADDED in source.files:
        texts = {token.text: token.id for token in source.added}
        found[ADDED] = _json(texts | {token.text: i for i, token in tokens}, where, indent=2)
    return found


def _flags(token: AddedToken) -> dict[str, bool]:
    return {key: getattr(token, key) for key in FLAGS}


def _json(data: Mapping[str, Any], where: str, indent: int | None = None) -> bytes:
    separators = (",", ":") if indent is None else None
    try:
        return json.dumps(data, ensure_ascii=False, indent=indent, separators=separators).encode()
    except UnicodeEncodeError as error:
        raise PlanError(f"{where}: a token is not Unicode text ({error.reason})") from None
