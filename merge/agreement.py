"""Do these models fit together? What equal shapes alone do not tell."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from merge.errors import PlanError
from merge.sources.model import Model
from merge.tokens.architecture import config_findings
from merge.tokens.vocabularies import Vocabularies


def check_agreement(
    donor: Model,
    others: Sequence[Model],
    vocabularies: Vocabularies,
    *,
    whole: bool = True,
    same_tokens: bool = True,
) -> list[str]:
    """Notes about doubtful differences; raises PlanError for those that make a merge meaningless.

    whole: the models are merged as a whole; else only modules, which models of other types may share.
    same_tokens: their vocabularies must be one.
    """
    notes: list[str] = []
    for other in others:
        for finding in config_findings(donor, other, whole=whole):
            found = f"{other.label}: {finding.what} ({finding.code})"
            if finding.severity == "error":
                raise PlanError(f"{found}; models of one architecture can be merged")
            notes.append(f"{found}; config.json comes from {donor.label}")
        if same_tokens and (difference := _other_tokens(donor, other, vocabularies)):
            raise PlanError(
                f"{other.label}: its tokenizer is not that of {donor.label}: {difference}; rows of the "
                "embedding would be mixed up: merge models of one vocabulary"
            )
    return notes


def _other_tokens(donor: Model, other: Model, vocabularies: Vocabularies) -> str | None:
    """Of the models without their adapters, which may bring tokens: their rows come after all others."""
    a, b = (replace(model, adapters=()) for model in (donor, other))
    return vocabularies.difference(a, b)


def canonical(data: Any) -> str:
    """JSON text that is equal for equal data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
