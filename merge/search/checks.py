"""What is wrong with every candidate of a search: found before anything is written."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from merge.anatomy import layer_tensors, main_stack
from merge.errors import RequestError
from merge.lines import Lines, nearest
from merge.pipeline import budget_of
from merge.printing import counted
from merge.search.front import unknown_tasks
from merge.search.paths import layered, layers_of_each
from merge.search.scoring import Scorer
from merge.search.sections import StudySection
from merge.search.space import Space, ends
from merge.search.starts import baselines_of, start_recipes
from merge.search.tried import digest_of, parents_of
from merge.sources.model import Model

CHECKED = 100  # options whose text is read before a search: paths through layers have thousands


def check_objectives(section: StudySection, scorer: Scorer, lines: Lines) -> None:
    """Raises RecipeError where an objective names a task that is not searched on."""
    known = list(scorer.panels["dev"].metrics)
    for i, task in unknown_tasks(section, known):
        what = f"no task {task!r} is searched on{nearest(task, known)}"
        allowed = f"there are {', '.join(known)}"
        raise lines.error(("study", "objectives", i), f"objectives: {what}; {allowed}")


def check_documents(section: StudySection, space: Space, scorer: Scorer) -> None:
    """Raises RecipeError where baselines use up all the documents that may be scored."""
    sizes = {name: panel.split.count for name, panel in scorer.panels.items()}
    baselines = {digest_of(recipe) for _, recipe in baselines_of(space.data, section)}
    first = len(baselines)
    used = first * sizes["dev"]
    if section.documents is None or section.documents > used:
        return
    if any(digest_of(recipe) not in baselines for _, recipe in start_recipes(section)):
        return  # whatever starts is put to dev: a candidate there will be
    apart = " and ".join(f"{sizes[name]} of {name}" for name in ("val", "test"))
    each = f"{counted(first, 'baseline')}, {counted(sizes['dev'], 'document')} of dev each"
    what = (
        f"study.documents is {section.documents}; it must be more than {used}, which are put to parents and "
        f"average before any candidate: {each} (the {apart} are not counted)"
    )
    raise space.lines.error(("study", "documents"), what)


def check_layers(space: Space, scorer: Scorer) -> None:
    """Raises RecipeError where a path or groups take layers that a model has not."""
    for at, spec in layered(space.data):
        for entry, count in layers_of_each(spec):
            for label, model in opened_of(parents_of({"models": [entry]}), scorer).items():
                stack = main_stack(model.source.tensors, model.config)
                there = len(layer_tensors(model.source.tensors, stack)) if stack else count
                if there < count:
                    place = (*at, "layers")
                    said = f"{'.'.join(map(str, place))} is {spec['layers']}"
                    what = f"{label} has no layer {there}: it has {counted(there, 'layer')}"
                    raise space.lines.error(place, f"{said}; {what}")


def opened_of(labels: Sequence[str], scorer: Scorer) -> dict[str, Model]:
    """Models by label; one that cannot be opened is missing, and will fail as a candidate."""
    for label in labels:
        with suppress(RequestError):
            scorer.plan({"model": label})
    return {label: scorer.opened[label] for label in labels if label in scorer.opened}


def check_plans(space: Space, scorer: Scorer, memory: str, threads: int | None) -> None:
    """Raises what is wrong with all candidates: with the lowest values of everything and with the highest."""
    for origin, recipe in start_recipes(scorer.section):
        try:
            scorer.plan(recipe)
        except RequestError as error:
            told = re.sub(rf"^{re.escape(str(scorer.file))}(:\d+)?: ", "", str(error))
            place = ("study", "start", int(origin.split()[-1]) - 1)
            raise space.lines.error(place, f"study, {origin}: {told}") from None
    _check_options(space, scorer)
    first: RequestError | None = None
    for end in (0, 1):
        try:
            recipe = space.filled(lambda dimension, end=end: ends(dimension)[end])  # type: ignore[misc]
            if not _has_no_layer(recipe):
                budget_of(scorer.plan(recipe), memory, threads)
                return
        except RequestError as error:
            first = first or error
    if first:
        raise first


def notes_on_candidates(space: Space, scorer: Scorer) -> tuple[str, ...]:
    """What a plan tells of the candidate with the lowest values of everything, such as filters that fit no
    tensor; nothing where that cannot be planned."""
    with suppress(RequestError):
        recipe = space.filled(lambda dimension: ends(dimension)[0])
        return () if _has_no_layer(recipe) else scorer.plan(recipe).notes
    return ()


def _check_options(space: Space, scorer: Scorer) -> None:
    """Raises what the text of an option has wrong, which would otherwise be found when it is drawn."""
    both = zip(space.with_each_option(0), space.with_each_option(1), strict=True)
    for recipes in islice(both, CHECKED):
        wrong: list[RequestError] = []
        for recipe in recipes:
            if _has_no_layer(recipe):
                continue
            try:
                scorer.parsed(recipe)
            except RequestError as error:
                wrong.append(error)
        if len(wrong) == len(recipes):
            raise wrong[0]


def _has_no_layer(recipe: Mapping[str, Any]) -> bool:
    """Whether it is a path of which nothing was drawn."""
    return recipe.get("slices") == []
