"""Whether models that are merged were merged from the same models themselves, as their provenance tells."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from merge.numerics import combined_digest
from merge.plan import Plan
from merge.printing import printable
from merge.sources.model import Model
from merge.verify import PROVENANCE

DEEPEST = 20  # merges of merges that are followed: a file may say anything


@dataclass(frozen=True)
class Ancestor:
    """A model as a provenance names it. `digest`: of the tensors that were read, of so many."""

    name: str
    commit: str | None = None
    digest: str = ""
    tensors: int = 0

    def is_(self, other: "Ancestor") -> bool:
        """Whether both are the same model, as far as can be known."""
        if self.digest and self.digest == other.digest:
            return True
        if self.name != other.name or self.commit != other.commit:
            return False
        known = self.digest and other.digest and self.tensors == other.tensors
        return bool(self.commit) or not known


def ancestry_notes(plan: Plan) -> list[str]:
    """A note for every two models of a merge of which one comes from the other, or both from a third; that
    they come from the base of this very merge is no news, nor that experts of a mixture have one."""
    if plan.recipe.mixes:
        return []
    base = None if plan.base is None else plan.models[plan.base]
    known = _own(base) if base else None
    models = [model for model in plan.models if not model.computed]
    told = [(model, _own(model), ancestors_of(model)) for model in models]
    notes = []
    for (one, own, of_one), (other, others_own, of_other) in combinations(told, 2):
        names = one.public_name, other.public_name
        if other is not base and any(each.is_(others_own) for each in of_one):
            notes.append(f"a merge of merges: {names[0]} comes from {names[1]}")
        elif one is not base and any(each.is_(own) for each in of_other):
            notes.append(f"a merge of merges: {names[1]} comes from {names[0]}")
        elif shared := _shared(of_one, of_other, known):
            both = f"{names[0]} and {names[1]} both come from"
            notes.append(f"a merge of merges: {both} {', '.join(shared)}")
    return notes


def ancestors_of(model: Model) -> list[Ancestor]:
    """Every model that it was made from, and those that these were made from; [] where nothing is told."""
    bare = [Ancestor(model.public_name.split("+")[0], model.commit)] if model.adapters else []
    return bare + list(_told(_provenance(model) or {}))


def ancestry(models: Iterable[Model]) -> dict[str, Any]:
    """What the provenance of a merge tells of the models that its models were merged from, by public name."""
    found = {model.public_name: _provenance(model) for model in models if not model.computed}
    return {
        name: {key: told[key] for key in ("inputs", "ancestry") if key in told}
        for name, told in found.items()
        if told
    }


def _shared(
    of_one: Sequence[Ancestor], of_other: Sequence[Ancestor], known: Ancestor | None
) -> list[str]:
    names = [
        each.name
        for each in of_one
        if any(each.is_(other) for other in of_other) and not (known and each.is_(known))
    ]
    return list(dict.fromkeys(names))


def _own(model: Model) -> Ancestor:
    """The model itself; where it tells of its tensors, with the digest that a merge of it tells."""
    outputs = (_provenance(model) or {}).get("outputs") if not model.adapters else None
    if not isinstance(outputs, dict) or not all(isinstance(o, dict) for o in outputs.values()):
        return Ancestor(model.public_name, model.commit)
    lines = (f"{name}={outputs[name].get('digest')}\n".encode() for name in sorted(outputs))
    return Ancestor(model.public_name, model.commit, combined_digest(lines), len(outputs))


def _told(provenance: Mapping[str, Any], depth: int = 0) -> Iterator[Ancestor]:
    inputs, further = provenance.get("inputs"), provenance.get("ancestry")
    for entry in inputs if isinstance(inputs, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("model"), str):
            yield _ancestor(entry)
    if isinstance(further, dict) and depth < DEEPEST:
        for inner in further.values():
            if isinstance(inner, dict):
                yield from _told(inner, depth + 1)


def _ancestor(entry: Mapping[str, Any]) -> Ancestor:
    commit, digest, tensors = (entry.get(key) for key in ("commit", "digest", "tensors"))
    return Ancestor(
        printable(entry["model"]),
        commit if isinstance(commit, str) else None,
        digest if isinstance(digest, str) else "",
        tensors if isinstance(tensors, int) else 0,
    )


def _provenance(model: Model) -> dict[str, Any] | None:
    """What the model's folder tells; None where it tells nothing that can be read."""
    file = Path(model.folder, PROVENANCE)
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(told, ensure_ascii=False).encode()  # as the provenance of a merge will repeat it
    except (OSError, ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None
