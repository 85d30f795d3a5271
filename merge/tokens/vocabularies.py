"""The vocabularies of opened models, each file of which is read once."""

import hashlib
from dataclasses import replace
from pathlib import Path

from merge.anatomy import embedding_and_head
from merge.sources.model import Model
from merge.tokens.union import first_difference
from merge.tokens.vocabulary import (
    TOKENIZER,
    Vocabulary,
    model_files,
    read_beside,
    with_tokenizer,
)

Key = tuple[str, Path, tuple[Path, ...]]


class Vocabularies:
    """What the files of models say about tokens. tokenizer.json, the largest part of it, is read where it is
    asked for, and kept once where it is the same in several models."""

    def __init__(self) -> None:
        self._beside: dict[Key, Vocabulary] = {}
        self._whole: dict[Key, Vocabulary] = {}
        self._spellings: dict[Path, str] = {}

    def of(self, model: Model) -> Vocabulary:
        """With its tokens; without a tokenizer.json it has none, and its other files count nevertheless.
        Raises SourceError."""
        key = _key(model)
        if key not in self._whole:
            found = with_tokenizer(self.beside(model))
            same = (v.tokenizer for v in self._whole.values() if v.tokenizer == found.tokenizer)
            self._whole[key] = replace(found, tokenizer=next(same, found.tokenizer))
        return self._whole[key]

    def beside(self, model: Model) -> Vocabulary:
        """Without its tokens: where texts end, the template, the number of rows."""
        key = _key(model)
        if key not in self._beside:
            files = model_files(model.folder, model.adapters)
            found = read_beside(model.label, files, _rows(model))
            self._beside[key] = replace(found, config=model.config)
        return self._beside[key]

    def spelling(self, model: Model) -> str:
        """Equal for models whose tokenizer.json says the same of tokens, flags and ways to split texts, in
        the same words; "" without one. Of a file of any size it takes no more memory than that."""
        file = self.beside(model).files.get(TOKENIZER)
        if not isinstance(file, Path):
            return ""
        if file not in self._spellings:
            self._spellings[file] = _spelling(file.read_bytes())
        return self._spellings[file]

    def difference(self, a: Model, b: Model) -> str | None:
        """As first_difference; None too where one of them has no tokenizer.json."""
        spelt = [self.spelling(model) for model in (a, b)]
        if "" in spelt or spelt[0] == spelt[1]:
            return None
        return first_difference(self.of(a), self.of(b))


def _key(model: Model) -> Key:
    return model.label, model.folder, model.adapters


def _rows(model: Model) -> int | None:
    """Rows of the embedding, or else of the head."""
    tensors = model.source.tensors
    return next((tensors[n].rows for n in embedding_and_head(tensors) if n is not None), None)


def _spelling(data: bytes) -> str:
    """Stands for added tokens, normalizer, pre-tokenizer, vocabulary and merges as they are spelt; for all of
    a file that has its keys in another order than usual.

    Fine-tunes differ in other parts of large files; parsing those takes 13 times their size in memory.
    """
    vocab = data.find(b'"vocab"')
    after = data.rfind(b'"post_processor"', 0, max(vocab, 0))
    keys = (b'"added_tokens"', b'"normalizer"', b'"pre_tokenizer"')
    places = [*(data.find(key) for key in keys), after, vocab]
    usual = places[0] >= 0 and places == sorted(set(places))
    parts = [data[places[0] : after], data[vocab:]] if usual else [data]
    return "".join(hashlib.sha256(part).hexdigest() for part in parts)
