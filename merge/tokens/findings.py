"""A finding: something about tokens or configs that is wrong, or may be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """`code` is stable, like "eos-differs". `what`: one line, with the evidence in words. `evidence`: ids,
    files and tensor names for machines. `fix`: recipe lines that would resolve it ("" if there are none)."""

    code: str
    severity: Severity
    models: tuple[str, ...]
    what: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: str = ""
