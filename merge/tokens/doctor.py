"""What is wrong with a model's tokens, or with several models as parents of one: findings by code."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from merge.sources import TensorInfo
from merge.sources.model import Model
from merge.tokens.architecture import config_findings, header_findings
from merge.tokens.findings import Finding
from merge.tokens.fit import vocabulary_findings
from merge.tokens.loading import loading_findings
from merge.tokens.rowchecks import row_findings
from merge.tokens.templates import template_findings
from merge.tokens.vocabularies import Vocabularies
from merge.tokens.vocabulary import Vocabulary
from merge.tokens.wholeness import file_findings


def diagnosed(models: Sequence[Model], *, load: bool = True) -> list[Finding]:
    """All that can be found: between the models (the first is the one that the others are compared with), in
    each, and, with `load`, by having transformers load their tokenizers. Embeddings and heads are read, by
    grains. Raises SourceError, ReadError."""
    read = Vocabularies()
    vocabularies = [read.of(model) for model in models]
    found = _between(models, vocabularies)
    for model, vocabulary in zip(models, vocabularies, strict=True):
        found += _within(model, vocabulary)
    return _sorted(found + (loading_findings(models, vocabularies) if load else []))


def examined_files(
    vocabulary: Vocabulary, tensors: Mapping[str, TensorInfo] | None
) -> list[Finding]:
    """Is it whole, as far as files and the headers of `tensors` tell? Files may be planned ones."""
    found = list(file_findings(vocabulary, tensors))
    found += template_findings(vocabulary) if vocabulary.ids else []
    return _sorted(found)


def _within(model: Model, vocabulary: Vocabulary) -> list[Finding]:
    found = examined_files(vocabulary, model.source.tensors)
    return found + list(row_findings(model, vocabulary))


def _between(models: Sequence[Model], vocabularies: Sequence[Vocabulary]) -> list[Finding]:
    found = list(vocabulary_findings(vocabularies))
    for model in models[1:]:
        found += config_findings(models[0], model)
        found += header_findings(models[0], model)
    return found


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
