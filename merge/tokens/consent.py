"""What is wrong with the tokens of a planned merge, unless the recipe says that it is meant so."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from merge.errors import PlanError
from merge.sections import Sections
from merge.sources import TensorInfo
from merge.sources.model import Model
from merge.tokens.doctor import examined_files, recipe_lines, vocabulary_of
from merge.tokens.findings import Finding
from merge.tokens.fit import eos_difference, template_difference
from merge.tokens.surgery import Surgery
from merge.tokens.vocabulary import TOKENIZER, Vocabulary, model_files, read_vocabulary


def checked_tokens(
    parents: Sequence[Model],
    sections: Sections,
    surgery: Surgery | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
) -> list[str]:
    """Notes about the tokens of the result; PlanError for what would make it never stop or talk wrongly.

    parents: the models that are merged, the one first that lends its files. config, tensors: of the
    result. In the way of mergekit (compat) everything is a note.
    """
    vocabulary = surgery.vocabulary if surgery else vocabulary_of(parents[0])
    vocabulary = replace(vocabulary, label="the result", config=config)
    found = [*_between(parents, sections, surgery is None), *examined_files(vocabulary, tensors)]
    if surgery and sections.stop is None:
        found += _lost_ends(surgery, vocabulary)
    errors = [finding for finding in found if finding.severity == "error"]
    if errors and sections.compat != "mergekit":
        more = f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""
        raise PlanError(_in_words(errors[0]) + more + _way_out(errors))
    return [_in_words(finding) for finding in found]


def _between(
    parents: Sequence[Model], sections: Sections, one_vocabulary: bool
) -> Iterator[Finding]:
    """Where models end texts or chat in other ways, and the recipe does not say how the result does."""
    chosen = sections.chat_template or sections.tokens.source not in ("base", "union")
    open_ends, open_chat = sections.stop is None, not chosen  # a model's tokenizer has its template
    alike = one_vocabulary and len({signature(model) for model in parents}) == 1
    if alike or not (open_ends or open_chat):
        return
    vocabularies = [vocabulary_of(model) for model in parents]
    if open_ends:
        yield from eos_difference(vocabularies)
    if open_chat:
        yield from template_difference(vocabularies)


def _lost_ends(surgery: Surgery, result: Vocabulary) -> Iterator[Finding]:
    """Models whose ends, as they are called in the result, are none of its ends: in a vocabulary that a model
    lends which is not merged."""
    lender = surgery.vocabularies[surgery.lender]
    for model, own in surgery.vocabularies.items():
        ends = np.flatnonzero(np.isin(surgery.maps[model], own.stop_ids))
        if model == surgery.lender or not own.stop_ids or {*ends.tolist()} & {*result.stop_ids}:
            continue
        texts = [own.texts.get(i, f"#{i}") for i in own.stop_ids]
        told = [result.texts.get(i, f"#{i}") for i in result.stop_ids]
        what = (
            f"{own.label} stops at {', '.join(map(repr, texts))}, the tokens of {lender.label} at "
        )
        fix = yaml.safe_dump({"stop": {"eos": told[0]}}, allow_unicode=True) if told else ""
        what += ", ".join(map(repr, told)) or "none"
        yield Finding("eos-differs", "error", (own.label, lender.label), what, {}, fix)


def signature(model: Model) -> tuple[Any, ...]:
    """How it ends texts and chats, from its small files alone."""
    told = read_vocabulary(
        model.label, {**model_files(model.folder, model.adapters), TOKENIZER: b"{}"}
    )
    assert told is not None
    return told.stop_ids, told.named("eos_token"), told.template


def _in_words(finding: Finding) -> str:
    return f"{', '.join(finding.models)}: {finding.what} ({finding.code})"


def _way_out(errors: Sequence[Finding]) -> str:
    """The recipe lines that resolve the errors, on one line."""
    section: dict[str, Any] = yaml.safe_load(recipe_lines(errors)) or {}
    if not section:
        return ""
    lines = [
        yaml.safe_dump(
            {key: value}, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6
        ).strip()[1:-1]
        for key, value in section.items()
    ]
    told = " and ".join(f"`{line}`" for line in lines)
    return f"; say in the recipe what the result shall do, each on its line: {told}"
