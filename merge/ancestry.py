"""Whether models that are merged were merged from the same models themselves, as their provenance tells."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from merge.numerics import combined_digest
from merge.plan import Plan
from merge.printing import printable
from merge.sources.model import ZOO, Model
from merge.verify import PROVENANCE

DEEPEST = 20  # merges of merges that are followed: a file may say anything
SAME_NAME = " (same name)"  # said where nothing else tells that two models are one


@dataclass(frozen=True)
class Ancestor:
    """A model as a provenance names it. `digest`: of the tensors that were read, of so many. `folder`: where
    one lies that is merged now."""

    name: str
    commit: str | None = None
    digest: str = ""
    tensors: int = 0
    folder: Path | None = None

    def likeness(self, other: "Ancestor") -> str | None:
        """Whether both are one model: "" where tensors, place or a name that means the same to everybody say
        so; SAME_NAME where only the name of a folder does; None where they are two."""
        if self.tensors and self.digest and self.digest == other.digest:
            return ""
        if self.folder and self.folder == other.folder:
            return ""
        if self.name != other.name or self.commit != other.commit:
            return None
        if self.commit or self.name.startswith(ZOO):
            return ""
        known = self.digest and other.digest and self.tensors == other.tensors
        return None if known else SAME_NAME


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
        if other is not base and (how := _among(of_one, others_own)) is not None:
            notes.append(f"a merge of merges: {names[0]} comes from {names[1]}{how}")
        elif one is not base and (how := _among(of_other, own)) is not None:
            notes.append(f"a merge of merges: {names[1]} comes from {names[0]}{how}")
        elif shared := _shared(of_one, of_other, known):
            both = f"{names[0]} and {names[1]} both come from"
            notes.append(f"a merge of merges: {both} {', '.join(shared)}")
    return notes


def ancestors_of(model: Model) -> list[Ancestor]:
    """Every model that it was made from, and those that these were made from; [] where nothing is told."""
    name = model.public_name.split("+")[0]
    bare = [Ancestor(name, model.commit, folder=model.folder)] if model.adapters else []
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
    """Names of the models that both come from, but for `known`, and how sure that is."""
    found: dict[str, str] = {}
    for each in of_one:
        how = _among(of_other, each)
        if how is not None and not (known and each.likeness(known) is not None):
            found[each.name] = min(how, found.get(each.name, how))
    return [f"{name}{how}" for name, how in found.items()]


def _among(ancestors: Iterable[Ancestor], model: Ancestor) -> str | None:
    """The surest likeness of a model to one of these; None where it is none of them."""
    found = [how for each in ancestors if (how := each.likeness(model)) is not None]
    return min(found, default=None)  # "" comes before SAME_NAME


def _own(model: Model) -> Ancestor:
    """The model itself; where it tells of its tensors, with the digest that a merge of it tells."""
    if model.adapters:
        return Ancestor(model.public_name, model.commit)
    own = Ancestor(model.public_name, model.commit, folder=model.folder)
    outputs = (_provenance(model) or {}).get("outputs")
    if not isinstance(outputs, dict) or not all(isinstance(o, dict) for o in outputs.values()):
        return own
    lines = (f"{name}={outputs[name].get('digest')}\n".encode() for name in sorted(outputs))
    return replace(own, digest=combined_digest(lines), tensors=len(outputs))


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
