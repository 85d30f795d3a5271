"""What is wrong with a model's tokens, or with several models as parents of one: findings by code."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from merge.sources import TensorInfo
from merge.sources.model import Model
from merge.tokens import fit
from merge.tokens.architecture import architecture_findings
from merge.tokens.findings import Finding
from merge.tokens.loading import loading_findings
from merge.tokens.rowchecks import row_findings
from merge.tokens.templates import template_findings
from merge.tokens.vocabulary import TOKENIZER, Vocabulary, model_files, read_vocabulary
from merge.tokens.wholeness import file_findings, token_tensors


def diagnosed(models: Sequence[Model]) -> list[Finding]:
    """All that can be found: between the models, in each, and by loading their tokenizers."""
    vocabularies = _vocabularies(models)
    found = _between(models, vocabularies)
    for model, vocabulary in zip(models, vocabularies, strict=True):
        found += _within(model, vocabulary, rows=True)
    return _sorted(found + loading_findings(models, vocabularies))


def examined(model: Model, *, rows: bool = True) -> list[Finding]:
    """Is the model whole? `rows`: embedding and head are read, by grains. Raises SourceError, ReadError."""
    return _sorted(_within(model, vocabulary_of(model), rows=rows))


def examined_files(
    vocabulary: Vocabulary, tensors: Mapping[str, TensorInfo] | None
) -> list[Finding]:
    """Is it whole, as far as files and the headers of `tensors` tell? Files may be planned ones."""
    found = list(file_findings(vocabulary, tensors))
    found += template_findings(vocabulary) if vocabulary.ids else []
    return _sorted(found)


def compared(models: Sequence[Model]) -> list[Finding]:
    """Do the models fit together? The first is the one that the others are compared with."""
    return _sorted(_between(models, _vocabularies(models)))


def vocabulary_of(model: Model) -> Vocabulary:
    """What the model's files say about tokens; without a tokenizer.json one without tokens, whose other
    files count nevertheless."""
    files = model_files(model.folder, model.adapters)
    embedding, _ = token_tensors(model.config, model.source.tensors)
    rows = model.source.tensors[embedding].rows if embedding else None
    found = read_vocabulary(model.label, {TOKENIZER: b"{}", **files}, rows)
    assert found is not None
    return replace(found, config=model.config)


def _vocabularies(models: Sequence[Model]) -> list[Vocabulary]:
    """As vocabulary_of; equal tokenizers, the largest part of it, are kept once."""
    found: list[Vocabulary] = []
    for vocabulary in map(vocabulary_of, models):
        same = (v.tokenizer for v in found if v.tokenizer == vocabulary.tokenizer)
        found.append(replace(vocabulary, tokenizer=next(same, vocabulary.tokenizer)))
    return found


def _within(model: Model, vocabulary: Vocabulary, *, rows: bool) -> list[Finding]:
    found = examined_files(vocabulary, model.source.tensors)
    return found + (list(row_findings(model, vocabulary)) if rows else [])


def _between(models: Sequence[Model], vocabularies: Sequence[Vocabulary]) -> list[Finding]:
    found: list[Finding] = []
    having = [vocabulary for vocabulary in vocabularies if vocabulary.ids]
    for vocabulary in having[1:]:
        found += fit.token_findings(having[0], vocabulary)
        found += fit.padding_difference(having[0], vocabulary)
    for model in models[1:]:
        found += architecture_findings(models[0], model)
    found += fit.control_findings(vocabularies)
    found += fit.eos_difference(vocabularies)
    return found + list(fit.template_difference(vocabularies))


def recipe_lines(findings: Sequence[Finding]) -> str:
    """What the findings would add to a recipe, as one block of YAML; of two values the first counts."""
    section: dict[str, Any] = {}
    for finding in findings:
        _merge(section, yaml.safe_load(finding.fix) or {} if finding.fix else {})
    return yaml.safe_dump(section, sort_keys=False, allow_unicode=True) if section else ""


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        else:
            into.setdefault(key, value)


def _sorted(found: list[Finding]) -> list[Finding]:
    """Errors first, else as found."""
    return sorted(found, key=lambda finding: finding.severity)
