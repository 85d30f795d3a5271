"""Dense models, or adapters merged into their base, as the experts of a stock mixture of transformers."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

from merge.anatomy import natural_order
from merge.errors import PlanError
from merge.experts.altered import (
    Beside,
    Columns,
    Making,
    Noisy,
    Redrawn,
    Rows,
    Scaled,
    Stacked,
    Stretch,
    Zeros,
)
from merge.experts.assembling import Ground, computing, copied, scaled
from merge.experts.assembly import Assembled, Expert, Site
from merge.experts.sections import FROM_PROMPTS
from merge.experts.stock.families import (
    JOINED,
    PARTS,
    Counts,
    idle_width,
    mixture_config,
    rope_kind,
    setting,
)
from merge.experts.stock.layout import Layout, layout_of
from merge.numerics import random_key
from merge.plan import Operand, Step
from merge.sources import Source, TensorInfo
from merge.sources.model import Model
from merge.tokens.vocabularies import Vocabularies
from merge.tokens.vocabulary import TOKENIZER


def moe(ground: Ground) -> Assembled:
    """The base of `ground` with its experts in the place of its MLPs, as a stock class of transformers reads
    it: everything else is the base's. Raises PlanError for what that class cannot express."""
    return _Assembly(ground, layout_of(ground)).assembled()


def experts_alone(ground: Ground, layout: Layout) -> Assembled:
    """Of what moe gives the steps of experts and routers alone, and no config."""
    return _Assembly(ground, layout).alone()


@dataclass
class _Assembly:
    """Makes the steps of a mixture. Its pseudo-models: routers, the gates of shared experts that prompts
    teach, and what else is computed."""

    ground: Ground
    layout: Layout
    making: Making = field(default_factory=Making)
    vocabularies: Vocabularies = field(default_factory=Vocabularies)

    def assembled(self) -> Assembled:
        steps = [*self._kept()]
        for layer in self.layout.sparse:
            steps += [*self._experts(layer), *self._shared(layer), *self._router(layer)]
        steps.sort(key=lambda step: natural_order(step.name))
        config = mixture_config(self.ground.plan.config, self.layout.mixture, self.counts)
        models = tuple(computing(name, self.ground, source) for name, source in self._computed())
        notes, texts = tuple(self._notes()), self.ground.texts
        return Assembled(tuple(steps), config, models, notes=notes, texts=texts)

    def alone(self) -> Assembled:
        steps: list[Step] = []
        for layer in self.layout.sparse:
            steps += [*self._experts(layer), *self._router(layer)]
        models = tuple(computing(name, self.ground, source) for name, source in self._computed())
        return Assembled(tuple(steps), {}, models, notes=tuple(self._about_experts()))

    @cached_property
    def counts(self) -> Counts:
        ground, mixture = self.ground, self.layout.mixture
        asked = ground.routing.normalise
        return Counts(
            experts=len(ground.experts),
            top_k=ground.routing.top_k,
            normalise=asked if asked in mixture.normalises else mixture.normalises[0],
            width=self.layout.width,
            dense=self.layout.dense,
            shared=len(ground.shared),
        )

    def _computed(self) -> Iterator[tuple[str, Source]]:
        yield "routers", self.routers
        if self.taught_gates:
            yield "gates of shared experts", self.taught_gates
        if self.making.tensors:
            yield "parts of experts", self.making.source()

    # -- of the base -------------------------------------------------------------------------------

    def _kept(self) -> Iterator[Step]:
        """Everything but the MLPs that experts replace; tensors that hold several are parted."""
        layout, replaced = self.layout, self.layout.replaced
        places = {name: (i, tail) for i, of in layout.tails.items() for tail, name in of.items()}
        for step in self.ground.plan.steps:
            layer, tail = places.get(step.name, (0, ""))
            parts = JOINED.get(tail.removesuffix(".weight"), ())
            if parts and step.name not in replaced:
                names = [layout.name(layer, f"{part}.weight") for part in parts]
                yield from self._parted(step, names)
            elif step.name not in replaced:
                yield step

    def _parted(self, step: Step, names: Sequence[str]) -> Iterator[Step]:
        start = 0
        for name, size in zip(names, self._sizes(step, len(names)), strict=True):
            operand = self._stretch(step.operands[0], start, start + size)
            yield replace(step, name=name, shape=operand.info.shape, operands=(operand,))
            start += size

    def _sizes(self, step: Step, count: int) -> list[int]:
        """Rows of the parts of a tensor: two halves, or queries, keys and values."""
        if count == 2:
            return [step.shape[0] // 2] * 2
        config = self.ground.plan.config
        head = setting(config, "head_dim")
        heads = [config["num_attention_heads"], *[setting(config, "num_key_value_heads")] * 2]
        if step.shape[0] != head * sum(heads):
            raise PlanError(
                f"{self.ground.base.label}: tensor {step.name!r} has {step.shape[0]} rows, but config.json "
                f"tells of {sum(heads)} heads of {head}"
            )
        return [head * number for number in heads]

    # -- experts -----------------------------------------------------------------------------------

    def _experts(self, layer: int) -> Iterator[Step]:
        for i, expert in enumerate(self.ground.experts):
            for part in PARTS:
                name = self.layout.name(layer, self.layout.mixture.expert(i, part))
                yield self._projection(name, expert, layer, part)

    def _projection(
        self, name: str, expert: Expert, layer: int, part: str, times: float = 1.0
    ) -> Step:
        """A projection of an expert as the tensor `name`: drawn anew in part, with noise, and scaled, as its
        entry wants it, in this order (mergekit's); `times` is one more scale of an MLP's output."""
        operand, residual = self._operand(expert, layer, part), expert.entry.residual_scale
        if expert.entry.noise_scale or expert.entry.reinitialise:
            rows = self._altered(name, expert, layer, part)
            operand = self._made(f"{name} of {expert.model.public_name}", rows)
        scale = times * (1.0 if residual is None else residual)
        if part == "down" and scale != 1.0:
            return scaled(name, operand, self._dtype(layer), scale)
        return copied(name, operand, self._dtype(layer))

    def _operand(self, expert: Expert, layer: int, part: str) -> Operand:
        """A projection of an expert as it is stored."""
        tails = self.layout.tails[layer]
        if part == "down" or not self.layout.is_joined(layer):
            return self.ground.operand(expert, tails[f"mlp.{part}_proj.weight"])
        whole = self.ground.operand(expert, tails["mlp.gate_up_proj.weight"])
        first = self.layout.width if part == "up" else 0
        return self._stretch(whole, first, first + self.layout.width)

    def _altered(self, name: str, expert: Expert, layer: int, part: str) -> Rows:
        """An expert's projection before it is scaled; `name` stands for its random numbers."""
        rows: Rows = self._rows(self._operand(expert, layer, part))
        entry, seed = expert.entry, self.ground.routing.seed
        if entry.reinitialise:
            mlp = name.removesuffix(".weight").rpartition(".")[0]  # one choice for all of it
            columns = Columns(
                random_key(seed, "columns", mlp), self.layout.width, entry.reinitialise
            )
            axis = 1 if part == "down" else 0
            rows = Redrawn(rows, columns, axis, random_key(seed, "values", name))
        if entry.noise_scale:
            rows = Noisy(rows, entry.noise_scale, random_key(seed, "noise", name))
        return rows

    # -- shared experts ----------------------------------------------------------------------------

    def _shared(self, layer: int) -> Iterator[Step]:
        mixture, shared = self.layout.mixture, self.ground.shared
        if not mixture.shared:
            return
        if mixture.gated:
            yield self._shared_gate(layer)
        for part in PARTS:
            name = self.layout.name(layer, mixture.shared_expert(part))
            if not shared:
                yield self._idle(name, layer, part)
            elif len(shared) == 1:
                yield self._projection(name, shared[0], layer, part, self._times)
            else:
                yield self._together(name, layer, part)

    @property
    def _times(self) -> float:
        """A gate of zeros halves what the shared expert says: made up for in its weights."""
        return 2.0 if self.layout.mixture.gated and not self.taught_gates else 1.0

    def _together(self, name: str, layer: int, part: str) -> Step:
        """Several shared experts are one as wide as all, whose output is their sum."""
        parts: list[Rows] = []
        for i, expert in enumerate(self.ground.shared):
            rows, scale = (
                self._altered(f"{i}.{name}", expert, layer, part),
                expert.entry.residual_scale,
            )
            parts.append(rows if part != "down" or scale is None else Scaled(rows, scale))
        joined: Rows = Beside(parts) if part == "down" else Stacked(parts)
        return copied(name, self._made(f"{name} of all", joined), self._dtype(layer))

    def _shared_gate(self, layer: int) -> Step:
        name, dtype = self.layout.name(layer, self.layout.mixture.shared_gate), self._dtype(layer)
        if self.taught_gates is None:
            return copied(name, self._zeros(name, (1, self.layout.hidden), dtype), dtype)
        info = self.taught_gates.tensors[name]
        return copied(name, Operand(self.ground.next_index + 1, name, info), dtype)

    def _idle(self, name: str, layer: int, part: str) -> Step:
        """Of a shared expert that adds nothing, where the class demands one."""
        width, hidden, dtype = (
            idle_width(self.layout.mixture, self.counts),
            self.layout.hidden,
            self._dtype(layer),
        )
        shape = (hidden, width) if part == "down" else (width, hidden)
        return copied(name, self._zeros(name, shape, dtype), dtype)

    # -- routers -----------------------------------------------------------------------------------

    def _router(self, layer: int) -> Iterator[Step]:
        mixture = self.layout.mixture
        name = self.layout.name(layer, mixture.router)
        operand = Operand(self.ground.next_index, name, self.routers.tensors[name])
        yield copied(name, operand, self._dtype(layer))
        if mixture.sigmoid:
            name = self.layout.name(layer, mixture.bias)
            yield copied(name, self._zeros(name, (len(self.ground.experts),), "F32"), "F32")

    @cached_property
    def routers(self) -> Source:
        return self._router_source(self.ground, self.layout.mixture.router)

    @cached_property
    def taught_gates(self) -> Source | None:
        """Gates of the shared expert, where its prompts say what it is for (mergekit's way)."""
        ground = copy(self.ground)
        ground.experts = self.ground.shared
        gated = self.layout.mixture.gated and self.ground.routing.mode in FROM_PROMPTS
        if not (gated and ground.experts and ground.experts[0].entry.positive_prompts):
            return None
        return self._router_source(ground, self.layout.mixture.shared_gate)

    def _router_source(self, ground: Ground, tail: str) -> Source:
        from merge.experts.routers.rows import router_source

        layout = self.layout
        sites = [
            Site(layout.name(i, tail), layout.name(i, "mlp"), layout.hidden) for i in layout.sparse
        ]
        return router_source(ground, sites, {})

    # -- operands ----------------------------------------------------------------------------------

    def _dtype(self, layer: int) -> str:
        """Of everything that is new in a layer: that of the base's MLP."""
        return self.ground.steps[self.layout.tails[layer]["mlp.down_proj.weight"]].dtype

    def _stretch(self, operand: Operand, first: int, end: int) -> Operand:
        """Rows [first, end) of a tensor of a model."""
        rows = replace(self._rows(operand), first=first, end=end)
        name = self.ground.plan.models[operand.model].public_name
        return self._made(f"{operand.tensor}[{first}:{end}] of {name} ({operand.model})", rows)

    def _rows(self, operand: Operand) -> Stretch:
        """What an operand reads, of a model or a part of one."""
        if operand.model >= self.ground.next_index:
            part = self.making.tensors[operand.tensor]
            assert isinstance(part, Stretch)
            return part
        model = self.ground.plan.models[operand.model]
        if operand.step is not None:
            raise PlanError(
                f"{model.label}: is a merge of the same file, of whose tensors no part can be taken or "
                "altered; write it to a folder first"
            )
        return Stretch.whole(model.source, operand.tensor)

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: str) -> Operand:
        return self._made(f"{name} of zeros", Zeros(TensorInfo(dtype, shape)))

    def _made(self, name: str, rows: Rows) -> Operand:
        """What is computed here is of the last pseudo-model."""
        index = self.ground.next_index + 1 + (self.taught_gates is not None)
        return Operand(index, name, self.making.add(name, rows))

    # -- notes -------------------------------------------------------------------------------------

    def _notes(self) -> Iterator[str]:
        mixture, config = self.layout.mixture, self.ground.plan.config
        yield from self._about_experts()
        if mixture.sigmoid:
            yield (
                f"{mixture.model_type} weighs experts by sigmoids of their scores that are made to add up to "
                "1, where others take softmax"
            )
        if config["model_type"] == "phi3" and rope_kind(config) == "longrope":
            yield (
                f"{mixture.model_type} keeps its cache where phi3 begins a new one, as a text grows beyond "
                f"{setting(config, 'original_max_position_embeddings')} tokens while it is generated"
            )
        if mixture.shared and not mixture.gated and not self.ground.shared:
            yield f"{mixture.model_type} has a shared expert; one of zeros is written"

    def _about_experts(self) -> Iterator[str]:
        yield from self.ground.notes
        for expert in (*self.ground.experts, *self.ground.shared):
            yield from self._other_tokens(expert.model)
            yield from self._lost(expert)

    def _other_tokens(self, model: Model) -> Iterator[str]:
        base = self.ground.base
        sizes = [of.config.get("vocab_size") for of in (base, model)]
        if sizes[0] != sizes[1]:
            yield f"{model.label}: vocab_size is {sizes[1]} in config.json, but {sizes[0]} in {base.label}"
        elif not self._spells_alike(model):
            yield (
                f"{model.label}: its {TOKENIZER} spells another vocabulary than that of {base.label}, whose "
                "tokens the result has"
            )

    def _spells_alike(self, model: Model) -> bool:
        """Whether a model's tokenizer.json spells the base's vocabulary, or one of them is missing."""
        spelt = {self.vocabularies.spelling(each) for each in (self.ground.base, model)}
        return len(spelt) == 1 or "" in spelt

    def _lost(self, expert: Expert) -> Iterator[str]:
        """What an adapter that is named among models changes beside MLPs."""
        if expert.adapter is not None or not expert.model.adapters:
            return
        tensors = expert.model.source.tensors
        names = [name for name, info in tensors.items() if info.stored and ".mlp." not in name]
        if names:
            yield (
                f"{expert.model.label}: its adapter changes {min(names, key=natural_order)!r} too, which "
                "stays the base's: of an expert only the MLPs are taken"
            )
