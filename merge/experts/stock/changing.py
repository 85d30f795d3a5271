"""A stock mixture with other experts: some dropped, models added, those of the kept ones only renumbered.

Models are added as they are in a new mixture, on a dense model that stands for this one: all of it but for
its MLPs, which are those of its first expert.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from merge.anatomy import layer_tensors, main_stack, natural_order
from merge.errors import PlanError
from merge.experts.altered import Making, Middle, Rows, Stacked, Stretch
from merge.experts.assembling import Ground, copied
from merge.experts.assembly import Assembled, Routing
from merge.experts.names import expert_names, told_mode
from merge.experts.roster import (
    Roster,
    added_routing,
    equal_scores,
    idle_keys,
    roster_of,
    top_k_of,
    train_again,
)
from merge.experts.routing import check_examples
from merge.experts.sections import RouterSection
from merge.experts.stock.families import ARCHITECTURES, PARTS, StockClass
from merge.experts.stock.layout import Layout
from merge.experts.stock.moe import experts_alone
from merge.plan import Operand, Plan, Step
from merge.sources import Source
from merge.sources.model import Model

NAME = "changed routers"
EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<number>[0-9]+)\.(?P<rest>.+)")
GATE = re.compile(r"(?P<block>.+)\.(gate|router)\.(weight|bias|e_score_correction_bias)")
CORRECTION = "e_score_correction_bias"  # of mixtures that need two experts to choose from
FUSED = re.compile(r".+\.experts\.[a-z_]*proj[a-z_]*(\.weight)?")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
TOP_K, GROUPS, NORMALISE = "num_experts_per_tok", "n_group", "norm_topk_prob"
GATE_PROJ, UP, JOINED_PROJ = (f".mlp.{part}_proj.weight" for part in ("gate", "up", "gate_up"))
MIXTURES = {m.model_type: m for of in ARCHITECTURES.values() for m in of.values()}
DENSE = {"mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}  # what their rest is


def changed_stock(
    plan: Plan, index: Mapping[str, int], made: Mapping[int, Mapping[str, Step]]
) -> Assembled:
    """As changing.changed, of a stock mixture with tensors for each expert."""
    return _Changing(plan, index, made).assembled()


@dataclass(frozen=True)
class Stock:
    """A mixture in files: `blocks`, the parts of its layers that have experts, `count` each."""

    blocks: tuple[str, ...]
    count: int


def stock_of(model: Model) -> Stock:
    """The experts of a stock mixture; raises PlanError where it is none, or has no tensors for each."""
    found: dict[str, set[int]] = {}
    for name in model.source.tensors:
        if match := EXPERT.fullmatch(name):
            found.setdefault(match["block"], set()).add(int(match["number"]))
        elif FUSED.fullmatch(name):
            raise PlanError(
                f"{model.label}: {name!r} holds the experts of a layer in one; experts are changed where "
                "each has tensors of its own"
            )
    if not found:
        raise PlanError(f"{model.label}: is no mixture; none of its tensors is an expert's")
    count = len(next(iter(found.values())))
    for block, numbers in found.items():
        if numbers != set(range(count)):
            raise PlanError(
                f"{model.label}: {block} has experts {sorted(numbers)}; in every layer they must be 0 to "
                f"{count - 1}"
            )
    return Stock(tuple(found), count)


@dataclass
class _Changing:
    """Makes the steps of a stock mixture with other experts."""

    plan: Plan
    index: Mapping[str, int]
    made: Mapping[int, Mapping[str, Step]]
    making: Making = field(default_factory=Making)

    def assembled(self) -> Assembled:
        self._check()
        steps = sorted(self._steps(), key=lambda step: natural_order(step.name))
        top_k, notes = top_k_of(self.plan.recipe, int(self.plan.config.get(TOP_K) or 2), self.count)
        base = self.base
        own = Model(NAME, base.folder, base.config, self.making.source(), computed=True, name=NAME)
        added = self.added.models if self.added else ()
        config = self._config(top_k)
        if self.added and self.added_ground:
            notes += equal_scores(self.added_ground.routing.mode, top_k, self.count)
            notes += (*self.added.notes, *train_again(base))
        return Assembled(tuple(steps), config, (*added, own), notes=tuple(notes))

    @property
    def base(self) -> Model:
        return self.plan.models[self.plan.donor]

    @property
    def count(self) -> int:
        return len(self.roster.result)

    @cached_property
    def stock(self) -> Stock:
        return stock_of(self.base)

    @cached_property
    def roster(self) -> Roster:
        names = expert_names(self.base.folder, self.stock.count)
        experts = self.ground.experts if self.ground else ()
        return roster_of(self.plan.recipe, self.base.label, names, experts)

    def _check(self) -> None:
        """Raises PlanError for what such a mixture cannot be."""
        section, where = self.plan.recipe.sections.router, self.plan.recipe.where("router")
        mode = (section and section.mode) or self.plan.recipe.sections.gate_mode
        if section and (section.weights is not None or section.per not in (None, "layer")):
            key = "weights" if section.weights is not None else "per"
            raise PlanError(f"{where}: {key} is of mixtures of adapters; leave it out")
        for key in idle_keys(section, bool(mode)) if not self.added else ():
            raise PlanError(
                f"{where}: {key} is for routers of added experts, and there are none; leave it out"
            )
        if (self.plan.config.get(GROUPS) or 1) > 1:
            raise PlanError(
                f"{self.base.label}: its experts are in groups of one size ({GROUPS} in config.json); they "
                "are not dropped or added one by one"
            )
        if self.count < 2 and any(name.endswith(CORRECTION) for name in self.base.source.tensors):
            raise PlanError(
                f"{self.plan.recipe.where('drop')}: {self.plan.config.get('model_type')} needs at least 2 "
                "experts; keep another"
            )

    # -- steps -------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[Step]:
        numbers = {old: new for new, old in enumerate(self.roster.kept)}
        for step in self.plan.steps:
            if match := EXPERT.fullmatch(step.name):
                if (old := int(match["number"])) in numbers:
                    name = f"{match['block']}.experts.{numbers[old]}.{match['rest']}"
                    yield replace(step, name=name)
            elif (match := GATE.fullmatch(step.name)) and match["block"] in self.stock.blocks:
                yield self._gate(step)
            else:
                yield step
        yield from self._added_steps()

    def _gate(self, step: Step) -> Step:
        """Of a router, the rows of the kept experts, then those of the added ones."""
        if step.shape[0] != self.stock.count:
            raise PlanError(
                f"{self.base.label}: tensor {step.name!r} has {step.shape[0]} rows, and there are "
                f"{self.stock.count} experts"
            )
        source: Source = self.base.source
        parts: list[Rows] = [Stretch(source, step.name, i, i + 1) for i in self.roster.kept]
        if self.added and self.added_ground:
            parts.append(self._added_rows(step.name, parts))
        rows = parts[0] if len(parts) == 1 else Stacked(parts)
        number = len(self.plan.models) + (len(self.added.models) if self.added else 0)
        made = copied(
            step.name, Operand(number, step.name, self.making.add(step.name, rows)), step.dtype
        )
        return replace(made, shape=(self.count, *step.shape[1:]))

    def _added_rows(self, name: str, kept: Sequence[Rows]) -> Rows:
        """Of a router, those of the added experts. A bias that counts for choosing alone is the mean of the
        kept ones': choosing does not change as all of them do, and 0 beside what a training has found might
        send the added experts all tokens, or none."""
        assert self.added
        assert self.added_ground
        if name.endswith(CORRECTION) and kept:
            return Middle(Stacked(tuple(kept)), len(self.roster.added))
        operand = self.added_routers[name]
        models = (*self.added_ground.plan.models, *self.added.models)
        return Stretch.whole(models[operand.model].source, operand.tensor)

    def _config(self, top_k: int) -> dict[str, Any]:
        config = dict(self.plan.config)
        config |= {key: self.count for key in COUNTS if config.get(key) == self.stock.count}
        section = self.plan.recipe.sections.router or RouterSection()
        if "normalise" in section.model_fields_set:
            if NORMALISE not in config:
                where = self.plan.recipe.where("router")
                kind = config.get("model_type")
                raise PlanError(f"{where}: normalise cannot be chosen in {kind}; leave it out")
            config[NORMALISE] = section.normalise
        return config | {TOP_K: top_k, "expert_names": self.roster.result}

    # -- added experts -----------------------------------------------------------------------------

    @cached_property
    def ground(self) -> Ground | None:
        """The experts that the recipe lists, and how this mixture is routed, as far as that is known."""
        if not self.plan.recipe.sections.experts:
            return None
        section = self.plan.recipe.sections.router or RouterSection()
        asked = all(e.positive_prompts for e in self.plan.recipe.sections.experts)
        mode = "hidden" if asked else told_mode(self.base.folder)
        former = Routing(mode, 1, section.temperature, "layer", True, 0, "")
        ground = Ground(self.plan, self.index, self.made, former)
        for expert in ground.experts:
            if expert.adapter:
                raise PlanError(
                    f"{expert.place}: {self.base.label} is a mixture of models; write source_model: "
                    "BASE+ADAPTER instead of adapter:"
                )
        return ground

    @cached_property
    def added_ground(self) -> Ground | None:
        """As `ground`, on the dense model that stands for the mixture."""
        if self.ground is None:
            return None
        routing = added_routing(self.plan.recipe, self.roster, self.ground.routing)
        check_examples(routing.mode, self.ground.experts)
        dense = self._dense()
        models = list(self.plan.models)
        models[self.plan.donor] = dense
        steps = tuple(self._dense_steps())
        plan = replace(self.plan, models=tuple(models), steps=steps, config=dense.config)
        return Ground(plan, self.index, self.made, routing)

    @cached_property
    def added(self) -> Assembled | None:
        """The added experts, numbered from 0, and their rows of routers."""
        return experts_alone(self.added_ground, self._layout()) if self.added_ground else None

    @cached_property
    def added_routers(self) -> Mapping[str, Operand]:
        assert self.added
        return {s.name: s.operands[0] for s in self.added.steps if GATE.fullmatch(s.name)}

    def _added_steps(self) -> Iterator[Step]:
        first = len(self.roster.kept)
        for step in self.added.steps if self.added else ():
            if match := EXPERT.fullmatch(step.name):
                number = first + int(match["number"])
                yield replace(step, name=f"{match['block']}.experts.{number}.{match['rest']}")

    # -- the dense model ---------------------------------------------------------------------------

    @cached_property
    def mixture(self) -> StockClass:
        kind = str(self.plan.config.get("model_type"))
        if kind not in MIXTURES:
            raise PlanError(
                f"{self.plan.recipe.where('experts')}: {self.base.label} is a {kind}; models are added to "
                f"{', '.join(MIXTURES)}"
            )
        return MIXTURES[kind]

    @cached_property
    def _projections(self) -> Mapping[str, str]:
        """The first expert's projections -> where a dense model has them."""
        found = {}
        for block in self.stock.blocks:
            layer = block.removesuffix(f".{self.mixture.block}")
            for part in PARTS:
                found[f"{layer}.{self.mixture.expert(0, part)}"] = f"{layer}.mlp.{part}_proj.weight"
        return found

    def _dense_names(self) -> dict[str, str]:
        """The dense model's tensors -> those of the mixture."""
        within = tuple(f"{block}." for block in self.stock.blocks)
        names = [step.name for step in self.plan.steps]  # a head that is tied is none of them
        around = {name: name for name in names if not name.startswith(within)}
        return around | {dense: name for name, dense in self._projections.items()}

    def _dense(self) -> Model:
        names, base = self._dense_names(), self.base
        source = Source(
            {dense: base.source.tensors[name] for dense, name in names.items()},
            lambda name, first, end, out: base.source.read(names[name], first, end, out),
            lambda name, rows: base.source.scratch(names[name], rows),
            base.source.held,
        )
        return replace(base, config=self._dense_config(), source=source)

    def _dense_config(self) -> dict[str, Any]:
        config = dict(self.plan.config)
        kind = str(config["model_type"])
        dense = DENSE.get(kind, kind)
        if kind == "glm4_moe":
            biased = "qwen2" if config.get("attention_bias") else "llama"
            dense = "qwen3" if config.get("use_qk_norm") else biased
        if dense == kind:  # DeepSeek's own may have dense layers
            config["first_k_dense_replace"] = config["num_hidden_layers"]
            return config
        loader = f"{dense.capitalize()}ForCausalLM"
        width = config.get("moe_intermediate_size", config.get("intermediate_size"))
        return config | {"model_type": dense, "architectures": [loader], "intermediate_size": width}

    def _dense_steps(self) -> Iterator[Step]:
        """Those of the mixture under the dense model's names; gate and up projection as the added models have
        them, in one tensor or two."""
        steps = {step.name: step for step in self.plan.steps}
        for name, stored in self._dense_names().items():
            step = steps[stored]
            if self._joined and name.endswith(UP):
                continue
            if self._joined and name.endswith(GATE_PROJ):
                name = name.removesuffix(GATE_PROJ) + JOINED_PROJ
                step = replace(step, shape=(2 * step.shape[0], *step.shape[1:]))
            operands = tuple(
                replace(o, tensor=name) if o.tensor == stored and o.model == self.plan.donor else o
                for o in step.operands
            )
            yield replace(step, name=name, operands=operands)

    @cached_property
    def _joined(self) -> bool:
        experts = self.ground.experts if self.ground else ()
        return any(n.endswith(JOINED_PROJ) for e in experts for n in e.model.source.tensors)

    def _layout(self) -> Layout:
        ground = self.added_ground
        assert ground
        stack = main_stack(ground.steps, ground.plan.config)
        if stack is None:
            raise PlanError(f"{self.base.label}: has no layers that experts could be put into")
        tails = layer_tensors(ground.steps, stack)
        sparse = tuple(
            i for i in sorted(tails) if f"{stack}.{i}.{self.mixture.block}" in self.stock.blocks
        )
        shape = ground.steps[f"{stack}.{sparse[0]}.mlp.down_proj.weight"].shape
        if len(shape) != 2:
            raise PlanError(f"{self.base.label}: its experts' down_proj has shape {list(shape)}")
        hidden, width = shape
        return Layout(self.mixture, stack, tails, sparse, width, hidden)
