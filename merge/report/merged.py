"""The plan that a report on a merge is about: of a recipe, or of a merged model as its provenance tells."""

from pathlib import Path
from typing import Any

import yaml

from merge.budget import threads_and_cap
from merge.errors import RequestError
from merge.output import Progress, adapter_inputs
from merge.plan import Plan
from merge.recipe import parse_recipe
from merge.verify import PROVENANCE, provenance_of


def planned(what: str, memory: str, offline: bool) -> Plan:
    """The plan of a recipe, or of the recipe that a merged model was made by; raises RequestError."""
    from merge.cli import find_recipe
    from merge.pipeline import plan_recipe

    if Path(what).is_dir():
        plan = _of_merged(Path(what), memory, offline)
    else:
        plan = plan_recipe(find_recipe(what), memory=memory, offline=offline)
    if plan.recipe.mixes:
        raise RequestError(
            f"{what}: is a mixture, whose experts are not merged; report needs a merge"
        )
    return plan


def _of_merged(folder: Path, memory: str, offline: bool) -> Plan:
    from merge.pipeline import plan_parsed

    known = provenance_of(folder)
    if known is None:
        raise RequestError(
            f"{folder}: has neither study.db nor {PROVENANCE}; give a study, a recipe or a merged model"
        )
    documents = known.get("recipe")
    if not isinstance(documents, list):
        raise RequestError(
            f"{folder / PROVENANCE}: damaged, it tells no recipe; give the recipe instead"
        )
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
    try:
        # models in it stand beside the merged one
        recipe = parse_recipe(text, str(folder.absolute()))
        return plan_parsed(recipe, memory=memory, offline=offline)
    except RequestError as error:
        what = "its models are not found as they are called there; give the recipe instead"
        raise RequestError(f"{folder / PROVENANCE}: {what} ({error})") from None


def check_models(
    plan: Plan, folder: Path, memory: str, threads: int | None, progress: Progress
) -> None:
    """Raises RequestError unless the models of a merged model's plan hold what it was merged of, by the
    digests of all that was read. Who only finds other models under the old names would compare these."""
    told = (provenance_of(folder) or {}).get("inputs")
    then = (
        [_read(each) for each in told if isinstance(each, dict)] if isinstance(told, list) else []
    )
    now = adapter_inputs(plan, threads_and_cap(memory, threads)[0], progress)
    changed = [
        entry["model"]
        for model, entry in zip(plan.models, now, strict=True)
        if not model.computed and _read(entry) not in then
    ]
    if changed:
        raise RequestError(
            f"{folder / PROVENANCE}: was merged of other tensors than {', '.join(changed)} now has; put "
            "those back, or give the recipe to compare what is there"
        )


def _read(entry: dict[str, Any]) -> list[Any]:
    """Which tensors were read of a model; a commit may be another and they the same."""
    return [entry.get(key) for key in ("model", "tensors", "digest")]
