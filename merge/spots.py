"""Which tensors an output has, and which tensors of the models go into each.

Of whole models: every tensor of the reference with those of its name. Of slices: layers of all of them, one
after the other; what comes before the layers by the first slice, what comes after them by the last.
Modules that the recipe says nothing of are the reference's own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge.anatomy import (
    Module,
    beside_stack,
    layer_count,
    layer_of,
    layer_tensors,
    main_stack,
    natural_order,
    renamed,
    tied_heads,
)
from merge.errors import PlanError
from merge.lineup import Lineup
from merge.recipe import Entry, Part, Slice
from merge.stacking import check_layers, check_places, stacked_config

FIRST = re.compile(r"embed|wte|wpe|word_embeddings|shared")  # what comes before the layers


@dataclass(frozen=True)
class Spot:
    """A tensor of the output. `names[i]`: what it is called in the model of the slice's entry i, `base`: in
    its base; `lead`: (model, name) of the tensor whose shape and dtype it has; `depth`: how far through
    the layers of its slice it lies, 0 to 1."""

    name: str
    piece: Slice
    names: tuple[str, ...]
    base: str | None
    lead: tuple[int, str]
    depth: float


@dataclass(frozen=True)
class Spots:
    """`merged` by the recipe's parts, `carried` over from the reference, and config.json for all of them."""

    merged: tuple[Spot, ...]
    carried: tuple[str, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]


def find_spots(lineup: Lineup) -> Spots:
    """Raises PlanError where models lack layers, or have tensors that would vanish."""
    return _Finder(lineup).spots()


class _Finder:
    """Holds the models, and the config and notes as they come about."""

    def __init__(self, lineup: Lineup) -> None:
        self.lineup, self.recipe = lineup, lineup.recipe
        self.config: Mapping[str, Any] = lineup.models[lineup.donor].config
        self.notes: list[str] = []
        self._found_layers: dict[tuple[int, str], dict[int, dict[str, str]]] = {}

    def spots(self) -> Spots:
        merged: list[Spot] = []
        spoken: set[str] = set()
        for part in self.recipe.parts:
            module = self._module(part)
            spoken.update(module.names)
            if part.slices[0].layers is None:
                merged += self._whole(part, module)
            else:
                merged += self._stacked(part, module)
        reference = self.lineup.spelled[self.lineup.reference]
        carried = tuple(sorted(reference.keys() - spoken, key=natural_order))
        return Spots(tuple(merged), carried, self.config, tuple(self.notes))

    def _module(self, part: Part) -> Module:
        """What of the reference the part speaks of."""
        lineup = self.lineup
        names = lineup.spelled[lineup.reference]
        if part.module is not None:
            return self._named_module(part.module)
        if part.slices[0].layers is None:
            return Module(tuple(names), None)
        stack = main_stack(names, lineup.models[lineup.reference].config)
        found = [m for m in lineup.modules.values() if stack is not None and m.stack == stack]
        if not found:
            raise PlanError(
                f"{self.recipe.where('slices')}: {lineup.models[lineup.reference].label} has no layers that "
                f"slices alone could mean; name them under modules ({', '.join(lineup.modules)})"
            )
        return found[0]

    def _named_module(self, name: str) -> Module:
        modules = self.lineup.modules
        if name not in modules:
            label = self.lineup.models[self.lineup.reference].label
            where = self.recipe.where("modules", name)
            raise PlanError(f"{where}: {label} has no module {name!r}; it has {', '.join(modules)}")
        return modules[name]

    # -- whole models ------------------------------------------------------------------------------

    def _whole(self, part: Part, module: Module) -> Iterator[Spot]:
        piece, names = part.slices[0], sorted(module.names, key=natural_order)
        if part.module is None:  # what other modules hold is no business of this one
            self._check_extra(piece, set(names))
        layers = layer_counts(names)
        for name in names:
            layer = layer_of(name)
            depth = _depth(layer[1], layers[layer[0]]) if layer else self._around(name)
            called = (name,) * len(piece.entries)
            yield Spot(name, piece, called, name, (self.lineup.reference, name), depth)
        yield from self._untied(piece) if part.module is None else ()

    def _check_extra(self, piece: Slice, names: set[str]) -> None:
        reference, heads = self.lineup.models[self.lineup.reference].label, self._own_heads(piece)
        for index in dict.fromkeys(self.lineup.index[entry.model] for entry in piece.entries):
            extra = sorted(
                self.lineup.spelled[index].keys() - names - heads.keys(), key=natural_order
            )
            self._refuse_extra(self.lineup.models[index].label, reference, extra)

    def _untied(self, piece: Slice) -> Iterator[Spot]:
        """Heads that models have of their own, where the reference's is its embedding."""
        for name, index in self._own_heads(piece).items():
            self.config = _with_own_head(self.config)
            self.notes.append(
                f"{self.lineup.models[index].label}: has a head of its own, {name}; so has the result, in "
                "which the models that have none count with their embedding"
            )
            called = (name,) * len(piece.entries)
            yield Spot(name, piece, called, name, (index, name), self._around(name))

    def _own_heads(self, piece: Slice) -> dict[str, int]:
        """Name of such a head -> number of the first model that has it."""
        sections, lineup = self.recipe.sections, self.lineup
        if sections.adapter or sections.extra_tensors == "drop":
            return {}
        reference, found = lineup.spelled[lineup.reference], dict[str, int]()
        for index in (lineup.index[entry.model] for entry in piece.entries):
            more = sorted(lineup.spelled[index].keys() - reference.keys())
            tied = tied_heads(lineup.models[lineup.reference].config, reference, more)
            found |= {name: index for name in tied if name in more and name not in found}
        return found

    def _refuse_extra(self, label: str, reference: str, extra: Sequence[str]) -> None:
        if extra and self.recipe.sections.extra_tensors == "error":
            raise PlanError(
                f"{label}: has {len(extra)} tensors that {reference} lacks, "
                f"first {extra[0]!r}; "
                "to merge without them set extra_tensors: drop"
            )
        if extra:
            self.notes.append(f"{label}: dropped as {reference} lacks them: {some(extra)}")

    def _around(self, name: str) -> float:
        """0 before the layers, 1 after them (0 in mergekit)."""
        return 0.0 if FIRST.search(name) or self.recipe.sections.compat == "mergekit" else 1.0

    # -- layers ------------------------------------------------------------------------------------

    def _stacked(self, part: Part, module: Module) -> Iterator[Spot]:
        stack = module.stack
        self._check_stack(part, module)
        assert stack is not None
        yield from self._beside_layers(part, module)
        origins: list[tuple[int, int]] = []
        for piece in part.slices:
            lead, first = self.lineup.lead(piece), self._first_layer(piece)
            for k in range(piece.layers or 0):
                yield from self._layer(piece, stack, k, len(origins))
                origins.append((lead, first + k))
        yield from self._further(part.slices[-1], stack, len(origins))
        self._restack(part, stack, origins)

    def _check_stack(self, part: Part, module: Module) -> None:
        where = self.recipe.where(*part.slices[0].place)
        if module.stack is None:
            raise PlanError(f"{where}: {part.module} has no layers to stack; list it under models")
        if left := beside_stack(module):
            raise PlanError(
                f"{where}: beside the layers {module.stack}.* there are others, first {left[0]!r}, which "
                "slices would leave behind; merge whole models"
            )

    def _beside_layers(self, part: Part, module: Module) -> Iterator[Spot]:
        first, last = part.slices[0], part.slices[-1]
        if (
            self.recipe.sections.compat == "mergekit"
        ):  # it counts the first slice's sources for both
            last = replace(last, entries=last.entries[: len(first.entries)])
        for name in sorted(module.names, key=natural_order):
            if layer_of(name) is None:
                piece = first if FIRST.search(name) else last
                called = (name,) * len(piece.entries)
                yield Spot(
                    name, piece, called, name, (self.lineup.lead(piece), name), self._around(name)
                )

    def _layer(self, piece: Slice, stack: str, k: int, number: int) -> Iterator[Spot]:
        """The spots of output layer `number`: layer k of a slice."""
        lead, base = self.lineup.lead(piece), self.lineup.base_layers(piece)
        template = self._first_layer(piece) + k
        leading = next((e for e in piece.entries if self.lineup.index[e.model] == lead), None)
        names = self._in_layer(lead, stack, template, piece, leading)
        for entry in piece.entries:
            own = (entry.layers or (0,))[0] + k
            theirs = self._in_layer(self.lineup.index[entry.model], stack, own, piece, entry)
            extra = {renamed(name, stack, template) for name in theirs} - set(names)
            found = [renamed(name, stack, own) for name in sorted(extra, key=natural_order)]
            label = self.lineup.models[lead].label
            self._refuse_extra(entry.model, f"layer {template} of {label}", found)
        for name in names:
            called = tuple(renamed(name, stack, (e.layers or (0,))[0] + k) for e in piece.entries)
            of_base = renamed(name, stack, base[0] + k) if base else None
            depth = _depth(k, piece.layers or 1)
            yield Spot(renamed(name, stack, number), piece, called, of_base, (lead, name), depth)

    def _further(self, piece: Slice, stack: str, layers: int) -> Iterator[Spot]:
        """Layers of the last slice's model after those that config.json counts, which predict further
        tokens: they are numbered on."""
        lead = self.lineup.lead(piece)
        counted = layer_count(self.lineup.models[lead].config, stack)
        if counted is None:
            return
        for number, names in self._layers(lead, stack).items():
            for name in names.values() if number >= counted else ():
                new = renamed(name, stack, layers + number - counted)
                called = (name,) * len(piece.entries)
                yield Spot(new, piece, called, name, (lead, name), self._around(name))

    def _first_layer(self, piece: Slice) -> int:
        """The number of the slice's first layer in the model that leads."""
        layers = self.lineup.base_layers(piece) or piece.entries[0].layers
        assert layers is not None
        return layers[0]

    def _in_layer(
        self, index: int, stack: str, number: int, piece: Slice, entry: Entry | None
    ) -> list[str]:
        """Names of the tensors of one layer; PlanError where the model has no such layer."""
        layers = self._layers(index, stack)
        if number not in layers:
            place = (*entry.place, "layer_range") if entry else piece.place
            count = len(layers)
            raise PlanError(
                f"{self.recipe.where(*place)}: {self.lineup.models[index].label} has no layer {number}; "
                f"it has {count} layers, so that its layer_range can be [0, {count}] at most"
            )
        return list(layers[number].values())

    def _layers(self, index: int, stack: str) -> dict[int, dict[str, str]]:
        """Layer -> name within the layer -> whole name, of a model's tensors."""
        if (index, stack) not in self._found_layers:
            names = sorted(self.lineup.spelled[index], key=natural_order)
            self._found_layers[index, stack] = layer_tensors(names, stack)
        return self._found_layers[index, stack]

    def _restack(self, part: Part, stack: str, origins: Sequence[tuple[int, int]]) -> None:
        """config.json for the layers; raises PlanError where no config.json can describe them."""
        models, spelled = self.lineup.models, self.lineup.spelled
        where = self.recipe.where(*part.slices[0].place)
        try:
            self.config, notes = stacked_config(
                self.config, stack, [(models[index].config, layer) for index, layer in origins]
            )
            self.notes += notes
            for index in dict.fromkeys(index for index, _ in origins):
                numbers = {i: layer for i, (of, layer) in enumerate(origins) if of == index}
                label, config = models[index].label, models[index].config
                check_places(label, spelled[index], config, stack, numbers, len(origins))
            shapes = [(models[i].label, self._shapes(i, stack, layer)) for i, layer in origins]
            check_layers(self.config, stack, shapes)
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None

    def _shapes(self, index: int, stack: str, number: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's tensors by their names within the layer."""
        spelled, tensors = self.lineup.spelled[index], self.lineup.models[index].source.tensors
        inside = self._layers(index, stack)[number].items()
        return {short: tensors[spelled[name]].shape for short, name in inside}


def _with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head is a tensor of its own."""
    key = "tie_word_embeddings"
    text = config.get("text_config")
    inner = {"text_config": {**text, key: False}} if isinstance(text, dict) and key in text else {}
    return {**config, **inner, key: False}


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of every stack."""
    counts: dict[str, int] = {}
    for layer in filter(None, map(layer_of, names)):
        counts[layer[0]] = max(counts.get(layer[0], 0), layer[1] + 1)
    return counts


def _depth(layer: int, layers: int) -> float:
    return layer / (layers - 1) if layers > 1 else 1.0


def some(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
