"""What of a recipe may vary, and the plain recipe that a value of each gives.

A recipe with one of these in the place of values is a space; whoever fills it decides for each as it is met:

    {search: [0.1, 0.9]}     a number; `log: true`, `int: true`; `points: 3` makes a gradient of three
    {choice: [A, B]}         one of them, of any kind; they may vary in themselves
    models: {pool: [A, B, C], pick: 2, parameters: {...}}     so many different models of the pool;
                             `base: first` makes the first one base_model, where nothing else is
    slices: {path: {models: [A, B], layers: 24, repeats: 1}}  layers of models in turn, each there or not
    variants: [{merge_method: ..., parameters: ...}, ...]     one of these goes into the recipe
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

from merge.errors import RecipeError
from merge.lines import Lines
from merge.lines import Path as Place

DIGITS = 6  # significant ones of a number that is drawn: a candidate is a recipe that people read
WAYS = ("search", "choice", "pool")


@dataclass(frozen=True)
class Real:
    """A number in [low, high]; `log`: drawn evenly in its logarithm."""

    name: str
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Whole:
    """A whole number from low to high, both included."""

    name: str
    low: int
    high: int
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """One of `count` things, by its number. `labels`: what they are, for people."""

    name: str
    labels: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.labels)


Dimension = Real | Whole | Choice
Ask = Callable[[Dimension], float]  # a value of the dimension; of a choice its number


@dataclass(frozen=True)
class Space:
    """A document whose values may vary."""

    data: Mapping[str, Any]
    lines: Lines

    def filled(self, ask: Ask) -> dict[str, Any]:
        """The plain recipe that the answers give, each dimension asked for once; raises RecipeError."""
        data, filler = dict(self.data), _Filler(self.lines, ask)
        variants = data.pop("variants", None)
        found = cast(dict[str, Any], filler.value(data, ()))
        if variants is not None:
            chosen = filler.one_of(variants, ("variants",))
            if not isinstance(chosen, dict):
                what = "variants must be a list of parts of a recipe"
                raise self.lines.error(("variants",), what)
            found = _joined(found, chosen)
        return ({"base_model": filler.base} if filler.base else {}) | found

    def dimensions(self) -> list[Dimension]:
        """Every dimension that may be asked for, once, in the order of the document."""
        found: dict[str, Dimension] = {}
        pending: list[dict[str, int]] = [{}]
        while pending:  # once for each option of each choice, those within the options too
            fixed = pending.pop()

            def ask(dimension: Dimension, fixed: dict[str, int] = fixed) -> float:
                new = dimension.name not in found
                found.setdefault(dimension.name, dimension)
                if not isinstance(dimension, Choice):
                    return dimension.low
                if new:
                    pending.extend({**fixed, dimension.name: i} for i in range(1, dimension.count))
                return fixed.get(dimension.name, 0)

            self.filled(ask)
        return list(found.values())


def varying(value: Any, at: Place = ()) -> Place | None:
    """Where the first thing in a document stands that may vary; None where nothing may."""
    if isinstance(value, dict):
        if not at and "variants" in value:
            return ("variants",)
        if _way(value, at):
            return at
        inside = [varying(each, (*at, str(key))) for key, each in value.items()]
    elif isinstance(value, list):
        inside = [varying(each, (*at, i)) for i, each in enumerate(value)]
    else:
        return None
    return next(filter(None, inside), None)


def _way(value: Mapping[str, Any], at: Place) -> str | None:
    """In which way a table stands for what may vary; tokens or modules may have the same names."""
    if not at:
        return None
    if at[-1] == "slices" and isinstance(value.get("path"), dict):
        return "path"
    return next((key for key in WAYS if key in value and not isinstance(value[key], dict)), None)


class _Filler:
    """Walks a document and puts an answer in the place of everything that may vary."""

    def __init__(self, lines: Lines, ask: Ask) -> None:
        self._lines, self._ask = lines, ask
        self.base: str | None = None

    def value(self, value: Any, at: Place) -> Any:
        if isinstance(value, list):
            return [self.value(each, (*at, i)) for i, each in enumerate(value)]
        if not isinstance(value, dict):
            return value
        way = _way(value, at)
        if way == "search":
            return self._number(value, at)
        if way == "choice":
            self._check_keys(value, at, ("choice",))
            return self.one_of(value["choice"], at)
        if way == "pool":
            return self._models(value, at)
        if way == "path":
            return self._slices(value["path"], (*at, "path"))
        return {key: self.value(each, (*at, str(key))) for key, each in value.items()}

    def one_of(self, options: Any, at: Place) -> Any:
        """The chosen one of `options`, filled in itself."""
        if not isinstance(options, list) or not options:
            raise self._error(at, "it must be a list of what to choose from")
        labels = tuple(_label(option) for option in options)
        chosen = int(self._ask(Choice(_name(at), labels)))
        return self.value(options[chosen], (*at, chosen))

    def _number(self, spec: Mapping[str, Any], at: Place) -> Any:
        self._check_keys(spec, at, ("search", "log", "int", "points"))
        low, high = self._bounds(spec["search"], at, log=bool(spec.get("log")))
        points = spec.get("points")
        if points is None:
            return self._drawn(_name(at), low, high, spec)
        if type(points) is not int or points < 2:
            raise self._error((*at, "points"), "points must be a whole number from 2")
        return [self._drawn(f"{_name(at)}.{i}", low, high, spec) for i in range(points)]

    def _bounds(self, value: Any, at: Place, *, log: bool) -> tuple[float, float]:
        found = value if isinstance(value, list) else []
        numbers = [n for n in found if isinstance(n, int | float) and not isinstance(n, bool)]
        if len(found) != 2 or len(numbers) != 2:
            raise self._error(at, "search must be two numbers, [lowest, highest]")
        low, high = numbers
        if not low < high:
            raise self._error(
                at, f"search is {value}; the first number must be less than the second"
            )
        if log and low <= 0:
            raise self._error(at, f"search is {value}; with log both must be above 0")
        return low, high

    def _drawn(self, name: str, low: float, high: float, spec: Mapping[str, Any]) -> float:
        log = bool(spec.get("log"))
        if spec.get("int"):
            return int(self._ask(Whole(name, int(low), int(high), log)))
        drawn = self._ask(Real(name, low, high, log))
        return min(max(float(f"{drawn:.{DIGITS}g}"), low), high)

    def _models(self, spec: Mapping[str, Any], at: Place) -> list[dict[str, Any]]:
        """So many different models of a pool: one that is taken already gives way to the next."""
        self._check_keys(spec, at, ("pool", "pick", "base", "parameters"))
        pool, pick = spec["pool"], spec.get("pick", 2)
        if not isinstance(pool, list) or not all(isinstance(name, str) for name in pool):
            raise self._error((*at, "pool"), "pool must be a list of models")
        if type(pick) is not int or not 1 <= pick <= len(pool):
            raise self._error((*at, "pick"), f"pick must be a whole number from 1 to {len(pool)}")
        if spec.get("base", "first") != "first":
            raise self._error((*at, "base"), "base must be first, or left out")
        left, found = list(pool), []
        for i in range(pick):
            asked = pool[int(self._ask(Choice(f"{_name(at)}.{i}.model", tuple(pool))))]
            ahead = [*pool[pool.index(asked) :], *pool]
            model = next(name for name in ahead if name in left)
            left.remove(model)
            entry: dict[str, Any] = {"model": model}
            if "parameters" in spec:
                entry["parameters"] = self.value(spec["parameters"], (*at, i, "parameters"))
            found.append(entry)
        if "base" in spec:
            self.base = found[0]["model"]
        return found

    def _slices(self, spec: Mapping[str, Any], at: Place) -> list[dict[str, Any]]:
        """Every layer of every model in turn, `repeats` times, each there or not (arXiv:2403.13187)."""
        self._check_keys(spec, at, ("models", "layers", "repeats"))
        models, layers, repeats = spec.get("models"), spec.get("layers"), spec.get("repeats", 1)
        if not isinstance(models, list) or not models:
            raise self._error((*at, "models"), "models must be a list of models")
        for key, count in (("layers", layers), ("repeats", repeats)):
            if type(count) is not int or count < 1:
                raise self._error((*at, key), f"{key} must be a whole number from 1")
        assert isinstance(layers, int)
        chosen = [
            (model, layer)
            for r in range(repeats)
            for model in models
            for layer in range(layers)
            if self._ask(Choice(f"{_name(at)}.{r}.{model}.{layer}", ("without", "with")))
        ]
        return [
            {"sources": [{"model": model, "layer_range": [first, end]}]}
            for model, first, end in _stretches(chosen)
        ]

    def _check_keys(self, spec: Mapping[str, Any], at: Place, known: tuple[str, ...]) -> None:
        for key in spec:
            if key not in known:
                raise self._error(
                    (*at, str(key)), f"unknown key {key!r}; allowed: {', '.join(known)}"
                )

    def _error(self, at: Place, what: str) -> RecipeError:
        return self._lines.error(at, f"{_name(at)}: {what}")


def _stretches(layers: list[tuple[str, int]]) -> Iterator[tuple[str, int, int]]:
    """(model, first, end) of layers of one model that follow one another."""
    numbered = [(model, layer, layer - i) for i, (model, layer) in enumerate(layers)]
    for (model, _), run in groupby(numbered, key=lambda each: (each[0], each[2])):
        stretch = [layer for _, layer, _ in run]
        yield model, stretch[0], stretch[-1] + 1


def _joined(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables as one; where both have a key, tables are joined and anything else is `over`'s."""
    found = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _joined(found[key], value) if both else value
    return found


def _name(at: Place) -> str:
    return ".".join(map(str, at))


def _label(option: Any) -> str:
    text = str(option)
    return text if len(text) <= 60 else f"{text[:57]}..."
