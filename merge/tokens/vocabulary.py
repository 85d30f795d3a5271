"""What the files of a model say about its tokens, read as data: nothing is loaded, nothing is run."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from merge.errors import SourceError

TOKENIZER, SETTINGS, SPECIALS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED, OF_PROCESSORS = "added_tokens.json", "chat_template.json"
SLOW = (
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)  # of tokenizers without tokenizer.json
GENERATION, TEMPLATE, CONFIG = "generation_config.json", "chat_template.jinja", "config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# takes tokenizer.json as it is, in transformers 4.57 and 5
VERBATIM = {"tokenizer_class": "PreTrainedTokenizerFast"}
FLAGS = (
    "special",
    "normalized",
    "single_word",
    "lstrip",
    "rstrip",
)  # of an added token, in this order
LARGEST = 256 << 20  # bytes of one of these files
# of a tokenizer: where a result takes another model's, these of its own go
TOKEN_FILES = (
    *(TOKENIZER, SETTINGS, SPECIALS, ADDED, TEMPLATE, OF_PROCESSORS),
    *SLOW,
)
# what looks like a control token: <|name|>, [|name|], <name>, </name> and [NAME]; not <<SYS>>, which is none
LIKE_CONTROL = re.compile(
    r"<[|｜][^<>|｜\n]{1,64}[|｜]>|\[\|[^\[\]|\n]{1,64}\|\]"
    r"|(?<!<)</?[A-Za-z][\w-]{0,63}>(?!>)|\[/?[A-Z][A-Z_]{0,63}\]"
)
PARSED = 28  # bytes of memory for each byte of a tokenizer.json that is read; 24 measured, of 262 k tokens
Files = Mapping[str, Path | bytes]  # by their names inside the folder


@dataclass(frozen=True)
class AddedToken:
    """A token of "added_tokens" in tokenizer.json; its text is found before the text is split."""

    id: int
    text: str
    special: bool = False
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False

    @property
    def flags(self) -> tuple[bool, ...]:
        return tuple(getattr(self, flag) for flag in FLAGS)


@dataclass(frozen=True)
class Vocabulary:
    """Of one model: `files` as they lie beside its tensors, those of tokens parsed.

    `specials` and `generation` are None where the file is missing. `rows`: of the input embedding, where
    known. `template`: the default chat template, None where there is none; `template_file` says where.
    """

    label: str
    files: Files
    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    specials: Mapping[str, Any] | None
    generation: Mapping[str, Any] | None
    config: Mapping[str, Any]
    template: str | None
    template_file: str
    rows: int | None = None

    @cached_property
    def pieces(self) -> Mapping[str, int]:
        """The tokenizer model's own vocabulary: text -> id."""
        vocab = self.tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocab, list):  # Unigram: [piece, score]
            return {str(piece[0]): i for i, piece in enumerate(vocab)}
        return vocab if isinstance(vocab, dict) else dict(vocab)

    @cached_property
    def added(self) -> tuple[AddedToken, ...]:
        """By id."""
        found = [
            AddedToken(t["id"], t["content"], **{key: bool(t.get(key)) for key in FLAGS})
            for t in self.tokenizer.get("added_tokens") or ()
        ]
        return tuple(sorted(found, key=lambda token: token.id))

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Every token: text -> id; an added token's id counts."""
        added = {token.text: token.id for token in self.added}
        if all(self.pieces.get(text) == i for text, i in added.items()):
            return self.pieces
        return {**self.pieces, **added}

    @cached_property
    def texts(self) -> Mapping[int, str]:
        """Every token: id -> text."""
        return {
            **{i: text for text, i in self.pieces.items()},
            **{t.id: t.text for t in self.added},
        }

    def named(self, name: str) -> str | None:
        """The text of `eos_token` and the like as transformers takes it: from tokenizer_config.json; a
        special_tokens_map.json overrides it where there is no added_tokens_decoder."""
        stale = self.specials is not None and "added_tokens_decoder" not in self.settings
        for table in [self.specials or {}] * stale + [self.settings, self.specials or {}]:
            if (text := token_text(table.get(name))) is not None:
                return text
        return None

    @property
    def control(self) -> tuple[str, ...]:
        """Texts of the added tokens that control something: special ones, and those that are spelt so. Spaces
        and line ends are text, even where they are added tokens."""
        return tuple(t.text for t in self.added if t.special or LIKE_CONTROL.fullmatch(t.text))

    @property
    def merges(self) -> list[Any]:
        """Pairs of pieces of a BPE tokenizer, however a file spells them; what is no pair stays as it is."""
        told = self.tokenizer.get("model", {}).get("merges") or []
        listed = told if isinstance(told, list) else [told]
        return [merge.split(" ") if isinstance(merge, str) else merge for merge in listed]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which `generate` stops: generation_config.json alone counts where it is there."""
        told = self.config if self.generation is None else self.generation
        return listed_ids(told.get("eos_token_id"))

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.texts, default=-1)


def read_vocabulary(label: str, files: Files, rows: int | None = None) -> Vocabulary | None:
    """What `files` say; None without a tokenizer.json. Raises SourceError where one is damaged."""
    return with_tokenizer(read_beside(label, files, rows)) if TOKENIZER in files else None


def read_beside(label: str, files: Files, rows: int | None = None) -> Vocabulary:
    """What `files` say but for tokenizer.json. Raises SourceError where one is damaged."""
    settings = _table(label, files, SETTINGS) or {}
    template, place = _template(label, files, settings)
    return Vocabulary(
        label=label,
        files=files,
        tokenizer={},
        settings=settings,
        specials=_table(label, files, SPECIALS),
        generation=_table(label, files, GENERATION),
        config=_table(label, files, CONFIG) or {},
        template=template,
        template_file=place,
        rows=rows,
    )


def with_tokenizer(beside: Vocabulary) -> Vocabulary:
    """With what its tokenizer.json says, where it has one. Raises SourceError where that is damaged."""
    table = _table(beside.label, beside.files, TOKENIZER) or {}
    found = replace(beside, tokenizer=table)
    _check(found)
    return found


def folder_files(folder: Path) -> dict[str, Path]:
    """The files of a model that are about tokens, with both of its configs, where they are."""
    names = (*TOKEN_FILES, GENERATION, CONFIG)
    return {name: folder / name for name in names if (folder / name).is_file()}


def model_files(folder: Path, adapters: Sequence[Path] = ()) -> dict[str, Path]:
    """As folder_files, of a model with adapters: one that was saved with a tokenizer brings its tokens."""
    found = folder_files(folder)
    for adapter in adapters:
        own = folder_files(adapter)
        if TOKENIZER in own:
            kept = {name: file for name, file in found.items() if name in (GENERATION, CONFIG)}
            found = {n: f for n, f in own.items() if n not in (GENERATION, CONFIG)} | kept
    return found


def verbatim_settings(source: Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json by which transformers takes tokenizer.json as it stands.

    The names of special tokens that the former class implied are put in from the ids in config.json.
    """
    settings = {**source.settings, **VERBATIM}
    for name in NAMES:
        told = source.config.get(f"{name}_id")
        if source.named(name) is None and isinstance(told, int) and told in source.texts:
            settings[name] = source.texts[told]
    unknown = source.tokenizer.get("model", {}).get("unk_token")
    if source.named("unk_token") is None and unknown in source.ids:
        settings["unk_token"] = unknown
    return settings


def json_bytes(table: Mapping[str, Any]) -> bytes:
    """`table` as the text of a JSON file, as transformers writes them."""
    try:
        return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON alone can hold
        return (json.dumps(table, indent=2) + "\n").encode()


def _table(label: str, files: Files, name: str) -> dict[str, Any] | None:
    if name not in files:
        return None
    try:
        data = json.loads(_bytes(label, files, name))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{label}: {name} is not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise SourceError(f"{label}: {name} holds a {type(data).__name__}, not a table")
    return data


def _bytes(label: str, files: Files, name: str) -> bytes:
    content = files[name]
    if isinstance(content, bytes):
        return content
    try:
        if (size := content.stat().st_size) > LARGEST:
            raise SourceError(f"{label}: {name} has {size} bytes; at most {LARGEST} are read")
        return content.read_bytes()
    except OSError as error:
        raise SourceError(f"{content}: cannot be read ({error.strerror})") from None


def _template(label: str, files: Files, settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """chat_template.jinja beats tokenizer_config.json, whose template may be a list of named ones."""
    if TEMPLATE in files:
        try:
            return _bytes(label, files, TEMPLATE).decode(), TEMPLATE
        except UnicodeDecodeError as error:
            raise SourceError(f"{label}: {TEMPLATE} is not text ({error.reason})") from None
    told = settings.get("chat_template")
    if isinstance(told, list):
        named = [t for t in told if isinstance(t, dict) and t.get("name") == "default"]
        told = named[-1].get("template") if named else None
    return (told, SETTINGS) if isinstance(told, str) else (None, "")


def _check(found: Vocabulary) -> None:
    """Raises SourceError unless tokenizer.json has the shape of one."""
    try:
        sound = all(
            isinstance(text, str) and isinstance(i, int) and 0 <= i < 1 << 31
            for text, i in [*found.pieces.items(), *((t.text, t.id) for t in found.added)]
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise SourceError(
            f"{found.label}: {TOKENIZER} is no tokenizer: its tokens are texts with ids"
        )


def token_text(value: Any) -> str | None:
    """The text of a token, which files tell by itself or in a table with its flags."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def listed_ids(value: Any) -> tuple[int, ...]:
    """The ids in a number or a list of numbers."""
    listed = value if isinstance(value, list) else [value]
    return tuple(i for i in listed if isinstance(i, int) and not isinstance(i, bool))
