"""Small vocabularies, trained by the `tokenizers` library, and changes of them."""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from merge.tokens.vocabulary import SETTINGS, TOKENIZER, Vocabulary, read_vocabulary

GERMAN = ["Der Rat beriet: vier Modelle, ein Ende? Über Nacht fand man das Zeichen."] * 4
ENGLISH = ["Once upon a time there was a merge of models, and it did not stop. The end."] * 4
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(texts: Sequence[str] = ENGLISH, size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer, texts, size, initial_alphabet=letters)


def metaspace(texts: Sequence[str] = ENGLISH, size: int = 120) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, trainers.BpeTrainer, texts, size)


def unigram(texts: Sequence[str] = ENGLISH, size: int = 80) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, trainers.UnigramTrainer, texts, size, unk_token="<unk>")


def wordpiece(texts: Sequence[str] = ENGLISH, size: int = 120) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer, texts, size)


def _trained(
    tokenizer: Tokenizer, trainer: Any, texts: Sequence[str], size: int, **more: Any
) -> Tokenizer:
    told = trainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, **more
    )
    tokenizer.train_from_iterator(texts, told)
    return tokenizer


def with_tokens(tokenizer: Tokenizer, *texts: str | AddedToken) -> Tokenizer:
    """A copy with special tokens added."""
    found = Tokenizer.from_str(tokenizer.to_str())
    found.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) if isinstance(t, str) else t for t in texts]
    )
    return found


def vocabulary(
    tokenizer: Tokenizer | dict[str, Any],
    label: str = "small",
    change: Callable[[Any], object] = lambda data: None,
    **settings: Any,
) -> Vocabulary:
    """As it is read from its files; `change` edits tokenizer.json before."""
    data = (
        json.loads(tokenizer.to_str())
        if isinstance(tokenizer, Tokenizer)
        else copy.deepcopy(tokenizer)
    )
    change(data)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES, **settings}
    files = {TOKENIZER: json.dumps(data).encode(), SETTINGS: json.dumps(told).encode()}
    found = read_vocabulary(label, files)
    assert found is not None
    return found


def library(found: Vocabulary, files: dict[str, bytes] | None = None) -> Tokenizer:
    """The tokenizer of that vocabulary, or of the one that has `files` instead, in `tokenizers`."""
    content = {**found.files, **(files or {})}[TOKENIZER]
    return Tokenizer.from_str(
        (content if isinstance(content, bytes) else content.read_bytes()).decode()
    )
