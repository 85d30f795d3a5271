"""A mixture with other experts: some dropped, some added, nothing of the kept ones computed anew.

Of a mixture of adapters the plan is of the base inside. What kept experts have in its layers (ranks of
factors, rows of DoRA and of routers) is copied bit for bit; the added ones are put together as a mixture by
themselves on the same base, and stand behind them. A layer that no expert is left on is again the base's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from merge.errors import PlanError
from merge.experts.altered import Beside, Making, Rows, Stacked, Stretch, Zeros
from merge.experts.assembling import Ground, copied
from merge.experts.assembly import Assembled, Routing, Site
from merge.experts.lora.classes import Classes, asked_classes
from merge.experts.lora.former import ColumnsOf, Former, Known, runs
from merge.experts.lora.modelling import FILE, modelling_file, told_classes
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
from merge.plan import Operand, Plan, Step
from merge.sources import TensorInfo
from merge.sources.inside import BASE
from merge.sources.model import Model

NAME = "changed experts"
OF_LAYER = ("lora_A", "lora_B", "dora")


def changed(
    plan: Plan, index: Mapping[str, int], made: Mapping[int, Mapping[str, Step]]
) -> Assembled:
    """`plan`, of a mixture alone (of the base inside it, where it is one of adapters), with the experts that
    its recipe wants; raises PlanError. index, made: as of a Lineup."""
    base = plan.models[plan.donor]
    if base.computed or base.adapters:
        where = plan.recipe.where("mixture")
        raise PlanError(
            f"{where}: {base.label} is itself made by this recipe; write it to a folder first"
        )
    if base.within is None:
        from merge.experts.stock.changing import changed_stock

        return changed_stock(plan, index, made)
    return _Changing(plan, Former(base.within), index, made).assembled()


# -- the added experts -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Added:
    """The added experts as a mixture of their own on the same base, and routers for them at any site."""

    ground: Ground
    mixture: Assembled
    classes: Classes

    @cached_property
    def told(self) -> Mapping[str, Any]:
        return self.mixture.config["mixture"]  # type: ignore[no-any-return]

    @cached_property
    def steps(self) -> Mapping[str, Step]:
        return {step.name: step for step in self.mixture.steps}

    @property
    def count(self) -> int:
        return len(self.ground.experts)

    def ranks(self, layer: str) -> list[int]:
        facts = self.told["modules"].get(layer)
        return list(facts["ranks"]) if facts else [0] * self.count

    def rows(self, name: str) -> Stretch:
        """A tensor of theirs, as it is computed."""
        operand = self.steps[name].operands[0]
        models = (*self.ground.plan.models, *self.mixture.models)
        return Stretch.whole(models[operand.model].source, operand.tensor)

    def base_steps(self) -> Iterator[Step]:
        """Of the base, by its own names: what a recipe takes from an expert as a whole is in them."""
        layers, sites = self.told["modules"], set(self.told["sites"].values())
        inner = {f"{x}.{BASE}.{leaf}": f"{x}.{leaf}" for x in layers for leaf in ("weight", "bias")}
        own = {f"{x}.{leaf}" for x in layers for leaf in OF_LAYER}
        own |= {f"{site}.router.{leaf}" for site in sites for leaf in ("weight", "bias")}
        for name, step in self.steps.items():
            if name not in own:
                yield replace(step, name=inner.get(name, name))

    def routers(self, sites: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Rows]:
        """Site -> their rows, [added, width]. Arrow's are 0 where they change nothing; the others' depend on
        what the site reads alone."""
        from merge.experts.routers.rows import router_source

        names = {site: f"{site}.router.weight" for site in sites}
        if self.ground.routing.mode == "arrow":
            own = set(self.told["sites"].values())
            return {
                site: self.rows(name)
                if site in own
                else Zeros(TensorInfo("F32", (self.count, widths[site])))
                for site, name in names.items()
            }
        wanted = [
            Site(name, self.classes.module(site), widths[site]) for site, name in names.items()
        ]
        source = router_source(self.ground, wanted, {})
        return {site: Stretch.whole(source, name) for site, name in names.items()}


# -- the mixture as it shall be --------------------------------------------------------------------


@dataclass
class _Changing:
    """Makes the steps of a mixture of adapters with other experts."""

    plan: Plan
    former: Former
    index: Mapping[str, int]
    made: Mapping[int, Mapping[str, Step]]
    making: Making = field(default_factory=Making)

    def assembled(self) -> Assembled:
        top_k, notes = top_k_of(
            self.plan.recipe, self.former.told["top_k"], len(self.roster.result)
        )
        steps = tuple(self._steps())
        told = dict(self.former.told) | self._settings() | {
            "experts": self.roster.result,
            "top_k": top_k,
            "modules": self.layers,
            "sites": self.sites,
        }  # fmt: skip
        base = self.plan.models[self.plan.donor]
        own = Model(NAME, base.folder, base.config, self.making.source(), computed=True, name=NAME)
        added = self.added.mixture.models if self.added else ()
        if self.added:
            mode = "" if self.former.told["bias"] else self.added.ground.routing.mode
            notes += equal_scores(mode, top_k, len(self.roster.result))
            notes += [*self.added.mixture.notes, *train_again(self.former.model)]
        return Assembled(
            steps, self._config() | {"mixture": told}, (*added, own), self._files(), tuple(notes)
        )

    # -- experts -----------------------------------------------------------------------------------

    @cached_property
    def added(self) -> _Added | None:
        if not self.plan.recipe.sections.experts:
            return None
        from merge.experts.lora.routed import routed

        ground = Ground(self.plan, self.index, self.made, self.former.routing)
        if not ground.of_adapters:
            raise PlanError(
                f"{ground.experts[0].place}: {self.former.model.label} is a mixture of adapters; write "
                "adapter: instead of source_model:"
            )
        roster = roster_of(
            self.plan.recipe, self.former.model.label, self.former.told["experts"], ground.experts
        )
        routing = self._routing(roster)
        check_examples(routing.mode, ground.experts)
        ground.routing = replace(routing, mode="arrow" if routing.mode == "arrow" else "uniform")
        mixture = routed(ground)
        ground.routing = routing
        return _Added(ground, mixture, self._classes)

    @cached_property
    def roster(self) -> Roster:
        experts = self.added.ground.experts if self.added else ()
        former = self.former
        return roster_of(self.plan.recipe, former.model.label, former.told["experts"], experts)

    def _routing(self, roster: Roster) -> Routing:
        """Of the added experts. Beside fixed shares, which are in biases, all rows are 0."""
        if not self.former.told["bias"]:
            return added_routing(self.plan.recipe, roster, self.former.routing)
        where = self.plan.recipe.where("router")
        if not self.weights:
            raise PlanError(
                f"{where}: {self.former.model.label} has fixed shares; write router: {{weights: [...]}} with "
                f"those of all {len(roster.result)} experts, {', '.join(roster.result)}"
            )
        return replace(self.former.routing, mode="uniform", top_k=len(roster.added), where=where)

    @property
    def weights(self) -> Sequence[float] | None:
        section = self.plan.recipe.sections.router
        return section.weights if section else None

    # -- layers ------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> dict[str, dict[str, Any]]:
        """What config.json tells of each routed layer, in the order of the base."""
        found: dict[str, dict[str, Any]] = {}
        for step in self.plan.steps:
            layer, _, leaf = step.name.rpartition(".")
            if leaf == "weight" and any(ranks := self._ranks(layer)):
                dora = self.former.stretches(layer, self.roster.kept) or self._added_stretches(
                    layer
                )
                found[layer] = {"ranks": ranks, "dora": dora}
        return found

    def _ranks(self, layer: str) -> list[int]:
        former = self.former.ranks(layer)
        kept = [former[i] if former else 0 for i in self.roster.kept]
        return [*kept, *(self.added.ranks(layer) if self.added else ())]

    def _added_stretches(self, layer: str) -> bool:
        facts = self.added.told["modules"].get(layer) if self.added else None
        return bool(facts and facts["dora"])

    def _steps(self) -> Iterator[Step]:
        """Those of the base under their new names, each layer's experts behind its weight."""
        sites: set[str] = set()
        base = self.added.base_steps() if self.added else self.plan.steps
        for step in base:
            layer, _, leaf = step.name.rpartition(".")
            if layer not in self.layers:
                yield step
                continue
            yield replace(step, name=f"{layer}.{BASE}.{leaf}")
            if leaf == "weight":
                yield from self._factors(layer, step.dtype)
                if (site := self.sites[layer]) not in sites:
                    yield from self._router(site)
                sites.add(site)

    def _factors(self, layer: str, dtype: str) -> Iterator[Step]:
        """lora_A, lora_B and, where some stretch, dora."""
        ranks = self.former.ranks(layer)
        ends = list(accumulate(ranks, initial=0))
        numbers = [n for i in self.roster.kept if ranks for n in range(ends[i], ends[i + 1])]
        a, b = f"{layer}.lora_A", f"{layer}.lora_B"
        below = self.former.rows(a, numbers)
        columns: list[Rows] = [
            ColumnsOf(Stretch.whole(self.former.source, b), *run) for run in runs(numbers)
        ]
        if self.added and any(self.added.ranks(layer)):
            below.append(self.added.rows(a))
            columns.append(self.added.rows(b))
        stored = self.former.source.tensors
        yield self._step(a, _one(below, Stacked), stored[a].dtype if a in stored else dtype)
        yield self._step(b, _one(columns, Beside), stored[b].dtype if b in stored else dtype)
        if self.layers[layer]["dora"]:
            yield self._step(f"{layer}.dora", self._dora(layer, columns[0].info.rows), "F32")

    def _dora(self, layer: str, width: int) -> Rows:
        """Rows of zeros for those that do not stretch."""
        name = f"{layer}.dora"
        kept = len(self.roster.kept)
        there = name in self.former.source.tensors
        parts = self.former.rows(name, self.roster.kept) if there else []
        if kept and not there:
            parts = [Zeros(TensorInfo("F32", (kept, width)))]
        if self.added:
            blank = Zeros(TensorInfo("F32", (self.added.count, width)))
            parts.append(self.added.rows(name) if self._added_stretches(layer) else blank)
        return _one(parts, Stacked)

    # -- routers -----------------------------------------------------------------------------------

    @cached_property
    def sites(self) -> dict[str, str]:
        """Layer -> the part of the model whose input its router sees."""
        known = dict(self.added.told["sites"] if self.added else {}) | dict(
            self.former.told["sites"]
        )
        return {layer: known[layer] for layer in self.layers}

    @cached_property
    def widths(self) -> dict[str, int]:
        """Site -> how many numbers its router reads."""
        names = {site: f"{site}.router.weight" for site in self.sites.values()}
        stored, added = self.former.source.tensors, self.added.steps if self.added else {}
        return {s: stored[n].cols if n in stored else added[n].shape[1] for s, n in names.items()}

    @cached_property
    def _added_rows(self) -> Mapping[str, Rows]:
        return self.added.routers(list(self.widths), self.widths) if self.added else {}

    def _router(self, site: str) -> Iterator[Step]:
        """Rows of zeros for kept experts where there was no router: they change nothing there."""
        name, kept = f"{site}.router.weight", len(self.roster.kept)
        there = name in self.former.source.tensors
        parts = self.former.rows(name, self.roster.kept) if there else []
        if kept and not there:
            parts = [Zeros(TensorInfo("F32", (kept, self.widths[site])))]
        if self.added:
            parts.append(self._added_rows[site])
        yield self._step(name, _one(parts, Stacked), "F32")
        if self.former.told["bias"]:
            yield self._bias(site)

    def _bias(self, site: str) -> Step:
        """The kept ones' as they are; with new shares, all of them (see routers/rows.py)."""
        from merge.experts.routers.rows import shares_as_scores

        name, count = f"{site}.router.bias", len(self.roster.result)
        if self.weights is None:
            rows = _one(self.former.rows(name, self.roster.kept), Stacked)
            return self._step(name, rows, "F32")
        if len(self.weights) != count or min(self.weights) < 0 or not sum(self.weights):
            raise PlanError(
                f"{self.plan.recipe.where('router')}: weights are {list(self.weights)}; {count} shares are "
                f"needed, of {', '.join(self.roster.result)}, from 0, not all 0"
            )
        known = Known(shares_as_scores(self.weights, self._temperature))
        return replace(self._step(name, known, "F32"), shape=(count,))

    # -- the rest ----------------------------------------------------------------------------------

    def _step(self, name: str, rows: Rows, dtype: str) -> Step:
        number = len(self.plan.models) + (len(self.added.mixture.models) if self.added else 0)
        return copied(name, Operand(number, name, self.making.add(name, rows)), dtype)

    @property
    def _temperature(self) -> float:
        return float(self._settings().get("temperature", self.former.told["temperature"]))

    def _settings(self) -> dict[str, Any]:
        """What the recipe's `router` changes of config.json; raises PlanError for what it cannot."""
        section, told = self.plan.recipe.sections.router or RouterSection(), self.former.told
        given, where = section.model_fields_set, self.plan.recipe.where("router")
        if section.per not in (None, told["per"]):
            raise PlanError(
                f"{where}: per is {section.per}, and this mixture has a router for each {told['per']}; make "
                "it anew"
            )
        mode = section.mode or self.plan.recipe.sections.gate_mode
        for key in idle_keys(section, bool(mode)) if not self.added else ():
            if key != "temperature":  # the model itself divides scores by it
                raise PlanError(
                    f"{where}: {key} is for routers of added experts, and there are none; leave it out"
                )
        if section.weights is not None and not told["bias"]:
            raise PlanError(
                f"{where}: weights are of a mixture that was made with them, and this one's routers have no "
                "bias; make it anew"
            )
        if "temperature" in given and told["bias"] and section.weights is None:
            raise PlanError(
                f"{where}: another temperature would change fixed shares; give weights, too, or leave it out"
            )
        return {key: getattr(section, key) for key in ("temperature", "normalise") if key in given}

    @cached_property
    def _own_file(self) -> bool:
        """Whether the mixture has the modelling file that this version writes."""
        from merge.experts.checks.trust import is_own_code

        return is_own_code(self.former.model.folder, self.former.model.config)

    @cached_property
    def _classes(self) -> Classes:
        return asked_classes(self.plan.models[self.plan.donor])

    def _files(self) -> Mapping[str, bytes]:
        """The modelling file, unless it is carried over."""
        if self.added:
            return self.added.mixture.files
        if self._own_file:
            return {}
        return {FILE: modelling_file(self._classes, str(self.plan.config["model_type"]))}

    def _config(self) -> dict[str, Any]:
        """config.json but for the table about the mixture."""
        if self.added:
            return dict(self.added.mixture.config)
        config = dict(self.plan.config)
        if not self._own_file:
            return config | told_classes(self._classes, str(config["model_type"]))
        former = self.former.model.config
        return config | {key: former[key] for key in ("model_type", "architectures", "auto_map")}


def _one(parts: Sequence[Rows], joined: type[Stacked] | type[Beside]) -> Rows:
    """All parts as one matrix."""
    return parts[0] if len(parts) == 1 else joined(parts)
