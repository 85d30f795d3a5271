"""How tokens find their experts: the recipe's words, with all defaults filled in."""

from collections.abc import Sequence
from pathlib import Path

from merge.errors import PlanError
from merge.experts.assembly import Expert, Routing
from merge.experts.sections import FROM_PROMPTS, FROM_TEXTS, RouterSection
from merge.experts.texts import text_files, texts_digest, texts_of
from merge.recipe import Recipe

OF_ALL = ("uniform", "weights")  # modes that give every expert its share unless top_k says less


def routing_of(recipe: Recipe, experts: Sequence[Expert], format: str) -> Routing:
    """`router` and mergekit's keys, for a mixture of that format; raises PlanError where they cannot be."""
    sections, count = recipe.sections, len(experts)
    given = sections.router or RouterSection()
    for ours, key in (("mode", "gate_mode"), ("top_k", "experts_per_token")):
        if getattr(given, ours) is not None and getattr(sections, key) is not None:
            raise PlanError(
                f"{recipe.where(key)}: {key} and router.{ours} are both given; keep one"
            )
    mode = default_mode(recipe, format)
    where = recipe.where("router" if sections.router else "gate_mode")
    weights = _shares(mode, given.weights, count, where)
    top_k = (
        given.top_k or sections.experts_per_token or (count if mode in OF_ALL else min(2, count))
    )
    if top_k > count:
        raise PlanError(
            f"{where}: top_k is {top_k}, and there {are(count)}; it must be {up_to(count)}"
        )
    check_examples(mode, experts)
    return Routing(
        mode, top_k, given.temperature, given.per or "module", given.normalise, given.seed, where,
        absolute=mode == "arrow", weights=weights,
    )  # fmt: skip


def default_mode(recipe: Recipe, format: str = "") -> str:
    """The router mode of a recipe for a mixture of that format, "" for one that is only changed."""
    sections = recipe.sections
    given = sections.router or RouterSection()
    format = format or sections.format or _format(recipe)
    default = "weights" if given.weights else "hidden" if format == "dense" else "arrow"
    return given.mode or sections.gate_mode or ("" if sections.mixture else default)


def _format(recipe: Recipe) -> str:
    listed = recipe.sections.experts
    return "routed" if listed and listed[0].adapter else "dense"


def _shares(
    mode: str, weights: Sequence[float] | None, count: int, where: str
) -> tuple[float, ...] | None:
    if (mode == "weights") != (weights is not None):
        raise PlanError(f"{where}: fixed weights are mode: weights and weights: [{count} numbers]")
    if weights is not None and (len(weights) != count or min(weights) < 0 or not sum(weights)):
        raise PlanError(
            f"{where}: weights are {list(weights)}; {count} shares are needed, from 0, not all 0"
        )
    return None if weights is None else tuple(weights)


def are(count: int) -> str:
    return "is 1 expert" if count == 1 else f"are {count} experts"


def up_to(count: int) -> str:
    return "1" if count == 1 else f"1 to {count}"


def check_examples(mode: str, experts: Sequence[Expert]) -> None:
    """Raises PlanError for an expert without the prompts or texts that a router mode reads."""
    for expert in experts:
        lacking = mode in FROM_PROMPTS and not expert.entry.positive_prompts
        if lacking or (mode in FROM_TEXTS and not expert.entry.texts):
            key = "positive_prompts" if lacking else "texts"
            raise PlanError(
                f"{expert.place}: {key} is missing, which router mode {mode} reads; add it, or choose "
                "another mode (router: {mode: ...})"
            )


def example_digests(recipe: Recipe) -> dict[Path, str]:
    """The files of all experts' example texts, each with the digest of what it says; raises PlanError."""
    found: dict[Path, str] = {}
    for i, entry in enumerate(recipe.sections.experts or ()):
        try:
            for file in example_files(recipe, entry.texts):
                found[file] = found.get(file) or _digest_of(file)
        except PlanError as error:
            raise PlanError(f"{recipe.where('experts', i)}: texts: {error}") from None
    return found


def _digest_of(file: Path) -> str:
    texts = list(texts_of(file))
    if not texts:
        raise PlanError(f"{file} holds none; a file has one a line")
    return texts_digest(texts)


def example_files(recipe: Recipe, names: Sequence[str]) -> list[Path]:
    """The files of example texts, beside the recipe or from the current folder; raises PlanError."""
    beside = [Path(recipe.file).parent / name for name in names]
    return text_files(
        [f if f.exists() else Path(name) for f, name in zip(beside, names, strict=True)]
    )
