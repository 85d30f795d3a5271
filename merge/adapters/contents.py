"""What of a fine-tune goes where in an adapter: into factors, whole, or nowhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from merge.adapters.delta import Delta
from merge.adapters.modules import Modules
from merge.anatomy import natural_order
from merge.numerics import FLOATS
from merge.sources.model import Model
from merge.sources.names import Names


@dataclass(frozen=True)
class Contents:
    """Of the tensors that changed. layers: module -> tensor, for factors. saved: modules kept whole. whole:
    parameter, as PEFT calls it, -> tensor, for these and for biases of linear layers. impossible: tensors
    that PEFT cannot hold. norms: of every difference. rows: of a grown vocabulary. biases: there are some.
    tied: the embedding is the head too, and PEFT is to keep it so.
    """

    modules: Modules
    norms: Mapping[str, float]
    layers: Mapping[str, str]
    saved: tuple[str, ...]
    whole: Mapping[str, str]
    impossible: tuple[str, ...]
    rows: int | None
    biases: bool
    tied: bool


def sort_out(
    deltas: Mapping[str, Delta],
    base: Model,
    modules: Modules,
    progress: Callable[[int], None],
) -> Contents:
    """Reads every difference once; progress(n): n more bytes of them. Raises ReadError, NonFiniteError."""
    names = sorted(deltas, key=natural_order)
    norms: dict[str, float] = {}
    for name in names:
        norms[name] = deltas[name].norm()
        progress(deltas[name].nbytes)
    stored, unknown = _stored(names, modules)
    found: dict[str, dict[str, str]] = {"layer": {}, "bias": {}, "saved": {}, "impossible": {}}
    for key, name in stored.items():
        if norms[name]:
            found[_kind(key, deltas[name], modules)][key] = name
    layers = {_module(key): name for key, name in found["layer"].items()}
    saved = tuple(dict.fromkeys(_module(key) for key in found["saved"]))
    kept = [f"{module}.{leaf}" for module in saved for leaf in modules.tensors[module]]
    whole = {key: stored[key] for key in kept if key in stored}
    for key, name in found["bias"].items():
        module = _module(key)
        whole[f"{module}.base_layer.bias" if module in layers else key] = name
    head, embedding = f"{modules.head}.weight", f"{modules.embedding}.weight"
    tied = bool(modules.head) and modules.embedding in saved and head not in stored
    grown = [
        n for n in found["saved"].values() if deltas[n].read is None and n in base.source.tensors
    ]
    return Contents(
        modules,
        norms,
        layers,
        saved,
        whole | ({head: stored[embedding]} if tied else {}),
        (*(name for name in unknown if norms[name]), *found["impossible"].values()),
        deltas[grown[0]].shape[0] if grown else None,
        bool(found["bias"]),
        tied,
    )


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _stored(names: Sequence[str], modules: Modules) -> tuple[dict[str, str], list[str]]:
    """Parameter -> tensor, and the tensors that are no parameter that transformers knows."""
    known = Names({f"{m}.{leaf}" for m, leaves in modules.tensors.items() for leaf in leaves})
    stored: dict[str, str] = {}
    unknown = []
    for name in names:
        fitting = known.fitting(name)
        if len(fitting) == 1 and fitting[0] not in stored:
            stored[fitting[0]] = name
        else:
            unknown.append(name)
    return stored, unknown


def _kind(key: str, delta: Delta, modules: Modules) -> str:
    """layer, bias, saved or impossible: where the change of parameter `key` goes."""
    module, _, leaf = key.rpartition(".")
    grown = delta.read is None
    if delta.dtype not in FLOATS:
        return "impossible"
    if module in modules.linear:
        kind = {"weight": "layer", "bias": "bias"}.get(leaf, "impossible")
        return "impossible" if grown else kind
    # PEFT takes every module that ends so, and with a module those in it
    several = sum(other.endswith(module) for other in modules.tensors) > 1
    if several or module in modules.parents:
        return "impossible"
    if grown and module not in (modules.embedding, modules.head):
        return "impossible"
    return "saved"
