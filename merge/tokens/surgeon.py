"""Recipe and models -> Surgery: one vocabulary, its rows in every model, its stop tokens and template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merge.errors import PlanError
from merge.lines import nearest
from merge.lineup import Lineup
from merge.sources.model import Model, changed_config, read_json, text_config
from merge.tokens.rows import Numbers
from merge.tokens.sections import TemplateSection, TokenizerSection, UnifySection, named_model
from merge.tokens.stop import stopped
from merge.tokens.surgery import RowSource, Surgery
from merge.tokens.templates import templated
from merge.tokens.union import LARGEST, first_difference, unite
from merge.tokens.vocabularies import Vocabularies
from merge.tokens.vocabulary import (
    CONFIG,
    GENERATION,
    SLOW,
    TOKEN_FILES,
    TOKENIZER,
    Files,
    Vocabulary,
    json_bytes,
    model_files,
    read_vocabulary,
)
from merge.tokens.wholeness import said_tied

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def wants_surgery(lineup: Lineup, vocabularies: Vocabularies) -> bool:
    """Whether tokens differ, or the recipe changes something about them."""
    sections, section = lineup.recipe.sections, lineup.recipe.sections.tokens
    if sections.stop or sections.chat_template or lineup.recipe.outside_source:
        return True
    if section != TokenizerSection(source=section.source):
        return True
    donor = lineup.models[lineup.donor]
    own = model_files(donor.folder, donor.adapters)
    if any(place.parent != donor.folder for place in own.values()):
        return True  # an adapter's files are not those that would be carried over
    models = [lineup.models[i] for i in lineup.merged]
    having = [model for model in models if TOKENIZER in vocabularies.beside(model).files]
    if len({vocabularies.beside(model).rows for model in having} - {None}) > 1:
        return True
    return any(vocabularies.difference(having[0], model) for model in having[1:])


def plan_surgery(lineup: Lineup, config: Mapping[str, Any], vocabularies: Vocabularies) -> Surgery:
    """What the recipe wants of the tokens of models that may differ in theirs; raises PlanError.

    config: config.json of the result but for what is about tokens.
    """
    return _Surgeon(lineup, config, vocabularies).surgery()


class _Surgeon:
    """Holds the vocabularies of the models that are merged, and of the source, whose ids the result keeps."""

    def __init__(
        self, lineup: Lineup, config: Mapping[str, Any], vocabularies: Vocabularies
    ) -> None:
        self.lineup, self.config = lineup, config
        sections = lineup.recipe.sections
        specials = sections.tokens.specials or ("base" if lineup.recipe.outside_source else "union")
        self.section = sections.tokens.model_copy(update={"specials": specials})
        self.where = lineup.recipe.where(*(["tokenizer"] if sections.tokenizer else []))
        self.source = self._source()
        others = [i for i in lineup.merged if i != self.source]
        self.vocabularies = {i: self._vocabulary(vocabularies, i) for i in [self.source, *others]}
        if not (sections.tokenizer or sections.tokenizer_source):
            self._check_unsaid()

    def surgery(self) -> Surgery:
        source = self.vocabularies[self.source]
        others = [i for i in self.vocabularies if i != self.source]
        united = unite(source, [self.vocabularies[i] for i in others], self.section, self.where)
        before = source.rows if self.source == self.lineup.donor else 0
        rows = row_count(self.section, united.size, before or 0, self.where)
        files = self._lent() | united.files | {CONFIG: json_bytes(self._config(rows))}
        result = self._ended(files, rows)
        ids = dict(zip([self.source, *others], united.maps, strict=True))
        given = _Given(self.lineup.recipe.labels, self.lineup.index, self.vocabularies, self.where)
        changed: dict[str, Path | bytes | None] = dict.fromkeys(self._foreign(result.files), None)
        changed |= {
            n: c
            for n, c in result.files.items()
            if n != CONFIG and not _is_donors(n, c, self.donor)
        }
        return Surgery(
            files=changed,
            config=result.config,
            vocabulary=result,
            rows=rows,
            maps=self._maps(ids, result, rows),
            given=given.read(self.section, result),
            section=self.section,
            vocabularies=self.vocabularies,
            source=self.source,
            reconfigured=result.config != self.config,
            free=self._free(result),
            notes=(*united.notes, *self._stale(united.files)),
        )

    def _check_unsaid(self) -> None:
        """Raises PlanError where pieces differ, and the recipe does not say whose the result gets."""
        source = self.vocabularies[self.source]
        for other in self.vocabularies.values():
            if dict(other.pieces) != dict(source.pieces):
                raise PlanError(
                    f"{other.label}: its tokenizer is not that of {source.label}: "
                    f"{first_difference(source, other)}; say whose the result gets, as "
                    "tokenizer: {source: base}, or union, or a model"
                )

    @property
    def donor(self) -> Model:
        return self.lineup.models[self.lineup.donor]

    def _source(self) -> int:
        """The model whose ids are kept."""
        outside = self.lineup.recipe.outside_source
        return self.lineup.donor if outside is None else self.lineup.index[outside]

    def _vocabulary(self, vocabularies: Vocabularies, index: int) -> Vocabulary:
        model = self.lineup.models[index]
        found = vocabularies.of(model)
        if TOKENIZER not in found.files:
            raise PlanError(
                f"{model.label}: has no tokenizer.json, which says what its rows stand for; make one with "
                "transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)) beside the model"
            )
        return found

    # -- files and config --------------------------------------------------------------------------

    def _lent(self) -> dict[str, Path | bytes]:
        """The source's files about tokens, and the donor's generation_config.json with the source's ids."""
        files: dict[str, Path | bytes] = dict(self.vocabularies[self.source].files)
        if self.source == self.lineup.donor:
            return files
        generation = _generation(self.donor, self.vocabularies[self.source])
        files.pop(GENERATION, None)
        return files | ({GENERATION: generation} if generation else {})

    def _foreign(self, files: Files) -> list[str]:
        """The donor's files about tokens that the result has not."""
        return [
            n
            for n in (*TOKEN_FILES, GENERATION)
            if n not in files and (self.donor.folder / n).is_file()
        ]

    def _config(self, rows: int) -> dict[str, Any]:
        """The result's config.json with the number of rows, and the source's ids of bos, eos and pad."""
        changes: dict[str, Any] = {"vocab_size": rows}
        if self.source != self.lineup.donor:
            lent = self.lineup.models[self.source].config
            changes |= {k: text_config(lent).get(k, lent.get(k)) for k in IDS}
        return changed_config(self.config, changes)

    def _ended(self, files: Files, rows: int) -> Vocabulary:
        """The result's vocabulary, with the stop tokens and the template that the recipe wants."""
        recipe = self.lineup.recipe
        result = self._read(files, rows)
        parents = [self.vocabularies[i] for i in self.lineup.merged]
        if section := recipe.sections.stop:
            edits = stopped(result, parents, section, self.section.alias, recipe.where("stop"))
            result = self._read({**result.files, **edits}, rows)
        if template := recipe.sections.chat_template:
            template = self._resolved(template)
            known = [*self.lineup.merged, *({self.source} - {*self.lineup.merged})]
            named = {self.vocabularies[i].label: self.vocabularies[i] for i in known}
            place, beside = recipe.where("chat_template"), Path(recipe.file).parent
            changes = templated(result, named, template, place, beside)
            kept = {n: c for n, c in result.files.items() if n not in changes}
            result = self._read(kept | {n: c for n, c in changes.items() if c is not None}, rows)
        return result

    def _resolved(self, section: TemplateSection) -> TemplateSection:
        """With the whole label of the model that it names."""
        kind, _, name = (section.from_ or "").partition(":")
        labels = [vocabulary.label for vocabulary in self.vocabularies.values()]
        if kind != "model" or (label := named_model(name, labels)) is None:
            return section
        return section.model_copy(update={"from_": f"model:{label}"})

    def _stale(self, files: Files) -> list[str]:
        """A note where files of older tokenizers do not know the new tokens."""
        old = [name for name in SLOW if name in self.vocabularies[self.source].files]
        if TOKENIZER not in files or not old:
            return []
        return [f"tokenizer.json has new tokens; {', '.join(old)} beside it are as they were"]

    def _read(self, files: Files, rows: int) -> Vocabulary:
        found = read_vocabulary("the result", files, rows)
        assert found is not None
        return found

    def _free(self, result: Vocabulary) -> frozenset[int]:
        """New tokens, and names that were given up for others: they may have no row in any model."""
        stop = self.lineup.recipe.sections.stop
        texts = [*self.section.tokens, *(unify.from_ for unify in (stop.unify if stop else ()))]
        return frozenset(result.ids[text] for text in texts if text in result.ids)

    # -- rows --------------------------------------------------------------------------------------

    def _maps(
        self, ids: Mapping[int, Numbers], result: Vocabulary, rows: int
    ) -> dict[int, Numbers]:
        recipe = self.lineup.recipe
        maps = {
            i: row_map(own, result, self.vocabularies[i], rows, self.vocabularies[i].rows or 0)
            for i, own in ids.items()
        }
        stop = recipe.sections.stop
        for number, section in enumerate(stop.unify if stop else ()):
            where = recipe.where("stop", "unify", number)
            for name in section.models:
                label = named_model(name, recipe.labels)
                if label is None:
                    near = nearest(name, recipe.labels)
                    raise PlanError(
                        f"{where}: {name!r}{near} is none of the models: {', '.join(recipe.labels)}"
                    )
                i = self.lineup.index[label]
                maps[i] = unified(maps[i], section, result, self.vocabularies[i], where)
        return maps


def _is_donors(name: str, content: Path | bytes, donor: Model) -> bool:
    """Whether a file of the result is the donor's as it is."""
    file = donor.folder / name
    if isinstance(content, Path):
        return content == file
    return file.is_file() and file.read_bytes() == content


def row_map(ids: Numbers, source: Vocabulary, own: Vocabulary, rows: int, own_rows: int) -> Numbers:
    """[rows]: `own`'s row of every row of the result, from its ids [tokens of the result].

    A row that stands for no token, in the result or in `own`, is own's row of that number.
    """
    found = np.full(rows, -1, np.int64)
    found[: len(ids)] = ids
    numbers = np.arange(rows)
    free = ~np.isin(numbers, np.fromiter(source.texts, np.int64, len(source.texts)))
    free &= ~np.isin(numbers, np.fromiter(own.texts, np.int64, len(own.texts)))
    free &= (found < 0) & (numbers < own_rows)
    found[free] = numbers[free]
    found[found >= own_rows] = -1
    return found


def unified(
    ids: Numbers, section: UnifySection, result: Vocabulary, own: Vocabulary, where: str
) -> Numbers:
    """Rows of a model that shall speak of the token `from` as `to`; raises PlanError."""
    if section.how == "none":
        return ids
    one, other = (_id_of(text, result, where) for text in (section.from_, section.to))
    if ids[one] < 0:
        raise PlanError(f"{where}: {own.label} has no token {section.from_!r} to unify")
    changed = ids.copy()
    changed[other] = ids[one]
    if section.how == "swap":
        if {int(ids[one]), int(ids[other])} & _beginnings(own):
            raise PlanError(
                f"{where}: {section.from_!r} or {section.to!r} begins the texts of {own.label} as well, and "
                "swapped it would no longer; write how: copy"
            )
        changed[one] = ids[other]
    return changed


def _beginnings(vocabulary: Vocabulary) -> set[int]:
    """Ids with which texts begin, wherever a file says so."""
    tables = [vocabulary.config, text_config(vocabulary.config), vocabulary.generation or {}]
    told = {i for table in tables if isinstance(i := table.get("bos_token_id"), int)}
    return told | {vocabulary.ids.get(vocabulary.named("bos_token") or "", -1)} - {-1}


def _id_of(text: str, result: Vocabulary, where: str) -> int:
    if text not in result.ids:
        near = nearest(text, [token.text for token in result.added])
        raise PlanError(f"{where}: the result has no token {text!r}{near}")
    return result.ids[text]


def row_count(section: TokenizerSection, size: int, before: int, where: str) -> int:
    """Rows of the result: for its `size` ids, and as many as the embedding had `before` where padding is
    kept; raises PlanError."""
    largest = max(section.size or 0, section.pad_to_multiple_of or 0)
    if largest > LARGEST:
        raise PlanError(f"{where}: an embedding of {largest} rows; at most {LARGEST} are made")
    if section.size is not None:
        if section.size < size:
            raise PlanError(
                f"{where}: tokenizer.size is {section.size}; the tokens need {size} rows"
            )
        return section.size
    rows = max(size, before) if section.keep_padding else size
    step = section.pad_to_multiple_of or 1
    return -(-rows // step) * step


def _generation(donor: Model, source: Vocabulary) -> bytes | None:
    """The donor's generation_config.json with the ids of a vocabulary that another model lends."""
    file = donor.folder / GENERATION
    table = read_json(file) if file.is_file() else {}
    told = source.generation or {k: v for k, v in source.config.items() if k in IDS}
    ids = {key: told[key] for key in IDS if told.get(key) is not None}
    kept = {key: value for key, value in table.items() if key not in IDS}
    return json_bytes(kept | ids) if table or source.generation else None


@dataclass
class _Given:
    """Reads where the rows of single tokens come from."""

    labels: Sequence[str]
    index: Mapping[str, int]
    vocabularies: Mapping[int, Vocabulary]
    where: str
    found: dict[str, dict[int, RowSource]] = field(
        default_factory=lambda: {"embed": {}, "head": {}}
    )

    def read(
        self, section: TokenizerSection, result: Vocabulary
    ) -> dict[str, dict[int, RowSource]]:
        for text, token in section.tokens.items():
            i = _id_of(text, result, f"{self.where}: tokenizer.tokens")
            if said_tied(result.config) and token.head not in (None, token.embed):
                raise PlanError(
                    f"{self.where}: tokenizer.tokens.{text}: the head of the result is its embedding; give "
                    "embed alone"
                )
            for kind in ("embed", "head"):
                # where a recipe speaks of one of the two alone, the other is as for any token
                if source := getattr(token, kind):
                    always = token.apply == "always"
                    self.found[kind][i] = self._source(text, source, always)
        return self.found

    def _source(self, text: str, source: str, always: bool) -> RowSource:
        if source in ("mean", "zero"):
            return RowSource(source, always=always)
        model, other = self._model(source)
        vocabulary = self.vocabularies[model]
        wanted = other or text
        number = wanted.removeprefix("#")
        numbered = wanted not in vocabulary.ids and number.isdecimal() and number.isascii()
        row = int(number) if numbered else vocabulary.ids.get(wanted, -1)
        if row < 0 or (vocabulary.rows is not None and row >= vocabulary.rows):
            raise PlanError(
                f"{self.where}: tokenizer.tokens.{text}: {vocabulary.label} has no token {wanted!r}"
            )
        return RowSource("row", model, row, always)

    def _model(self, source: str) -> tuple[int, str]:
        """`model:NAME` or `model:NAME:TEXT`; both may have colons in them."""
        rest = source.removeprefix("model:")
        cuts = [len(rest), *(i for i, c in enumerate(rest) if c == ":")]
        for cut in sorted(cuts, reverse=True):
            if label := named_model(rest[:cut], self.labels):
                return self.index[label], rest[cut + 1 :]
        raise PlanError(
            f"{self.where}: tokenizer.tokens: {source!r} names no model of the recipe "
            f"({', '.join(self.labels)}); write model:NAME, model:NAME:TEXT, mean or zero"
        )
