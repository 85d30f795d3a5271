"""YAML -> Recipe: what the user asked for, checked against the signatures of the methods.

Everything that a recipe alone can get wrong is a RecipeError here, with file and line. Whether models
and recipe fit together is the business of `plan`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.errors import RecipeError
from merge.lines import Lines, load_documents, nearest
from merge.lines import Path as Place
from merge.methods import Method, all_methods
from merge.sections import (
    OF_MIXTURES,
    ModelEntry,
    ModuleEntry,
    Sections,
    SliceEntry,
    SourceEntry,
    read_sections,
)
from merge.settings import Resolution, Settings, SettingsReader

# of the last document of a file
OF_THE_LAST = (
    *("adapter", "score", "allow_nonfinite", "shard_size"),
    *("tokenizer", "stop", "chat_template", "experts", "mixture"),
)
OUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Entry:
    """A model that is merged: all of it, or its `layers` [first, end). `settings` are its parameters;
    a base has none where the models are taken as task vectors. `place`: where the recipe says so."""

    model: str
    layers: tuple[int, int] | None
    settings: Settings
    place: Place


@dataclass(frozen=True)
class Slice:
    """Layers that follow one another in the output, or (`layers` None) whole models.

    `shared`: parameters with one value for all models. `task_vectors`: the entries are taken as task
    vectors on `base`, which has none itself.
    """

    base: str | None
    entries: tuple[Entry, ...]
    shared: Settings
    task_vectors: bool
    place: Place

    @property
    def layers(self) -> int | None:
        """How many layers it gives; None: whole models."""
        span = self.entries[0].layers
        return span[1] - span[0] if span else None


@dataclass(frozen=True)
class Part:
    """What becomes of one module of a model (None: of all of it)."""

    module: str | None
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe that is right in itself. `stages`: the recipes of the same file whose results it merges,
    by the name that it calls them, each after those that it needs. `lines` finds the line of a key."""

    sections: Sections
    method: Method
    parts: tuple[Part, ...]
    lines: Lines
    stages: Mapping[str, "Recipe"] = field(default_factory=dict)

    @property
    def slices(self) -> tuple[Slice, ...]:
        return tuple(piece for part in self.parts for piece in part.slices)

    @property
    def labels(self) -> list[str]:
        """Every model that the recipe itself reads, once, the base first where there is one."""
        bases = [self.sections.base_model, *(piece.base for piece in self.slices)]
        entries = [entry.model for piece in self.slices for entry in piece.entries]
        return list(dict.fromkeys([*filter(None, bases), *entries]))

    @property
    def expert_labels(self) -> list[str]:
        """The model of each expert, then of each shared one; an adapter's is the base with it."""
        base, sections = self.labels[0], self.sections
        experts = [e.source_model or f"{base}+{e.adapter}" for e in sections.experts or ()]
        return [*experts, *(shared.source_model for shared in sections.shared_experts or ())]

    @property
    def mixes(self) -> bool:
        """Whether the result is a mixture."""
        return bool(self.sections.experts or self.sections.mixture)

    @property
    def mixture(self) -> dict[str, Any]:
        """What the recipe says about experts, as JSON can tell it, models by their labels."""
        return self.sections.model_dump(
            mode="json", include={*OF_MIXTURES, "experts", "mixture", "drop"}, exclude_unset=True
        )

    @property
    def outside_source(self) -> str | None:
        """A model that is not merged, whose vocabulary the result gets."""
        tokens = self.sections.tokens
        if tokens.source in ("base", "union") or tokens.model(self.labels):
            return None
        return tokens.source.removeprefix("model:")

    @property
    def out_dtype(self) -> str | None:
        name = self.sections.out_dtype or self.sections.dtype
        return OUT_DTYPES[name] if name else None

    @property
    def file(self) -> str:
        return self.lines.file

    def where_model(self, label: str) -> str:
        """File and line in which a model is named first."""
        if label == self.sections.base_model:
            return self.where("base_model")
        if label == self.outside_source:
            return self.where("tokenizer" if self.sections.tokenizer else "tokenizer_source")
        for i, expert in enumerate(self.expert_labels):
            if label == expert and label not in self.labels:
                listed = len(self.sections.experts or ())
                place = ("experts", i) if i < listed else ("shared_experts", i - listed)
                return self.where(*place)
        for piece in self.slices:
            if label == piece.base:
                return self.where(*piece.place, "base_model")
            for entry in piece.entries:
                if label == entry.model:
                    return self.where(*entry.place, "model")
        return self.where()

    def where(self, *path: str | int) -> str:
        return self.lines.at(*path)


def load_recipe(file: Path | str) -> Recipe:
    """The recipe in `file`; raises RecipeError `file:line: what, found, allowed`."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: cannot be read as text ({error.reason})") from None
    return parse_recipe(text, str(file))


def parse_recipe(text: str, file: str = "recipe") -> Recipe:
    """As load_recipe, from text. Of several documents, the one without a name is the recipe (else the
    last); it merges the results of the others, by their names or outputs."""
    recipes = [
        _recipe(read_sections(data, lines), lines) for data, lines in load_documents(text, file)
    ]
    unnamed = [recipe for recipe in recipes if recipe.sections.name is None]
    if len(recipes) > 1 and len(unnamed) > 1 and any(r.sections.name for r in recipes):
        what = "a second document without name; only the final merge may have none"
        raise unnamed[1].lines.error((), what)
    final = unnamed[0] if len(unnamed) == 1 else recipes[-1]
    return _staged(final, recipes)


def _staged(final: Recipe, recipes: Sequence[Recipe]) -> Recipe:
    """`final` with the recipes that it needs; raises RecipeError where they go in circles or to waste."""
    named: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe is final:
            continue
        for name in dict.fromkeys(filter(None, (recipe.sections.name, recipe.sections.output))):
            if name in named:
                raise recipe.lines.error(("name",), f"two documents are called {name!r}")
            named[name] = recipe
    stages: dict[str, Recipe] = {}
    _gather(final, named, stages, ())
    for stage in stages.values():
        _check_stage(stage)
    used = list(stages.values())
    for recipe in recipes:
        if recipe is not final and recipe not in used:
            what = "no other document merges its result; name it in one, or put it in a file of its own"
            raise recipe.lines.error(("name",), what)
    return Recipe(final.sections, final.method, final.parts, final.lines, stages)


def _check_stage(stage: Recipe) -> None:
    """Raises RecipeError where a merge that is merged again says what only the last one can."""
    for key in OF_THE_LAST:
        if key in stage.sections.model_fields_set:
            what = f"{key} is of no effect in a merge that is merged again; give it in the last document"
            raise stage.lines.error((key,), what)


def _gather(
    recipe: Recipe, named: Mapping[str, Recipe], stages: dict[str, Recipe], within: tuple[str, ...]
) -> None:
    for label in [*recipe.labels, *recipe.expert_labels]:
        if label in within:
            raise recipe.lines.error((), f"{label!r} is merged from itself ({' <- '.join(within)})")
        if label in named and label not in stages:
            _gather(named[label], named, stages, (*within, label))
            stages[label] = named[label]


# -- one document ----------------------------------------------------------------------------------


def _recipe(sections: Sections, lines: Lines) -> Recipe:
    method = _method(sections.merge_method, lines)
    reader = _Reader(sections, method, lines)
    return Recipe(sections, method, tuple(reader.parts()), lines)


def _method(name: str, lines: Lines) -> Method:
    methods = all_methods()
    if name not in methods:
        found = f"no merge_method {name!r}{nearest(name, list(methods))}"
        raise lines.error(("merge_method",), f"{found}; there are {', '.join(methods)}")
    return methods[name]


class _Reader:
    """Turns the sections of a document into parts, their settings resolved.

    A value is sought in the model's entry, then in the slice's parameters, the module's, the recipe's.
    """

    def __init__(self, sections: Sections, method: Method, lines: Lines) -> None:
        self._sections, self._method, self._lines = sections, method, lines
        self._read = SettingsReader(lines, method).read
        presets = method.mergekit if sections.compat == "mergekit" else {}
        self._resolution = Resolution(method, lines, presets)

    def parts(self) -> Iterator[Part]:
        common = self._read(self._sections.parameters, ("parameters",))
        if self._sections.modules is None:
            yield Part(None, tuple(self._slices(self._sections, (), [common])))
        for name, module in (self._sections.modules or {}).items():
            place: Place = ("modules", name)
            own = self._read(module.parameters, (*place, "parameters"))
            yield Part(name, tuple(self._slices(module, place, [own, common])))

    def _slices(
        self, part: Sections | ModuleEntry, place: Place, outer: Sequence[Settings]
    ) -> Iterator[Slice]:
        if part.models:
            yield self._slice(part.models, None, (*place, "models"), place, outer)
        for i, entry in enumerate(part.slices or ()):
            here = (*place, "slices", i)
            self._check_lengths(entry, here)
            own = self._read(entry.parameters, (*here, "parameters"))
            sources = (*here, "sources")
            yield self._slice(entry.sources, entry.base_model, sources, here, [own, *outer])

    def _slice(
        self,
        entries: Sequence[ModelEntry | SourceEntry],
        own_base: str | None,
        at: Place,
        place: Place,
        outer: Sequence[Settings],
    ) -> Slice:
        base = own_base or self._sections.base_model
        on_a_base = _on_a_base(self._method, base)
        self._check_models(entries, base, at)
        own = [self._read(e.parameters, (*at, i, "parameters")) for i, e in enumerate(entries)]
        read = tuple(
            Entry(
                entry.model,
                entry.layer_range if isinstance(entry, SourceEntry) else None,
                {}  # the base itself has no task vector
                if on_a_base and entry.model == base
                else self._resolution.of_model([own[i], *outer], (*at, i)),
                (*at, i),
            )
            for i, entry in enumerate(entries)
        )
        shared = self._resolution.shared(own, outer, at)
        return Slice(base, read, shared, on_a_base, place)

    def _check_lengths(self, entry: SliceEntry, place: Place) -> None:
        lengths = [source.layer_range[1] - source.layer_range[0] for source in entry.sources]
        for i, length in enumerate(lengths):
            if length != lengths[0]:
                what = f"this source has {length} layers, the first has {lengths[0]}"
                at = (*place, "sources", i, "layer_range")
                raise self._lines.error(
                    at, f"{what}; layers that are merged with one another are as many"
                )

    def _check_models(
        self, entries: Sequence[ModelEntry | SourceEntry], base: str | None, at: Place
    ) -> None:
        """Raises RecipeError unless base and number of models suit the method."""
        names, method = [entry.model for entry in entries], self._method
        if method.base in ("required", "first") and base is None:
            what = f"{method.name} needs base_model, the model that the others were made from"
            raise self._lines.error(("merge_method",), what)
        others = [name for name in names if name != base]
        if _on_a_base(method, base) and not others:
            what = f"{method.name} has no model beside its base; list at least one other"
            raise self._lines.error(at, what)
        apart = base is not None and method.base != "donor"
        counted = len(others) + (method.base == "first") if apart else len(names)
        low, high = method.models
        if not low <= counted <= high:
            wanted = f"{low}" if low == high else f"{low} to {high}"
            with_base = " (its base included)" if method.base == "first" else ""
            what = f"{method.name} takes {wanted} models{with_base}, not {counted}"
            raise self._lines.error(at, what)
        for i, name in enumerate(names):
            if names.index(name) != i and method.base != "donor":
                what = f"model {name!r} is listed twice; give it one entry with the summed weight"
                raise self._lines.error((*at, i), what)


def _on_a_base(method: Method, base: str | None) -> bool:
    return method.base == "required" or (method.base == "optional" and base is not None)
