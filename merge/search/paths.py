"""Layers of models as what a search decides about: which of them, in which order, or in groups.

    slices: {path: {models: [A, B], layers: 24, repeats: 2}}   layers of A, then of B, all of it again; each
                                                               is there or not (arXiv:2403.13187)
    slices: {path: {models: [A, B], layers: 24, places: 30}}   at each place any layer of any model, or none
    slices: {groups: {layers: 24, block: 8, models: [{model: A, parameters: ...}, ...]}}
                                                               layers 0 to 7, 8 to 15 ... with own values

`layers`: of each model, 24 or [24, 32]. `block: 4`: layers are taken four at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from merge.lines import Path as Place

LAYERED = ("path", "groups")  # of slices
NOWHERE = "no layer"
Chooser = Callable[[str, tuple[str, ...]], int]  # name, labels -> number of the chosen one
Stretch = tuple[str, int, int]  # model, first layer, end


def layered(value: Any, at: Place = ()) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Each path and each set of groups in a document, with where it stands; none in its modules, which have
    layers of their own."""
    if not isinstance(value, dict | list):
        return
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        here = (*at, key)
        if key == "slices" and isinstance(each, dict):
            yield from (((*here, way), each[way]) for way in LAYERED if way in each)
        elif key != "modules":
            yield from layered(each, here)


def layers_of_each(spec: Mapping[str, Any]) -> list[tuple[Any, int]]:
    """(model, as the document names it; how many layers it is said to have)."""
    return list(zip(spec["models"], _counts(spec), strict=True))


def check(
    spec: Mapping[str, Any], error: Callable[[str, str], Exception], *, alike: bool = False
) -> None:
    """Raises error(key, what) where layers cannot be taken as `spec` says. alike: all models have as many."""
    models = spec.get("models")
    if not isinstance(models, list) or not models:
        raise error("models", "models must be a list of models")
    counts = _counts(spec)
    if alike and isinstance(spec.get("layers"), list):
        raise error("layers", "layers must be one number; models that are merged have as many")
    if len(counts) != len(models):
        raise error("layers", f"layers must be one number, or {len(models)}, one for each model")
    if "places" in spec and "repeats" in spec:
        raise error("places", "places and repeats are both given; keep one")
    for key, count in (
        *(("layers", count) for count in counts),
        *((key, spec.get(key, 1)) for key in ("block", "repeats", "places")),
    ):
        if type(count) is not int or count < 1:
            raise error(key, f"{key} must be a whole number from 1")


def path(spec: Mapping[str, Any], choose: Chooser) -> list[dict[str, Any]]:
    """The slices that the answers give; those that follow one another in one model are one."""
    blocks = list(_blocks(spec))
    taken = _placed(spec, blocks, choose) if "places" in spec else _kept(spec, blocks, choose)
    return [
        {"sources": [{"model": model, "layer_range": [first, end]}]}
        for model, first, end in _joined(taken)
    ]


def groups(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A slice of every `block` layers, of all models; what varies in them varies in each for itself."""
    layers, block = spec["layers"], spec.get("block", 1)
    rest = {key: spec[key] for key in ("base_model", "parameters") if key in spec}
    return [
        {
            "sources": [
                (dict(entry) if isinstance(entry, dict) else {"model": entry})
                | {"layer_range": [first, min(first + block, layers)]}
                for entry in spec["models"]
            ]
        }
        | rest
        for first in range(0, layers, block)
    ]


def _counts(spec: Mapping[str, Any]) -> list[Any]:
    """Layers of each model."""
    layers, models = spec.get("layers"), spec["models"]
    return layers if isinstance(layers, list) else [layers] * len(models)


def _blocks(spec: Mapping[str, Any]) -> Iterator[Stretch]:
    """What is taken as one, model by model."""
    size = spec.get("block", 1)
    for model, layers in zip(spec["models"], _counts(spec), strict=True):
        for first in range(0, layers, size):
            yield model, first, min(first + size, layers)


def _kept(spec: Mapping[str, Any], blocks: Sequence[Stretch], choose: Chooser) -> list[Stretch]:
    return [
        block
        for repeat in range(spec.get("repeats", 1))
        for block in blocks
        if choose(f"{repeat}.{block[0]}.{block[1]}", ("without", "with"))
    ]


def _placed(spec: Mapping[str, Any], blocks: Sequence[Stretch], choose: Chooser) -> list[Stretch]:
    labels = (*(_label(block) for block in blocks), NOWHERE)
    chosen = [choose(str(place), labels) for place in range(spec["places"])]
    return [blocks[number] for number in chosen if number < len(blocks)]


def _label(block: Stretch) -> str:
    model, first, end = block
    return f"{model} {first}" + (f" to {end - 1}" if end - first > 1 else "")


def _joined(stretches: Sequence[Stretch]) -> Iterator[Stretch]:
    """Stretches of one model that follow one another as one."""
    layers = [(model, n) for model, first, end in stretches for n in range(first, end)]
    numbered = [(model, layer, layer - i) for i, (model, layer) in enumerate(layers)]
    for (model, _), run in groupby(numbered, key=lambda each: (each[0], each[2])):
        stretch = [layer for _, layer, _ in run]
        yield model, stretch[0], stretch[-1] + 1
