"""Recipe + headers -> Plan, before anything of it happens: a step for every spot of the output."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge.agreement import check_agreement
from merge.anatomy import layer_of, natural_order, vocabulary_tensors
from merge.budget import RESERVED
from merge.errors import PlanError
from merge.experts.assembling import with_experts
from merge.lineup import Lineup
from merge.methods import all_methods
from merge.numerics import FLOATS
from merge.patterns import fits
from merge.plan import Operand, Plan, Step, times_made
from merge.recipe import Recipe
from merge.sources import Source, TensorInfo
from merge.sources.model import Model
from merge.spots import Spot, Spots, find_spots, layer_counts, some
from merge.tokens.assembly import Assembly
from merge.tokens.consent import alike, checked_tokens, end_alike
from merge.tokens.surgeon import plan_surgery, wants_surgery
from merge.tokens.vocabularies import Vocabularies
from merge.tokens.vocabulary import PARSED, TOKENIZER, model_files

MOST_TIMES = 8  # that a merge within a merge is made, in the mean


def make_plan(recipe: Recipe, models: Mapping[str, Model], memory: int | None = None) -> Plan:
    """The plan of `recipe` over its opened models (see `model_labels`); raises PlanError.

    memory: bytes that reading vocabularies may take.
    """
    known = list(models.values())
    index = {label: i for i, label in enumerate(models)}
    made: dict[int, Mapping[str, Step]] = {}
    vocabularies = Vocabularies()
    notes: list[str] = []
    for name, stage in recipe.stages.items():
        plan = _Planner(Lineup(stage, known, index, made), vocabularies, memory).plan()
        if plan.tokens:
            raise PlanError(
                f"{stage.file}:1: {name}: its models have other tokens than one another; write this merge "
                "to a folder first"
            )
        index[name] = len(known)
        made[len(known)] = {step.name: step for step in plan.steps}
        known.append(_as_model(name, plan))
        notes += plan.notes
    planner = _Planner(Lineup(recipe, known, index, made), vocabularies, memory)
    plan = planner.plan()
    if not recipe.sections.adapter:
        notes += planner.token_notes(plan)
    if recipe.mixes:
        plan = with_experts(plan, index, made)
    if (times := times_made(plan.steps)) > MOST_TIMES:
        raise PlanError(
            f"{recipe.file}:1: merges are merged again so often that each would be made {times:.0f} times; "
            "write one of those that others use to a folder first"
        )
    return replace(
        plan,
        parsing=planner.parsing,
        unseen=tuple(planner.unseen),
        notes=tuple(dict.fromkeys([*notes, *plan.notes])),
    )


def model_labels(recipe: Recipe) -> list[str]:
    """Every model that has to be opened, once: those of the recipe itself first, its base the first."""
    every = (recipe, *recipe.stages.values())
    labels = [label for each in every for label in (*each.labels, *each.expert_labels)]
    labels += [label for label in [recipe.outside_source] if label]
    return [label for label in dict.fromkeys(labels) if label not in recipe.stages]


def _as_model(name: str, plan: Plan) -> Model:
    """A merge that is not written, as one of the models of another."""
    tensors = {step.name: TensorInfo(step.dtype, step.shape) for step in plan.steps}

    def read(*_: object) -> None:
        raise AssertionError("tensors of a merge are made by its steps")

    donor = plan.models[plan.donor]
    return Model(name, donor.folder, plan.config, Source(tensors, read), computed=True, name=name)


class _Planner:
    """Turns the spots of one recipe into steps."""

    def __init__(self, lineup: Lineup, vocabularies: Vocabularies, memory: int | None) -> None:
        self.lineup, self.recipe, self.models = lineup, lineup.recipe, lineup.models
        self.vocabularies, self.memory, self.parsing = vocabularies, memory, 0
        self.unseen: list[str] = []
        self.notes: list[str] = []
        self.assembly: Assembly | None = None
        self.of_tokens = self._of_tokens()

    def plan(self) -> Plan:
        lineup, donor = self.lineup, self.models[self.lineup.donor]
        others = [self.models[i] for i in lineup.merged if i != lineup.donor]
        whole = self.recipe.sections.modules is None
        self.notes += [note for index in lineup.spelled for note in self.models[index].notes]
        same = bool(self.recipe.sections.adapter)
        self.notes += check_agreement(
            donor, others, self.vocabularies, whole=whole, same_tokens=same
        )
        self._note_dropped()
        spots = find_spots(lineup)
        self.notes += spots.notes
        self._check_tying(spots)
        self._plan_surgery(spots)
        steps = {spot.name: self._step(spot) for spot in spots.merged}
        steps |= {name: self._carried(name) for name in spots.carried}
        self._note_idle_filters(list(steps))
        self._check_chosen(spots)
        if not steps:
            raise PlanError(f"{self.models[lineup.reference].label}: holds no tensors")
        steps = {name: self._with_rows(step) for name, step in steps.items()}
        ordered = tuple(steps[name] for name in sorted(steps, key=natural_order))
        surgery = self.assembly.surgery if self.assembly else None
        models = [*self.models, *([self.assembly.model()] if self.assembly else [])]
        return Plan(
            recipe=self.recipe,
            models=tuple(models),
            donor=lineup.donor,
            base=lineup.base,
            config=surgery.config if surgery else spots.config,
            steps=ordered,
            notes=tuple(self.notes),
            origins=self._origins(ordered),
            tokens=surgery.retold if surgery else None,
            fillings=tuple(self.assembly.fillings if self.assembly else ()),
        )

    # -- tokens ------------------------------------------------------------------------------------

    def token_notes(self, plan: Plan) -> list[str]:
        """See checked_tokens; vocabularies that do not fit into the memory are not looked at."""
        lineup, surgery = self.lineup, self.assembly.surgery if self.assembly else None
        parents = [lineup.donor, *(i for i in lineup.merged if i != lineup.donor)]
        models = [self.models[i] for i in parents]
        seen = models if surgery else self._seen(models)
        if not seen:
            return []
        tensors = {step.name: TensorInfo(step.dtype, step.shape) for step in plan.steps}
        return checked_tokens(
            seen, self.vocabularies, self.recipe.sections, surgery, plan.config, tensors
        )

    def _seen(self, models: Sequence[Model]) -> Sequence[Model]:
        """Those of the models whose vocabularies have to be looked at, and can be."""
        wanted = models[:1] if alike(models, self.vocabularies) else models
        if self._can_read(wanted):
            return wanted
        least = -(-(RESERVED + parsing_bytes(wanted)) >> 20)
        if end_alike(models, self.vocabularies) and self._can_read(models[:1]):
            what = (
                f"other models may split texts otherwise; looking at that takes --memory {least}MiB"
            )
            self.unseen.append(f"{models[0].label}: {what}")
            return models[:1]
        what = f"its tokens were not looked at, which takes --memory {least}MiB"
        self.unseen.append(f"{models[0].label}: {what}")
        return []

    def _can_read(self, models: Sequence[Model]) -> bool:
        """Whether the vocabularies of these models fit into the memory; then they count as read."""
        taken = parsing_bytes(models)
        if self.memory is not None and RESERVED + taken > self.memory:
            return False
        self.parsing = max(self.parsing, taken)
        return True

    def _of_tokens(self) -> dict[str, str]:
        """Tensors with a row for every token, as the reference spells them -> embed or head."""
        found: dict[str, str] = {}
        for index, spelled in self.lineup.spelled.items():
            model = self.models[index]
            shapes = {n: model.source.tensors[stored].shape for n, stored in spelled.items()}
            found |= vocabulary_tensors(model.config, shapes)
        return found

    def _plan_surgery(self, spots: Spots) -> None:
        """Where tokens differ or the recipe changes them; of an adapter they must be the base's."""
        if self.recipe.sections.adapter or not wants_surgery(self.lineup, self.vocabularies):
            return
        source = self.recipe.outside_source
        parents = [*self.lineup.merged, *([self.lineup.index[source]] if source else [])]
        models = [self.models[i] for i in parents]
        if not self._can_read(models):
            least = -(-(RESERVED + parsing_bytes(models)) >> 20)
            raise PlanError(
                f"{self.recipe.file}:1: the models have other tokens than one another, and reading what they "
                f"have takes --memory {least}MiB"
            )
        surgery = plan_surgery(self.lineup, spots.config, self.vocabularies)
        if not surgery.is_idle:
            self.assembly = Assembly(self.lineup, surgery)
            self.notes += surgery.notes

    def _with_rows(self, step: Step) -> Step:
        if self.assembly and step.name.endswith("final_logits_bias"):
            raise PlanError(
                f"{self.models[self.lineup.donor].label}: {step.name!r} has a column for every token, which "
                "cannot be sorted anew; merge models of one vocabulary"
            )
        kind = self.of_tokens.get(step.name)
        return self.assembly.step(step, kind) if self.assembly and kind else step

    def _origins(self, steps: Sequence[Step]) -> dict[str, Operand]:
        """What the base has in the place of each step's tensor, for an adapter."""
        base = self.lineup.base
        if not self.recipe.sections.adapter or base is None:
            return {}
        stored = ((step, self.lineup.stored(base, step.name)) for step in steps)
        found = {step.name: self._origin(step, operand) for step, operand in stored if operand}
        label, missing = self.models[base].label, self.lineup.spelled[base].keys() - found.keys()
        if missing:
            raise PlanError(
                f"{self.models[self.lineup.reference].label}: lacks tensor {min(missing)!r} of {label}; "
                "it is no fine-tune of it"
            )
        return found

    def _origin(self, step: Step, base: Operand) -> Operand:
        """Raises PlanError where an adapter of the base cannot give the shape of a step's tensor."""
        old = base.info.shape
        if step.shape[1:] != old[1:] or step.shape[:1] < old[:1]:
            raise PlanError(
                f"{self.models[self.lineup.reference].label}: tensor {step.name!r} has shape "
                f"{list(step.shape)}, but {list(old)} in {self.models[base.model].label}; only more rows can "
                "be new"
            )
        return base

    def _note_dropped(self) -> None:
        if dropped := sorted(self.lineup.dropped(self.lineup.reference)):
            label = self.models[self.lineup.reference].label
            self._note(f"{label}: not written: {some(dropped)} (recomputed or tied on loading)")

    def _check_chosen(self, spots: Spots) -> None:
        """Raises PlanError where include and exclude leave nothing to merge."""
        if spots.merged and not any(self._is_merged(spot.name) for spot in spots.merged):
            key = "include" if self.recipe.sections.include else "exclude"
            raise PlanError(f"{self.recipe.where(key)}: {key} leaves no tensor to merge")

    def _check_tying(self, spots: Spots) -> None:
        """config.json comes from the donor, the tensors' names from those that lead: both must fit."""
        donor = self.models[self.lineup.donor]
        if spots.config.get("tie_word_embeddings") != donor.config.get("tie_word_embeddings"):
            return  # a model with a head of its own has made it so
        for index in {spot.lead[0] for spot in spots.merged if not layer_of(spot.name)}:
            lead = self.models[index]
            if donor.tied != lead.tied:
                raise PlanError(
                    f"{donor.label}: tie_word_embeddings is {str(donor.tied).lower()} in config.json, but "
                    f"{str(lead.tied).lower()} in {lead.label}, whose tensors are "
                    f"written; choose it as tokenizer_source"
                )

    # -- steps -------------------------------------------------------------------------------------

    def _carried(self, name: str) -> Step:
        """A tensor of the reference as it is stored."""
        operand = self.lineup.stored(self.lineup.reference, name)
        assert operand is not None
        return _taken_over(name, operand, operand.info.written)

    def _step(self, spot: Spot) -> Step:
        lead = self._lead(spot)
        info = lead.info
        dtype = self._dtype(spot, info)
        if info.dtype not in FLOATS or 0 in info.shape:
            return _taken_over(spot.name, lead, info.dtype if info.dtype not in FLOATS else dtype)
        if not self._is_merged(spot.name):
            return _taken_over(spot.name, self._base(spot, lead) or lead, dtype)
        return self._merged(spot, lead, dtype)

    def _lead(self, spot: Spot) -> Operand:
        index, name = spot.lead
        lead = self.lineup.stored(index, name)
        if lead is None:
            reference = self.models[self.lineup.reference].label
            raise PlanError(f"{self.models[index].label}: lacks tensor {name!r} of {reference}")
        return lead

    def _merged(self, spot: Spot, lead: Operand, dtype: str) -> Step:
        piece, method = spot.piece, self.recipe.method
        base = self._base(spot, lead)
        chosen = [
            i
            for i, entry in enumerate(piece.entries)
            if not (piece.task_vectors and entry.model == piece.base)
        ]
        operands = [
            self._operand(self.lineup.index[piece.entries[i].model], spot.names[i], lead)
            for i in chosen
        ]
        parameters = self._parameters(spot, chosen)
        if method.base == "first" and base is not None:
            operands = [base] + [o for o in operands if o.model != base.model]
        if method.check and (problem := method.check(**method.arguments(parameters))):
            where = self.recipe.where(*piece.entries[0].place[:-1])
            raise PlanError(f"{where}: {spot.name}: {problem}")
        copy = method.copies(**method.arguments(parameters)) and operands[0].info.dtype == dtype
        delta_base = base if piece.task_vectors else None
        shape = lead.info.shape
        return Step(spot.name, shape, dtype, method, tuple(operands), delta_base, parameters, copy)

    def _base(self, spot: Spot, lead: Operand) -> Operand | None:
        """The tensor of the slice's base, where the method has one."""
        if spot.piece.base is None or spot.base is None or self.recipe.method.base == "donor":
            return None
        return self._operand(self.lineup.index[spot.piece.base], spot.base, lead)

    def _dtype(self, spot: Spot, info: TensorInfo) -> str:
        if self.recipe.sections.adapter:
            return "F32"  # differences are taken of it
        if self.recipe.out_dtype:
            return self.recipe.out_dtype
        given = self.lineup.stored(self.lineup.donor, spot.lead[1])
        return given.info.written if given else info.written

    def _is_merged(self, name: str) -> bool:
        sections = self.recipe.sections
        wanted = not sections.include or any(fits(p, name) for p in sections.include)
        return wanted and not any(fits(p, name) for p in sections.exclude)

    def _operand(self, index: int, name: str, lead: Operand) -> Operand:
        model, reference = self.models[index], self.models[lead.model].label
        found = self.lineup.stored(index, name)
        if found is None:
            if self.recipe.sections.missing_tensors == "base" and lead.model == self.lineup.base:
                self._note(
                    f"{model.label}: lacks tensors of {reference}, which count as unchanged there"
                )
                return lead
            raise PlanError(
                f"{model.label}: lacks tensor {name!r} of {reference}; {self._way_out(index, name)}"
            )
        info, wanted = found.info, lead.info
        rows_differ = self.assembly is not None and name in self.of_tokens
        if info.shape[rows_differ:] != wanted.shape[rows_differ:]:
            raise PlanError(
                f"{model.label}: tensor {found.tensor!r} has shape {list(info.shape)}, but "
                f"{list(wanted.shape)} in {reference}; models of one shape can be merged"
            )
        if info.dtype not in FLOATS:
            raise PlanError(
                f"{model.label}: tensor {found.tensor!r} is {info.dtype}, but {wanted.dtype} in "
                f"{reference}"
            )
        return found

    def _way_out(self, index: int, name: str) -> str:
        """What to do about a tensor that a model lacks."""
        layer = layer_of(name)
        counts = layer_counts(self.lineup.spelled[index])
        if layer and layer[1] >= counts.get(layer[0], 0):
            return f"it has {counts.get(layer[0], 0)} layers; slices choose layers of each model"
        return "with a base_model, missing_tensors: base takes it as unchanged"

    def _parameters(self, spot: Spot, chosen: Sequence[int]) -> dict[str, Any]:
        piece = spot.piece
        values: dict[str, Any] = {}
        for parameter in self.recipe.method.parameters.values():
            name = parameter.name
            if parameter.per_model:
                asked = [(piece.entries[i].settings[name], spot.names[i]) for i in chosen]
            else:
                asked = [(piece.shared[name], spot.name)]
            found = [setting.at(tensor, spot.depth) for setting, tensor in asked]
            if None in found:
                at = found.index(None)
                place = piece.entries[chosen[at]].place if parameter.per_model else ("parameters",)
                raise PlanError(
                    f"{self.recipe.where(*place, name)}: no rule of {name} fits tensor "
                    f"{asked[at][1]!r}; end its list with a value without filter"
                )
            typed = [parameter.kind(value) for value in found]
            values[name] = typed if parameter.per_model else typed[0]
        return values

    # -- notes -------------------------------------------------------------------------------------

    def _note(self, note: str) -> None:
        self.notes += [note] if note not in self.notes else []

    def _note_idle_filters(self, names: Sequence[str]) -> None:
        """A filter that fits no tensor may be meant for other models, or be misspelt."""
        for piece in self.recipe.slices:
            settings = [(entry.settings, entry.place) for entry in piece.entries]
            for found, place in [*settings, (piece.shared, ())]:
                for key, setting in found.items():
                    patterns = [pattern for pattern, _ in setting.rules]
                    self._note_idle(names, key, patterns, (*place, "parameters", key))
        for key in ("include", "exclude"):
            self._note_idle(names, key, getattr(self.recipe.sections, key), (key,))

    def _note_idle(
        self, names: Sequence[str], key: str, patterns: Iterable[str | None], at: tuple[Any, ...]
    ) -> None:
        for pattern in patterns:
            if pattern and not any(fits(pattern, name) for name in names):
                where = self.recipe.where(*at)
                self._note(f"{where}: filter {pattern!r} of {key} fits no tensor")


def parsing_bytes(models: Sequence[Model]) -> int:
    """Memory that reading the vocabularies of these models takes."""
    files = [model_files(model.folder, model.adapters).get(TOKENIZER) for model in models]
    return PARSED * sum(file.stat().st_size for file in files if file)


def _taken_over(name: str, operand: Operand, dtype: str) -> Step:
    """A tensor as it is, or only rounded to another dtype."""
    passthrough = all_methods()["passthrough"]
    same = operand.info.dtype == dtype
    parameters = {} if same else {"scale": [1.0]}
    shape = operand.info.shape
    return Step(name, shape, dtype, passthrough, (operand,), None, parameters, copy=same)
