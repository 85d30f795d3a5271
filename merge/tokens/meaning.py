"""What a token stands for, whatever way its vocabulary spells it: which tokens of two models correspond."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from merge.tokens.vocabulary import Vocabulary

Alias = Mapping[str, Sequence[str]]  # text in the result -> other texts that count as it
ROLES = ("eos", "bos", "unk", "pad", "sep", "cls", "mask")
BYTE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's spelling of one


def counterparts(source: Vocabulary, other: Vocabulary, alias: Alias) -> NDArray[np.int64]:
    """`[source.size] int64`: the id in `other` of each token of `source`; -1 where it has none, and where
    an id of `source` has no token.

    Vocabularies of one scheme correspond by text. Of two schemes, tokens correspond by `canonical`, each
    token of `other` to one of `source` at most: two equal rows in a head would share one probability.
    """
    found = np.full(source.size, -1, np.int64)
    if scheme(source) == scheme(other):
        for i, text in source.texts.items():
            found[i] = own_id(other, text, alias)
        return found
    named = ((i, own_id(other, text, alias)) for text, i in source.ids.items() if text in alias)
    theirs = canonical(other)
    meant = ((i, theirs.get(key, -1)) for key, i in canonical(source).items())
    taken: set[int] = set()
    for i, own in (*named, *meant):
        if own >= 0 and found[i] < 0 and own not in taken:
            found[i] = own
            taken.add(own)
    return found


def own_id(vocabulary: Vocabulary, text: str, alias: Alias) -> int:
    """The id of the token `text`, else of the first text that counts as it; -1 if it has neither."""
    spelt = (vocabulary.ids[t] for t in (text, *alias.get(text, ())) if t in vocabulary.ids)
    return next(spelt, -1)


def canonical(vocabulary: Vocabulary) -> dict[bytes | str, int]:
    """Ids by what the tokens stand for: an ordinary piece for UTF-8 bytes, with a space before a word; an
    added token for its text; a token with a role for that, spelt NUL and the role.

    A token has the first of its roles only, eos first: where eos and bos are one token, it is eos, and
    bos has no counterpart. The order of the keys is their order of precedence.
    """
    found: dict[bytes | str, int] = {}
    for role in ROLES:
        text = vocabulary.named(f"{role}_token")
        own = -1 if text is None else vocabulary.ids.get(text, -1)
        if own >= 0 and own not in found.values():
            found[f"\0{role}"] = own
    for token in vocabulary.added:
        found.setdefault(token.text, token.id)
        if not token.special:
            found.setdefault(token.text.encode(errors="surrogatepass"), token.id)
    for key, i in _pieces(vocabulary):
        found.setdefault(key, i)
    return found


def scheme(vocabulary: Vocabulary) -> str:
    """How its pieces spell bytes and spaces: byte-level, metaspace, wordpiece or plain."""
    parts = [vocabulary.tokenizer.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    told = json.dumps(parts, ensure_ascii=False)
    if '"type": "ByteLevel"' in told:
        return "byte-level"
    if "▁" in told:
        return "metaspace"
    return "wordpiece" if model_type(vocabulary) == "WordPiece" else "plain"


def model_type(vocabulary: Vocabulary) -> str:
    """BPE, Unigram, WordPiece or WordLevel; older files do not tell."""
    model = vocabulary.tokenizer.get("model", {})
    if isinstance(told := model.get("type"), str):
        return told
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece"


def _pieces(vocabulary: Vocabulary) -> Iterator[tuple[bytes, int]]:
    """Of ordinary pieces, by id; second spellings, which count where there is no first, come last."""
    added = {token.text for token in vocabulary.added}
    spell = {"byte-level": _byte_level, "metaspace": _metaspace, "wordpiece": _wordpiece}.get(
        scheme(vocabulary), _plain
    )
    by_id = sorted((i, text) for text, i in vocabulary.pieces.items() if text not in added)
    spelt = [(spell(text), i) for i, text in by_id]
    yield from ((first, i) for (first, _), i in spelt if first is not None)
    yield from ((second, i) for (_, second), i in spelt if second is not None)


Spelt = tuple[bytes | None, bytes | None]  # first, second


def _byte_level(text: str) -> Spelt:
    if all(c in _BYTE_OF for c in text):
        return bytes(_BYTE_OF[c] for c in text), None
    return None, text.encode(errors="surrogatepass")


def _metaspace(text: str) -> Spelt:
    if byte := BYTE.fullmatch(text):
        return None, bytes([int(byte[1], 16)])
    return text.replace("▁", " ").encode(errors="surrogatepass"), None


def _wordpiece(text: str) -> Spelt:
    if text.startswith("##"):
        return text[2:].encode(errors="surrogatepass"), None
    word = text.encode(errors="surrogatepass")
    return b" " + word, word


def _plain(text: str) -> Spelt:
    return text.encode(errors="surrogatepass"), None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes of Latin-1 stand for themselves, the others for letters from U+0100."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
BYTE_LEVEL = {byte: letter for letter, byte in _BYTE_OF.items()}
