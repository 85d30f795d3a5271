"""LoRA adapters of one base -> a checkpoint in which routers choose among them for every token.

Of a linear layer X that adapters change, the files hold the base's X.base_layer.weight as it is, the factors
of all adapters side by side (X.lora_A, X.lora_B; X.dora where some are DoRA), and S.router.weight of the site
S whose input tells the shares. config.json names them under `mixture`; the modelling file puts them to work.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from merge.anatomy import layer_of, main_stack, vocabulary_tensors
from merge.errors import PlanError
from merge.experts.assembling import Ground, computing, copied
from merge.experts.assembly import Assembled, Expert, Factors, Site
from merge.experts.lora.classes import Classes, asked_classes
from merge.experts.lora.factors import Layer, Update, source_of, stacked
from merge.experts.lora.modelling import (
    FILE,
    modelling_file,
    told_classes,
    with_older_keys,
    with_tokenizer,
)
from merge.experts.routers.rows import router_source
from merge.plan import Operand, Step
from merge.sources import Source
from merge.sources.adapter import opened_adapter
from merge.sources.lora import Change, lost_head
from merge.tokens.vocabulary import SETTINGS

OF_DENSE = ("shared_experts", "architecture", "layers")
ENTRIES_OF_DENSE = ("noise_scale", "residual_scale", "reinitialise")
# what reads the input of a layer (after a norm), as the field's models call it
FROM_INPUT = frozenset(
    (
        *(
            "q_proj",
            "k_proj",
            "v_proj",
            "qkv_proj",
            "query",
            "key",
            "value",
            "query_key_value",
            "c_attn",
        ),
        *("q_lin", "k_lin", "v_lin", "W_pack", "Wqkv", "qkv", "q", "k", "v"),
        *("q_a_proj", "kv_a_proj_with_mqa"),
    )
)


def routed(ground: Ground) -> Assembled:
    """The mixture of the adapters of `ground`; raises PlanError, SourceError for adapters of another base."""
    _check_keys(ground)
    mixing = _Mixing(ground, asked_classes(ground.base))
    factors = source_of(list(mixing.layers.values()))
    routers = router_source(ground, list(mixing.sites.values()), mixing.adapted)
    models = (computing("adapters", ground, factors), computing("routers", ground, routers))
    kind = str(ground.base.config.get("model_type"))
    return Assembled(
        tuple(mixing.steps(factors, routers)),
        with_older_keys(ground.plan.config) | told_classes(mixing.classes, kind) | mixing.told,
        models,
        {FILE: modelling_file(mixing.classes, kind)} | _tokenizer_files(ground, mixing.classes),
        (*(note for expert in ground.experts for note in expert.model.notes), *mixing.notes),
        ground.texts,
    )


def _tokenizer_files(ground: Ground, classes: Classes) -> dict[str, bytes]:
    """tokenizer_config.json, where it must say more than the base's to be read alike."""
    tokens = ground.plan.tokens
    edited = tokens.files.get(SETTINGS) if tokens else None
    file = edited or ground.base.folder / SETTINGS
    found = file if isinstance(file, bytes) else file.read_bytes() if file.is_file() else b"{}"
    try:
        changed = with_tokenizer(found, classes.tokenizer) if classes.tokenizer else found
    except (ValueError, AttributeError, RecursionError):
        raise PlanError(
            f"{ground.base.folder / SETTINGS}: is no table as JSON; repair it"
        ) from None
    return {} if changed == found else {SETTINGS: changed}


def _check_keys(ground: Ground) -> None:
    """Raises PlanError for what a recipe can only say about dense experts, or not about this base."""
    sections, recipe = ground.sections, ground.recipe
    for key in OF_DENSE:
        if getattr(sections, key):
            raise PlanError(
                f"{recipe.where(key)}: {key} is of the dense format; adapters are routed where they change "
                "the base"
            )
    for expert in ground.experts:
        for key in ENTRIES_OF_DENSE:
            if getattr(expert.entry, key) is not None:
                raise PlanError(f"{expert.place}: {key} is of the dense format; leave it out")
    crossed = any(ground.base.config.get(k) for k in ("is_encoder_decoder", "add_cross_attention"))
    if crossed and ground.routing.per != "module":
        raise PlanError(
            f"{ground.routing.where}: router.per is {ground.routing.per}; {ground.base.label} attends to "
            "another text, whose tokens are not those of its layers: it must be module"
        )


@dataclass(frozen=True)
class _Adapter:
    """An opened adapter: what it adds to linear layers, by the base's tensor, and what else it changes:
    tensor -> how, in words."""

    expert: Expert
    updates: Mapping[str, Update]
    beyond: Mapping[str, str]


class _Mixing:
    """What becomes of each tensor of the base."""

    def __init__(self, ground: Ground, classes: Classes) -> None:
        self.ground, self.classes, self.routing = ground, classes, ground.routing
        self._check_names()
        self.adapters = [self._opened(expert) for expert in ground.experts]
        self.notes: list[str] = []
        self.kept = self._kept()
        self.layers = self._layers()
        self.sites = self._sites()

    # -- what adapters change ----------------------------------------------------------------------

    def _check_names(self) -> None:
        """Raises PlanError where transformers gives tensors other names as it loads them: it does so for
        models that it knows, and a mixture is none."""
        for names in self.classes.parameters:
            if not any(
                n in self.ground.steps for name in names for n in self.classes.in_memory(name)
            ):
                raise PlanError(
                    f"{self.ground.base.label}: transformers makes {names[0]!r} of {self.classes.model} from "
                    "tensors of other names, and would not in a routed mixture; adapters of such a base "
                    "cannot be routed"
                )

    def _opened(self, expert: Expert) -> _Adapter:
        assert expert.adapter is not None
        base, headless = self.ground.base, self.ground.sections.saved_modules == "base"
        _, source, found = opened_adapter(base, expert.adapter, headless=headless)
        lost = sorted(lost_head(source.tensors, base.source.tensors)) if headless else []
        updates, beyond = {}, {name: f"has {name!r}" for name in lost}
        for name, change in found.items():
            self._check_grown(expert, source, name, change)
            plain = change.product and change == Change(product=change.product)
            if plain and change.product and self._linear(name):
                updates[name] = Update(source, change.product)
            else:
                beyond[name] = _words(name, change)
        if not updates:
            raise PlanError(
                f"{expert.place}: {expert.name} changes no linear layer, so that nothing is routed"
            )
        return _Adapter(expert, updates, beyond)

    def _check_grown(self, expert: Expert, source: Source, name: str, change: Change) -> None:
        rows = self.ground.base.source.tensors[name].rows
        if change.whole and source.tensors[change.whole].rows > rows:
            raise PlanError(
                f"{expert.place}: {expert.name} has {source.tensors[change.whole].rows} rows of {name!r}, "
                f"{self.ground.base.label} has {rows}; experts share one vocabulary: give a base that has "
                "its tokens"
            )

    def _linear(self, name: str) -> str | None:
        """The module in memory that a weight belongs to, if it is a linear layer."""
        module, _, leaf = name.rpartition(".")
        found = (n for n in self.classes.in_memory(module) if n in self.classes.linear)
        return next(found, None) if leaf == "weight" else None

    def _kept(self) -> dict[str, Expert]:
        """The tensors that the result takes from one expert as a whole, as saved_modules says; raises
        PlanError where adapters change such tensors and it does not say what to do."""
        wanted, names = self.ground.sections.saved_modules, [a.expert.name for a in self.adapters]
        where = self.ground.recipe.where("saved_modules")
        if wanted not in (None, "base", *names):
            raise PlanError(
                f"{where}: saved_modules is {wanted!r}; it must be base or an expert: {', '.join(names)}"
            )
        for adapter in self.adapters:
            if adapter.beyond and wanted is None:
                how = next(iter(adapter.beyond.values()))
                raise PlanError(
                    f"{adapter.expert.place}: {adapter.expert.name} {how}, and routers mix linear layers "
                    "alone; give saved_modules: base to leave that out, or the name of the expert whose are "
                    "taken"
                )
            if adapter.beyond:
                self.notes.append(_beyond_note(adapter, taken=adapter.expert.name == wanted))
        named = [a for a in self.adapters if a.expert.name == wanted != "base"]
        kept = {name: adapter.expert for adapter in named for name in adapter.beyond}
        self._check_tokens(kept, where)
        return kept

    def _check_tokens(self, kept: Mapping[str, Expert], where: str) -> None:
        tensors = self.ground.base.source.tensors.items()
        rows = vocabulary_tensors(self.ground.base.config, {n: info.shape for n, info in tensors})
        both = [name for name in kept if name in rows]
        if both and self.ground.plan.tokens:
            raise PlanError(
                f"{where}: {both[0]!r} comes from an expert, and the recipe changes its rows; keep one"
            )

    def _layers(self) -> dict[str, Layer]:
        """By the name that files give the module; in the order of the base."""
        found: dict[str, dict[int, Update]] = {}
        for number, adapter in enumerate(self.adapters):
            for name, update in adapter.updates.items():
                found.setdefault(name, {})[number] = update
        base, count = self.ground.base, len(self.adapters)
        for name in found:
            step = self.ground.steps.get(name)
            if step is None or step.shape != base.source.tensors[name].shape:
                raise PlanError(
                    f"{base.label}: adapters change {name!r}, and the recipe changes its rows or leaves it "
                    "out; keep one"
                )
        return {
            (module := name.removesuffix(".weight")): Layer(
                module, name, base.source, found[name], count
            )
            for name in self.ground.steps
            if name in found
        }

    # -- routers -----------------------------------------------------------------------------------

    @cached_property
    def site_names(self) -> dict[str, str]:
        """Layer -> the module whose input its router sees: itself, or the block of the model that it is in,
        or the first block. What is outside the blocks has a router of its own."""
        stack = main_stack(self.ground.steps, self.ground.base.config)
        found = {}
        for name in self.layers:
            within = layer_of(name)
            apart = self.routing.per == "module" or within is None or within[0] != stack
            number = within[1] if within and self.routing.per == "layer" else 0
            found[name] = name if apart else f"{stack}.{number}"
        return found

    def _sites(self) -> dict[str, Site]:
        found = {}
        for layer, name in self.site_names.items():
            cols = self.layers[layer].size[1] if layer == name else self.classes.width
            if not cols:
                raise PlanError(
                    f"{self.routing.where}: router.per is {self.routing.per}, and config.json of "
                    f"{self.ground.base.label} has no hidden_size; it must be module"
                )
            found[name] = Site(f"{name}.router.weight", self.classes.module(name), cols)
        return found

    @property
    def adapted(self) -> dict[str, dict[int, Factors]]:
        """Router -> expert -> what that adds to what the router's module reads."""
        return {site.tensor: self._adapted(name) for name, site in self.sites.items()}

    def _adapted(self, site: str) -> dict[int, Factors]:
        layers = [self.layers[layer] for layer, name in self.site_names.items() if name == site]
        if layers[0].name != site:
            layers = self._reading([layer for layer in layers if layer.name.startswith(f"{site}.")])
        found: dict[int, list[Factors]] = {}
        for layer in layers:
            for number, update in layer.updates.items():
                found.setdefault(number, []).append(update.factors())
        return {number: stacked(factors) for number, factors in found.items()}

    def _reading(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those that read what comes into a block (after a norm): queries, keys and values, else all that
        are as wide."""
        first = [layer for layer in layers if layer.name.rpartition(".")[2] in FROM_INPUT]
        return first or [layer for layer in layers if layer.size[1] == self.classes.width]

    # -- the result --------------------------------------------------------------------------------

    def steps(self, factors: Source, routers: Source) -> Iterator[Step]:
        """Those of the base under their new names, each layer's experts behind its weight."""
        numbers = self.ground.next_index, self.ground.next_index + 1
        done: set[str] = set()
        for name, step in self.ground.steps.items():
            module, _, leaf = name.rpartition(".")
            layer = self.layers.get(module)
            placed = f"{module}.base_layer.{leaf}" if layer else name
            if expert := self.kept.get(name):
                yield copied(placed, self.ground.operand(expert, name), step.dtype)
            else:
                yield replace(step, name=placed)
            if layer and name == layer.weight:
                yield from _computed(factors, layer.tensors(), numbers[0], step.dtype)
                site = self.sites[self.site_names[module]]
                if site.tensor not in done:
                    yield from self._router(site, routers, numbers[1])
                done.add(site.tensor)

    def _router(self, site: Site, routers: Source, number: int) -> Iterator[Step]:
        info = routers.tensors[site.tensor]
        yield copied(site.tensor, Operand(number, site.tensor, info), "F32")
        if self.routing.weights:
            bias = site.tensor.removesuffix("weight") + "bias"
            operand = Operand(number, bias, routers.tensors[bias])
            yield copied(bias, operand, "F32", (len(self.adapters),))

    @property
    def told(self) -> dict[str, Any]:
        """What config.json says of the mixture."""
        routing = self.routing
        modules = {
            name: {"ranks": layer.ranks, "dora": layer.stretches}
            for name, layer in self.layers.items()
        }
        return {
            "mixture": {
                "experts": [adapter.expert.name for adapter in self.adapters],
                "top_k": routing.top_k,
                "temperature": routing.temperature,
                "normalise": routing.normalise,
                "absolute": routing.absolute,
                "per": routing.per,
                "bias": routing.weights is not None,
                "modules": modules,
                "sites": self.site_names,
            }
        }


def _computed(source: Source, names: Mapping[str, Any], number: int, dtype: str) -> Iterator[Step]:
    """Steps that write the factors of a layer as `dtype`, and how DoRA stretches it as float32."""
    for name in names:
        wanted = "F32" if name.endswith(".dora") else dtype
        yield copied(name, Operand(number, name, source.tensors[name]), wanted)


def _words(name: str, change: Change) -> str:
    """What an adapter does to a tensor beside adding a product to a linear layer."""
    if change.whole:
        return f"replaces {name!r}"
    if change.rows:
        return f"trains rows of tokens in {name!r}"
    if change.added:
        return f"trains the bias {name!r} (lora_bias)"
    return f"adapts {name!r}, which is no linear layer"


def _beyond_note(adapter: _Adapter, *, taken: bool) -> str:
    some = ", ".join(list(adapter.beyond)[:3])
    more = f" and {len(adapter.beyond) - 3} others" if len(adapter.beyond) > 3 else ""
    what = "of all experts" if taken else "left out of the mixture"
    return f"{adapter.expert.name}: what it trained of {some}{more} is {what}"
