"""Which experts a changed mixture has, how many a token gets, and how routers of the added ones are made."""

from collections.abc import Sequence
from dataclasses import dataclass

from merge.errors import PlanError
from merge.experts.assembly import Expert, Routing
from merge.experts.names import is_trained
from merge.experts.routing import are, up_to
from merge.experts.sections import FROM_TEXTS, RouterSection
from merge.numerics import random_key
from merge.recipe import Recipe
from merge.sources.model import Model


@dataclass(frozen=True)
class Roster:
    """The experts of a mixture by `names`, of which those at `kept` stay; `added` come after them."""

    names: Sequence[str]
    kept: Sequence[int]
    added: Sequence[str]

    @property
    def result(self) -> list[str]:
        return [*(self.names[i] for i in self.kept), *self.added]


def roster_of(recipe: Recipe, label: str, names: Sequence[str], added: Sequence[Expert]) -> Roster:
    """`label`: the mixture, whose experts are called `names`. Raises PlanError for a dropped expert that is
    not there, where none is left, and for two of one name."""
    drop = recipe.sections.drop
    gone = {_number(recipe, place, label, names) for place in range(len(drop))}
    kept = [i for i in range(len(names)) if i not in gone]
    if not kept and not added:
        raise PlanError(f"{recipe.where('drop')}: drop leaves no expert of {label}; keep one")
    for expert in added:
        if expert.name in [names[i] for i in kept]:
            raise PlanError(
                f"{expert.place}: {label} has an expert {expert.name!r} already; give this one another name"
            )
    return Roster(names, kept, [expert.name for expert in added])


def _number(recipe: Recipe, place: int, label: str, names: Sequence[str]) -> int:
    entry = recipe.sections.drop[place]
    if isinstance(entry, str) and entry in names:
        return list(names).index(entry)
    if isinstance(entry, int) and 0 <= entry < len(names):
        return entry
    numbered = ", ".join(f"{name} ({i})" for i, name in enumerate(names))
    raise PlanError(
        f"{recipe.where('drop', place)}: {label} has no expert {entry!r}; it has {numbered}"
    )


def top_k_of(recipe: Recipe, former: int, count: int) -> tuple[int, list[str]]:
    """How many of `count` experts a token gets, and what to note about it; raises PlanError."""
    section = recipe.sections.router
    given = (section and section.top_k) or recipe.sections.experts_per_token
    if given and given > count:
        where = recipe.where("router" if section and section.top_k else "experts_per_token")
        raise PlanError(
            f"{where}: top_k is {given}, and there {are(count)}; it must be {up_to(count)}"
        )
    if not given and former > count:
        return count, [f"top_k is {count} instead of {former}: there {are(count)}"]
    return given or former, []


def equal_scores(mode: str, top_k: int, count: int) -> list[str]:
    """A note where added experts get the same scores as all others, and would never be chosen."""
    if mode != "uniform" or top_k >= count:
        return []
    return [
        f"of equal scores the first {top_k} of {count} experts are always chosen: write router: "
        f"{{top_k: {count}}}, or train the routers"
    ]


def train_again(mixture: Model) -> list[str]:
    """A note where routers have learnt and experts join."""
    if not is_trained(mixture.folder):
        return []
    return [
        f"the routers of {mixture.label} were trained, and the rows of added experts are not: train them "
        "again (mergetool train-router)"
    ]


def idle_keys(section: RouterSection | None, with_mode: bool) -> list[str]:
    """The keys given of `router` that say how rows of added experts are made, and nothing about kept ones."""
    given = section.model_fields_set if section else set()
    found = ["mode"] if with_mode else []
    return found + [key for key in ("temperature", "seed") if key in given]


def added_routing(recipe: Recipe, roster: Roster, like: Routing) -> Routing:
    """How routers of the added experts are made, for a mixture that is routed `like` that, its mode "" where
    it does not tell; raises PlanError."""
    given = recipe.sections.router or RouterSection()
    mode = given.mode or recipe.sections.gate_mode or like.mode
    where = recipe.where("router") if recipe.sections.router else recipe.where("experts")
    if not mode:
        raise PlanError(
            f"{where}: router.mode is missing: the mixture does not tell how its routers were made, and the "
            "added experts need rows in them; write router: {mode: ...}"
        )
    if mode in FROM_TEXTS:
        raise PlanError(
            f"{where}: router mode {mode} compares the texts of all experts with one another, and those of "
            "the kept ones are not known; choose hidden, or make the mixture anew"
        )
    if (mode == "arrow") != like.absolute:
        counts = "size" if like.absolute else "sign"
        raise PlanError(
            f"{where}: router mode is {mode}, and this mixture counts scores by their {counts}; "
            + ("it must be arrow" if like.absolute else "choose another")
        )
    seed = random_key(
        given.seed, "after", len(roster.names)
    )  # not the rows of the first experts again
    return Routing(
        mode,
        len(roster.added),
        like.temperature,
        like.per,
        like.normalise,
        seed,
        where,
        like.absolute,
    )
