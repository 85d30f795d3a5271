"""Which tokens a result has, the files that say so, and which token of each model stands for which.

Of each model that a merge has, the ids of one, the source, are kept; tokens of the others are appended in
the order of models and of their ids, then new ones in the order of the recipe.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from merge.errors import PlanError
from merge.tokens.growth import New, grown_files, mixing_problem, moved_token
from merge.tokens.meaning import counterparts, own_id, scheme
from merge.tokens.sections import TokenizerSection
from merge.tokens.vocabulary import FLAGS, AddedToken, Vocabulary

LARGEST = 1 << 24  # tokens: 64 times the largest vocabulary known; a map of them takes 128 MiB


@dataclass(frozen=True)
class United:
    """`files`: those of the source that change, {} where nothing does. `size`: one more than the largest
    id. `maps`: of the source, then of the others, `[size] int64`: the model's own id of each token of the
    result, -1 where it has none or where the result has no token."""

    files: dict[str, bytes]
    size: int
    maps: tuple[NDArray[np.int64], ...]
    notes: tuple[str, ...]


def unite(
    source: Vocabulary, others: Sequence[Vocabulary], section: TokenizerSection, where: str
) -> United:
    """The tokens of the source and what `section` adds to them.

    section.source: "union" takes in the others' pieces too, where both are BPE and split text alike; with
    anything else the source's pieces are all. An added token occurs wherever its text does, so text with
    such a text in it has other ids than before, by design. PlanError, beginning with `where`.
    """
    everyone = (source, *others)
    for vocabulary in everyone:
        if vocabulary.size > LARGEST:
            raise PlanError(
                f"{where}: {vocabulary.label}: a token has id {vocabulary.size - 1}; ids below {LARGEST} "
                "are taken"
            )
    _check_alias(everyone, section, where)
    own = [_identity(source), *(counterparts(source, other, section.alias) for other in others)]
    if section.specials != "base" or section.source == "union":
        _check_flags(everyone, section, where)
    _check_named(source, section, where)
    new = _appended(source, others, own[1:], section, where)
    for text in section.alias:
        if text not in source.ids and text not in new:
            raise PlanError(f"{where}: alias: the result has no token {text!r}; give it in tokens")
    raised = _raised(source, section)
    files = grown_files(source, others, new, raised, where) if new or raised else {}
    tails = [np.array([own_id(v, t, section.alias) for t in new], np.int64) for v in everyone]
    maps = tuple(np.concatenate(parts) for parts in zip(own, tails, strict=True))
    notes = tuple(_notes(source, others, maps, new))
    return United(files, source.size + len(new), maps, notes)


def first_difference(a: Vocabulary, b: Vocabulary) -> str | None:
    """The first difference of `b` from `a` in the ids of its tokens, in words, by the ids of `a`."""
    if a.ids == b.ids:
        return None
    last = 1 << 62
    differ = (t for t in a.ids.keys() | b.ids.keys() if a.ids.get(t) != b.ids.get(t))
    text = min(differ, key=lambda t: (a.ids.get(t, last), b.ids.get(t, last), t))
    if text not in b.ids:
        return f"it lacks the token {text!r} (id {a.ids[text]})"
    if text not in a.ids:
        return f"it has the token {text!r} (id {b.ids[text]}) besides"
    return f"token {text!r} has id {b.ids[text]}, not {a.ids[text]}"


def _identity(source: Vocabulary) -> NDArray[np.int64]:
    found = np.full(source.size, -1, np.int64)
    held = np.array(sorted(source.texts), np.int64)
    found[held] = held
    return found


def _appended(
    source: Vocabulary,
    others: Sequence[Vocabulary],
    own: Sequence[NDArray[np.int64]],
    section: TokenizerSection,
    where: str,
) -> New:
    new: dict[str, AddedToken | None] = {}
    counted = {spelling: text for text, listed in section.alias.items() for spelling in listed}
    for other, ids in zip(others, own, strict=True):
        matched = set(ids.tolist())
        flags = {token.text: token for token in other.added}
        problem = mixing_problem(source, other) if section.source == "union" else None
        for i, spelling in sorted(other.texts.items()):
            text = counted.get(spelling, spelling)
            if i in matched or text in source.ids or text in new:
                continue
            if spelling in flags and section.specials != "base":
                new[text] = replace(flags[spelling], text=text)
            elif spelling not in flags and section.source == "union" and text == spelling:
                if problem:
                    raise PlanError(
                        f"{where}: {other.label}: its piece {text!r} cannot be added to the vocabulary "
                        f"of {source.label}: {problem}; say source: base"
                    )
                new[text] = None
    return {**new, **_named(source, others, new, section)}


def _named(
    source: Vocabulary, others: Sequence[Vocabulary], new: New, section: TokenizerSection
) -> New:
    """What section.tokens adds to `new`, and changes of it: a token that others have is flagged as there."""
    found: dict[str, AddedToken | None] = {}
    flagged = {token.text: token for other in reversed(others) for token in other.added}
    for text, told in section.tokens.items():
        piece = text in new and new[text] is None
        if text in source.ids or (piece and not told.special):
            continue
        # not normalized: a normalizer that puts a space before each text would put it before this one
        token = new.get(text) or flagged.get(text) or AddedToken(-1, text, special=True)
        found[text] = token if told.special is None else replace(token, special=told.special)
    return found


def _raised(source: Vocabulary, section: TokenizerSection) -> list[AddedToken]:
    """Ordinary pieces of the source that the recipe makes special, as added tokens with their ids."""
    added = {token.text for token in source.added}
    return [
        AddedToken(source.ids[text], text, special=True)
        for text, told in section.tokens.items()
        if told.special and text in source.ids and text not in added
    ]


def _check_named(source: Vocabulary, section: TokenizerSection, where: str) -> None:
    """An added token of the source keeps its flags; the recipe must not ask for others."""
    special = {token.text: token.special for token in source.added}
    for text, told in section.tokens.items():
        if text in special and told.special not in (None, special[text]):
            kind = "special" if special[text] else "not special"
            raise PlanError(
                f"{where}: tokens.{text}: special is {str(told.special).lower()}, but the token is {kind} in "
                f"{source.label}, whose flags are kept; leave special out"
            )


def _check_alias(everyone: Sequence[Vocabulary], section: TokenizerSection, where: str) -> None:
    """Each spelling counts as one token, and some model has it."""
    listed = [spelling for spellings in section.alias.values() for spelling in spellings]
    for spelling in listed:
        if listed.count(spelling) > 1 or spelling in section.alias:
            raise PlanError(
                f"{where}: alias: {spelling!r} would count as two tokens; list it under one of them"
            )
        if not any(spelling in v.ids for v in everyone):
            raise PlanError(f"{where}: alias: no model has the token {spelling!r}")


def _check_flags(everyone: Sequence[Vocabulary], section: TokenizerSection, where: str) -> None:
    """A token that two models have is flagged alike, or conflict is base; by text, in one scheme only."""
    if section.conflict == "base":
        return
    seen: dict[str, tuple[tuple[bool, ...] | None, Vocabulary]] = {}
    for vocabulary in everyone:
        flags = {token.text: token.flags for token in vocabulary.added}
        for text in dict.fromkeys(t.text for v in everyone for t in v.added):
            if text not in vocabulary.ids:
                continue
            here = flags.get(text)
            there, first = seen.setdefault(text, (here, vocabulary))
            ordinary = here is None or there is None
            if here != there and not (ordinary and scheme(first) != scheme(vocabulary)):
                raise PlanError(
                    f"{where}: {vocabulary.label}: the token {text!r} is {_told(here)}, but "
                    f"{_told(there)} in {first.label}; say conflict: base to take that"
                )


def _told(flags: tuple[bool, ...] | None) -> str:
    if flags is None:
        return "an ordinary piece"
    return f"added ({', '.join(f for f, on in zip(FLAGS, flags, strict=True) if on) or 'no flags'})"


def _notes(
    source: Vocabulary, others: Sequence[Vocabulary], maps: Sequence[NDArray[np.int64]], new: New
) -> Iterator[str]:
    holes = new and source.size > len(source.texts)
    if holes and (moved := moved_token(source.tokenizer, source.ids, source.label)) is not None:
        yield (
            f"{source.label}: tokenizers reads {moved!r} with another id than that of its file, "
            f"{source.ids[moved]}; in the result it has the one of the file"
        )
    if new:
        told = _listed({text: i for i, text in enumerate(new, source.size)})
        yield f"appended to the {len(source.texts)} tokens of {source.label}: {len(new)}: {told}"
    for other, ids in zip(others, maps[1:], strict=True):
        used = set(ids.tolist())
        left = {text: i for i, text in sorted(other.texts.items()) if i not in used}
        if left:
            yield f"{other.label}: {len(left)} of its tokens are not in the result: {_listed(left)}"


def _listed(ids: Mapping[str, int]) -> str:
    shown = ", ".join(f"{text!r} ({i})" for text, i in list(ids.items())[:4])
    return shown + ", ..." * (len(ids) > 4)
