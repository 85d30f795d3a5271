"""The models of a recipe side by side: which one leads, and their tensors under one spelling.

Names are spoken of as the reference spells them: the base, or the model that lends its files.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from merge.anatomy import Module, layer_of, matched, modules, recomputed, renamed, tied_heads
from merge.errors import PlanError
from merge.plan import Operand, Step
from merge.recipe import Recipe, Slice
from merge.sources.model import Model


class Lineup:
    """`index`: number of a model by its label; `made`: steps by name of those that are merges themselves."""

    def __init__(
        self,
        recipe: Recipe,
        models: Sequence[Model],
        index: Mapping[str, int],
        made: Mapping[int, Mapping[str, Step]],
    ) -> None:
        self.recipe, self.models, self.index, self._made = recipe, models, index, made
        base = recipe.sections.base_model
        self.base = index[base] if base else None
        self.donor = self._donor()
        self.reference = self._reference()
        known = [*recipe.labels, *filter(None, [recipe.outside_source])]
        self.spelled = {i: self._spelling(i) for i in (index[label] for label in known)}

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """The parts of the reference by name."""
        return modules(self.spelled[self.reference], self.models[self.reference].config)

    @cached_property
    def merged(self) -> list[int]:
        """The models whose values go into the result: all but an adapter's base that is only compared."""
        apart = self.recipe.sections.adapter and self.recipe.method.base == "donor"
        entries = {entry.model for piece in self.recipe.slices for entry in piece.entries}
        return [self.index[label] for label in self.recipe.labels if label in entries or not apart]

    def stored(self, index: int, name: str) -> Operand | None:
        """A tensor of a model by the reference's name; a tied model lends its embedding as head."""
        model, spelled = self.models[index], self.spelled[index]
        stored = spelled.get(name)
        if stored is None:
            stored = spelled.get(tied_heads(model.config, spelled, [name]).get(name, ""))
        if stored is None:
            return None
        step = self._made[index][stored] if index in self._made else None
        return Operand(index, stored, model.source.tensors[stored], step)

    def dropped(self, index: int) -> list[str]:
        """Stored tensors that do not count: what is computed on loading, and heads beside the embedding
        that they are tied to."""
        model = self.models[index]
        tied = tied_heads(model.config, model.source.tensors)
        return [
            name
            for name, info in model.source.tensors.items()
            if name in tied or recomputed(name, info.shape)
        ]

    def lead(self, piece: Slice) -> int:
        """The model whose tensors give the names, shapes and dtypes of a slice's."""
        based = piece.base is not None and self.recipe.method.base != "donor"
        return self.index[piece.base if based and piece.base else piece.entries[0].model]

    def base_layers(self, piece: Slice) -> tuple[int, int] | None:
        """The layers of a slice's base; None where none is merged. Raises PlanError."""
        if piece.base is None or self.recipe.method.base == "donor":
            return None
        own = [entry.layers for entry in piece.entries if entry.model == piece.base]
        found = own or list({entry.layers for entry in piece.entries})
        if len(found) > 1:
            raise PlanError(
                f"{self.recipe.where(*piece.place)}: the sources give different layers, and the base "
                f"{piece.base} is not one of them; list it with its layer_range"
            )
        return found[0]

    def _donor(self) -> int:
        """The model that lends its files: the one whose vocabulary the result gets, where that is merged."""
        named = self.recipe.sections.tokens.model(self.recipe.labels)
        if named is not None:
            return self.index[named]
        merged = (label for label in self.recipe.labels if self.index[label] in self.merged)
        return self.index[next(merged)]

    def _reference(self) -> int:
        """The base; or the donor; of an adapter's base that is not merged itself, the model it is to be."""
        if self.recipe.sections.adapter and self.recipe.method.base == "donor":
            return self.index[self.recipe.slices[0].entries[0].model]
        return self.donor if self.base is None else self.base

    def _spelling(self, index: int) -> Mapping[str, str]:
        """Names of a model's tensors as the reference spells them -> as they are stored there."""
        own = self._counting(index)
        if index == self.reference:
            return {name: name for name in own}
        wanted = self._counting(self.reference)
        if not wanted.keys() >= own.keys():
            wanted |= _in_all_layers(wanted, own)
        names = {stored: name for name, stored in matched(wanted, own).items()}
        return {names.get(stored, stored): stored for stored in own}

    def _counting(self, index: int) -> dict[str, None]:
        dropped = set(self.dropped(index))
        return {name: None for name in self.models[index].source.tensors if name not in dropped}


def _in_all_layers(names: Mapping[str, None], other: Mapping[str, None]) -> dict[str, None]:
    """What layered tensors would be called in every layer that another model has."""
    layers = 1 + max((layer[1] for layer in map(layer_of, other) if layer), default=-1)
    templates = {renamed(name, layer[0], 0): None for name in names if (layer := layer_of(name))}
    return {
        renamed(name, layer[0], number): None
        for name in templates
        if (layer := layer_of(name))
        for number in range(layers)
    }
