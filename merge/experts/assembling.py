"""The plan of a base alone -> the plan of a mixture on it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from merge.anatomy import matched
from merge.errors import PlanError
from merge.experts.assembly import Assembled, Expert, Routing
from merge.experts.configs import check_configs
from merge.experts.routing import example_digests, routing_of
from merge.experts.sections import FROM_TEXTS, ExpertEntry, SharedExpert
from merge.methods import all_methods
from merge.plan import Operand, Plan, Step
from merge.sources import Source
from merge.sources.model import Model
from merge.tokens.architecture import config_findings


def with_experts(
    plan: Plan, index: Mapping[str, int], made: Mapping[int, Mapping[str, Step]]
) -> Plan:
    """`plan`, of the base alone, with the experts of its recipe put into it; raises PlanError.

    index, made: as of a Lineup.
    """
    check_configs(plan.models)
    found = _assembled(plan, index, made)
    texts = [[file.name, digest] for file, digest in found.texts.items()]
    return replace(
        plan,
        told={**plan.told, "texts": texts} if texts else plan.told,
        steps=found.steps,
        config=found.config,
        models=(*plan.models, *found.models),
        files={**plan.files, **found.files},
        notes=(*plan.notes, *found.notes),
    )


def _assembled(
    plan: Plan, index: Mapping[str, int], made: Mapping[int, Mapping[str, Step]]
) -> Assembled:
    if plan.recipe.sections.mixture:
        from merge.experts.lora.changing import changed

        return changed(plan, index, made)
    ground = Ground(plan, index, made)
    if ground.format == "routed":
        from merge.experts.lora.routed import routed

        return routed(ground)
    if ground.format == "peft":
        from merge.experts.xlora.folder import peft

        return peft(ground)
    from merge.experts.stock.moe import moe

    return moe(ground)


class Ground:
    """What a mixture is put together from: the plan of its base, its experts, how tokens are routed (as the
    recipe says, unless it is given)."""

    def __init__(
        self,
        plan: Plan,
        index: Mapping[str, int],
        made: Mapping[int, Mapping[str, Step]],
        routing: Routing | None = None,
    ) -> None:
        self.plan, self.recipe, self._made = plan, plan.recipe, made
        self._index = index
        self.sections = plan.recipe.sections
        self.base: Model = plan.models[plan.donor]
        self.experts = self._listed("experts", self.sections.experts or ())
        self.shared = self._listed("shared_experts", self.sections.shared_experts or ())
        self._check_kinds()
        self.notes = tuple(self._differences())
        self.routing = routing or routing_of(self.recipe, self.experts, self.format)

    @property
    def of_adapters(self) -> bool:
        return self.experts[0].adapter is not None

    @property
    def format(self) -> str:
        """routed, dense or peft for adapters; dense for models."""
        return self.sections.format or ("routed" if self.of_adapters else "dense")

    @cached_property
    def texts(self) -> Mapping[Path, str]:
        """The files that routers are made from, each with the digest of its texts; raises PlanError."""
        return example_digests(self.recipe) if self.routing.mode in FROM_TEXTS else {}

    @property
    def next_index(self) -> int:
        """The number that the first pseudo-model of an assembly gets."""
        return len(self.plan.models)

    @cached_property
    def steps(self) -> Mapping[str, Step]:
        """Those of the base, by name, in their order."""
        return {step.name: step for step in self.plan.steps}

    def operand(self, expert: Expert, name: str) -> Operand:
        """The expert's tensor in the place of the base's `name`; PlanError where it lacks it or its shape
        is another."""
        stored = self._spelling(expert).get(name)
        if stored is None:
            raise PlanError(
                f"{expert.place}: {expert.model.label} lacks tensor {name!r} of {self.base.label}; experts "
                "are models of the base's architecture and size"
            )
        info, wanted = expert.model.source.tensors[stored], self.steps[name].shape
        if info.shape != wanted:
            raise PlanError(
                f"{expert.place}: tensor {stored!r} of {expert.model.label} has shape {list(info.shape)}, "
                f"but {list(wanted)} in {self.base.label}; experts are models of the base's size"
            )
        made = self._made.get(expert.index)
        return Operand(expert.index, stored, info, made[stored] if made else None)

    def _spelling(self, expert: Expert) -> Mapping[str, str]:
        """The base's names -> the expert's."""
        if expert.index not in self._spelled:
            self._spelled[expert.index] = matched(self.steps, expert.model.source.tensors)
        return self._spelled[expert.index]

    @cached_property
    def _spelled(self) -> dict[int, Mapping[str, str]]:
        return {}

    def _listed(
        self, key: str, entries: Sequence[ExpertEntry | SharedExpert]
    ) -> tuple[Expert, ...]:
        first = 0 if key == "experts" else len(self.sections.experts or ())
        labels = self.recipe.expert_labels[first:]
        found = [
            self._expert(entry, label, self.recipe.where(key, i))
            for i, (entry, label) in enumerate(zip(entries, labels, strict=False))
        ]
        return _told_apart(found)

    def _expert(self, entry: ExpertEntry | SharedExpert, label: str, place: str) -> Expert:
        entry = entry if isinstance(entry, ExpertEntry) else ExpertEntry(**entry.model_dump())
        index = self._index[label]
        model = self.plan.models[index]
        own = model.adapters[len(self.base.adapters) :] if entry.adapter else ()
        if len(own) > 1:
            raise PlanError(
                f"{place}: {entry.adapter!r} is several adapters in a row; an expert is one, or write them "
                "as source_model: BASE+ADAPTER+ADAPTER"
            )
        name = entry.name or re.split(r"[+/:]", model.public_name)[-1]
        return Expert(name, model, index, own[0] if own else None, entry, place)

    def _differences(self) -> Iterator[str]:
        """What config.json of experts that are models tells otherwise than the base's, which the result has;
        raises PlanError where its MLPs would compute something else."""
        for expert in (*self.experts, *self.shared):
            for finding in config_findings(self.base, expert.model, whole=False):
                if finding.severity == "error":
                    raise PlanError(f"{expert.place}: {expert.model.label}: {finding.what}")
                if finding.code != "tying-differs":  # of an expert only the MLPs count
                    yield f"{expert.model.label}: {finding.what}"

    def _check_kinds(self) -> None:
        kinds = [expert.adapter is not None for expert in self.experts]
        for expert, kind in zip(self.experts, kinds, strict=True):
            if kind != kinds[0]:
                raise PlanError(
                    f"{expert.place}: models and adapters are both listed; write an adapter among models as "
                    "source_model: BASE+ADAPTER"
                )
        if self.sections.format in ("routed", "peft") and not self.of_adapters:
            raise PlanError(
                f"{self.recipe.where('format')}: format {self.sections.format} is of adapters; models become "
                "experts in the dense format"
            )


def _told_apart(experts: Sequence[Expert]) -> tuple[Expert, ...]:
    """Experts with names of their own: those that come twice get their number. Raises PlanError where the
    recipe itself gives a name twice."""
    names = [expert.name for expert in experts]
    for i, expert in enumerate(experts):
        if expert.entry.name and expert.name in names[:i]:
            raise PlanError(
                f"{expert.place}: two experts are called {expert.name!r}; names tell them apart"
            )
    return tuple(
        replace(expert, name=f"{expert.name}-{i}") if names.count(expert.name) > 1 else expert
        for i, expert in enumerate(experts)
    )


def copied(name: str, operand: Operand, dtype: str, shape: tuple[int, ...] | None = None) -> Step:
    """A step that takes an operand over, rounded where `dtype` is another."""
    same = operand.info.dtype == dtype
    parameters = {} if same else {"scale": [1.0]}
    passthrough = all_methods()["passthrough"]
    return Step(
        name,
        shape or operand.info.shape,
        dtype,
        passthrough,
        (operand,),
        None,
        parameters,
        copy=same,
    )


def scaled(name: str, operand: Operand, dtype: str, scale: float) -> Step:
    """A step that multiplies an operand."""
    passthrough = all_methods()["passthrough"]
    parameters = {"scale": [scale]}
    return Step(
        name, operand.info.shape, dtype, passthrough, (operand,), None, parameters, copy=False
    )


def computing(name: str, ground: Ground, source: Source) -> Model:
    """A pseudo-model whose tensors are computed, as one of the plan's models."""
    return Model(name, ground.base.folder, ground.base.config, source, computed=True, name=name)
