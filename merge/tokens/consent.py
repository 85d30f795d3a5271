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
from merge.tokens.doctor import examined_files, recipe_lines
from merge.tokens.findings import Finding
from merge.tokens.fit import vocabulary_findings
from merge.tokens.surgery import Surgery
from merge.tokens.vocabularies import Vocabularies
from merge.tokens.vocabulary import Vocabulary

OF_SPLITTING = ("normalizer-differs", "pre-tokenizer-differs", "merges-differ")


def checked_tokens(
    parents: Sequence[Model],
    vocabularies: Vocabularies,
    sections: Sections,
    surgery: Surgery | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
) -> list[str]:
    """Notes about the tokens of the result; PlanError for what would make it never stop or talk wrongly.

    parents: the models that are merged, the one first that lends its files. config, tensors: of the
    result. In the way of mergekit (compat) everything is a note.
    """
    result = surgery.vocabulary if surgery else vocabularies.of(parents[0])
    result = replace(result, label="the result", config=config)
    found = [
        finding
        for finding in vocabulary_findings([vocabularies.of(model) for model in parents])
        if _is_open(finding, sections, result)
    ]
    found += examined_files(result, tensors)
    if surgery and sections.stop is None:
        found += _lost_ends(surgery, result)
    errors = [finding for finding in found if finding.severity == "error"]
    if errors and sections.compat != "mergekit":
        more = f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""
        raise PlanError(_in_words(errors[0]) + more + _way_out(errors))
    return [_in_words(finding) for finding in found]


def alike(models: Sequence[Model], vocabularies: Vocabularies) -> bool:
    """Whether files show, before any tokens are read, that these models do not differ in theirs."""
    spelt = {vocabularies.spelling(model) for model in models} - {""}
    return len(spelt) < 2 and end_alike(models, vocabularies)


def end_alike(models: Sequence[Model], vocabularies: Vocabularies) -> bool:
    """Whether models stop at the same ids and have one chat template, by their small files alone."""
    told = [vocabularies.beside(model) for model in models]
    return len({(v.stop_ids, v.named("eos_token"), v.template) for v in told}) == 1


def _is_open(finding: Finding, sections: Sections, result: Vocabulary) -> bool:
    """Whether the recipe leaves open what becomes of a difference between models. Never of ids and rows: rows
    follow their tokens, and what the result does without is noted."""
    section = sections.tokens
    lent = section.source not in ("base", "union")  # a model's tokenizer, with its template
    code = finding.code
    if code == "eos-differs":
        return sections.stop is None
    if code == "template-differs":
        return not (sections.chat_template or lent)
    if code == "control-token-missing":
        lacking = {text for texts in finding.evidence["tokens"].values() for text in texts}
        said = sections.chat_template or lent or section.specials
        return not said and not lacking <= result.ids.keys()
    if code == "flags-differ":
        return section.conflict != "base"
    if code in OF_SPLITTING:
        return not (sections.tokenizer or sections.tokenizer_source)
    return False


def _lost_ends(surgery: Surgery, result: Vocabulary) -> Iterator[Finding]:
    """Models whose ends, as they are called in the result, are none of its ends: in a vocabulary that a model
    lends which is not merged."""
    source = surgery.vocabularies[surgery.source]
    for model, own in surgery.vocabularies.items():
        ends = np.flatnonzero(np.isin(surgery.maps[model], own.stop_ids))
        if model == surgery.source or not own.stop_ids or {*ends.tolist()} & {*result.stop_ids}:
            continue
        texts = [own.texts.get(i, f"#{i}") for i in own.stop_ids]
        told = [result.texts.get(i, f"#{i}") for i in result.stop_ids]
        what = (
            f"{own.label} stops at {', '.join(map(repr, texts))}, the tokens of {source.label} at "
        )
        fix = yaml.safe_dump({"stop": {"eos": told[0]}}, allow_unicode=True) if told else ""
        what += ", ".join(map(repr, told)) or "none"
        yield Finding("eos-differs", "error", (own.label, source.label), what, {}, fix)


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
