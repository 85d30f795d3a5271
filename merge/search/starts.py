"""What a search begins with beside parents and their average: values of what varies, or whole recipes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge.errors import RecipeError, RequestError
from merge.lines import Lines, load_documents, nearest
from merge.search.places import moved
from merge.search.sections import StudySection
from merge.search.space import Choice, Dimension, Real, Space, ends, varying
from merge.search.tried import ABOUT_FILES, baselines
from merge.shipped import shipped_recipes

START = "start"  # the origin of a candidate whose recipe was given, with its number from 1
OF_NO_RECIPE = ("study", "adapter", "score", "output")  # keys that a recipe loses when it is tried


def is_searched(origin: str) -> bool:
    """Whether a candidate of that origin may win and counts as tried: it is no parent and no average."""
    return origin == "search" or origin.startswith(f"{START} ")


def baselines_of(
    data: Mapping[str, Any], section: StudySection
) -> list[tuple[str, dict[str, Any]]]:
    """(origin, recipe) of each parent, of recipes that the search begins with too, and of the average; none
    where the study wants none."""
    starts = [recipe for _, recipe in start_recipes(section)]
    return list(baselines(data, starts)) if section.baselines else []


def with_recipes(section: StudySection, file: Path, lines: Lines) -> StudySection:
    """The section with the recipes of the files that it names in their places, as they would be written in
    `file`; raises RequestError."""
    found = [
        _recipe_in(entry, file, lines, i) if isinstance(entry, str) else entry
        for i, entry in enumerate(section.start)
    ]
    return section.model_copy(update={"start": found})


def with_values(section: StudySection, space: Space) -> StudySection:
    """The section with the values of every start that is a recipe which the space gives for them: those an
    optimiser learns from, as from its own."""
    placed = {i: _values_in(recipe, space) for i, recipe in _recipes(section)}
    found = [placed.get(i) or entry for i, entry in enumerate(section.start)]
    return section.model_copy(update={"start": found})


def start_values(section: StudySection) -> list[dict[str, float]]:
    """Values by dimension, of each start that is no recipe."""
    return [entry for entry in section.start if isinstance(entry, dict) and not _is_recipe(entry)]


def start_recipes(section: StudySection) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, recipe) of each start that is one."""
    for i, entry in _recipes(section):
        yield f"{START} {i + 1}", {k: v for k, v in entry.items() if k not in OF_NO_RECIPE}


def _recipes(section: StudySection) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each start that is one, with its place."""
    for i, entry in enumerate(section.start):
        if isinstance(entry, dict) and _is_recipe(entry):
            yield i, entry


def check_starts(section: StudySection, dimensions: Mapping[str, Dimension], lines: Lines) -> None:
    """Raises RecipeError where a value is of nothing that varies, or out of its range, or a recipe varies."""
    for i, entry in enumerate(section.start):
        if isinstance(entry, dict) and not _is_recipe(entry):
            _check_values(entry, dimensions, lines, i)
        elif (inside := varying(entry)) is not None:
            at = ".".join(map(str, inside))
            what = f"start: {at} may vary; what a search begins with is a plain recipe"
            raise lines.error(("study", "start", i), what)


def _values_in(entry: Mapping[str, Any], space: Space) -> dict[str, float] | None:
    """The answers to which the space gives this recipe; None where there are none."""
    recipe = _tried(entry)
    found: dict[str, float] = {}

    def answer(dimension: Dimension) -> float:
        found[dimension.name] = _value_at(dimension, recipe)
        return found[dimension.name]

    try:
        same = _tried(space.filled(answer)) == recipe
    except (RecipeError, LookupError, TypeError, ValueError):  # it is of another form
        return None
    return found if same else None


def _tried(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what has no effect on the model that it makes."""
    return {k: v for k, v in recipe.items() if k not in (*OF_NO_RECIPE, *ABOUT_FILES)}


def _value_at(dimension: Dimension, recipe: Any) -> float:
    """What a recipe has in the place of a dimension; raises LookupError, TypeError or ValueError."""
    for part in dimension.name.split("."):
        recipe = recipe[int(part) if isinstance(recipe, list) else part]
    value = dimension.labels.index(str(recipe)) if isinstance(dimension, Choice) else float(recipe)
    low, high = ends(dimension)
    if not low <= value <= high:
        raise ValueError
    return value


def _is_recipe(entry: Mapping[str, Any]) -> bool:
    """Whether a table is a recipe; values by dimension are numbers and nothing else."""
    numbers = (isinstance(v, int | float) and not isinstance(v, bool) for v in entry.values())
    return not all(numbers)


def _recipe_in(name: str, file: Path, lines: Lines, i: int) -> dict[str, Any]:
    known = shipped_recipes()
    places = (Path(name), file.parent / name, *([known[name]] if name in known else []))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        what = f"start: no file {name!r} with a recipe, and no shipped one of that name"
        raise lines.error(("study", "start", i), f"{what}{nearest(name, list(known), 0.8)}")
    try:
        documents = load_documents(found.read_text(encoding="utf-8"), str(found))
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"{found}: cannot be read as text") from None
    if len(documents) > 1:
        raise RequestError(f"{found}: has several documents; a candidate is one")
    return moved(documents[0][0], found.parent, [file.parent, Path()])


def _check_values(
    values: Mapping[str, float], dimensions: Mapping[str, Dimension], lines: Lines, i: int
) -> None:
    for name, value in values.items():
        at = ("study", "start", i, name)
        if name not in dimensions:
            raise lines.error(
                at, f"start: nothing is called {name!r}; there is {', '.join(dimensions)}"
            )
        low, high = ends(dimensions[name])
        if not low <= value <= high:
            raise lines.error(at, f"start: {name} is {value}; it must be from {low} to {high}")
        if not isinstance(dimensions[name], Real) and not float(value).is_integer():
            raise lines.error(at, f"start: {name} is {value}; it must be a whole number")
