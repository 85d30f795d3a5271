"""What of a recipe may vary, and the plain recipe that a value of each gives.

A recipe with one of these in the place of values is a space; whoever fills it decides for each as it is met:

    {search: [0.1, 0.9]}     a number; `log: true`, `int: true`; `points: 3` makes a gradient of three
    {choice: [A, B]}         one of them, of any kind; they may vary in themselves; `probabilities: [1, 3]`
    models: {pool: [A, B, C], pick: 2, parameters: {...}}     so many different models of the pool;
                             `base: first` makes the first one base_model, where nothing else is
    slices: {path: ...}      layers of several models, one after another (paths.py)
    slices: {groups: ...}    layers in groups, each with values of its own (paths.py)
    variants: [{merge_method: ..., parameters: ...}, ...]     one of these goes into the recipe; with
                             `probability: 0.4` in each, a random search draws some more often than others
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from merge.errors import RecipeError
from merge.lines import Lines
from merge.lines import Path as Place
from merge.search import paths
from merge.search.forms import Numbers, Wrong, are_shares, check_keys, numbers_in, pool_in

DIGITS = 6  # significant ones of a number that is drawn: a candidate is a recipe that people read
WAYS = ("search", "choice", "pool")
# of a place in a pool: which model is asked for; which, where that is taken
PICKED, LEFT = "model", "other"


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
    """One of `count` things, by its number. `labels`: what they are, for people. `shares`: how often a
    random search draws each, of any sum; none: all as often."""

    name: str
    labels: tuple[str, ...]
    shares: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        return len(self.labels)

    def at(self, place: float) -> int:
        """The number of the thing at a place in [0, 1], where each takes up its share."""
        ends = list(accumulate(self.shares))
        return next((i for i, end in enumerate(ends) if place * ends[-1] < end), self.count - 1)

    def middle(self, number: int) -> float:
        """A place of that thing."""
        ends = [0.0, *accumulate(self.shares)]
        return (ends[number] + ends[number + 1]) / 2 / ends[-1]


Dimension = Real | Whole | Choice
Ask = Callable[[Dimension], float]  # a value of the dimension; of a choice its number


def ends(dimension: Dimension) -> tuple[float, float]:
    """The lowest and the highest value."""
    if isinstance(dimension, Choice):
        return 0, dimension.count - 1
    return dimension.low, dimension.high


@dataclass(frozen=True)
class Space:
    """A document whose values may vary."""

    data: Mapping[str, Any]
    lines: Lines

    def filled(self, ask: Ask) -> dict[str, Any]:
        """The plain recipe that the answers give, each dimension asked for once; raises RecipeError."""
        return _Filler(self.lines, ask).recipe(self.data)

    def models_picked(self, answers: Mapping[str, float]) -> dict[str, str]:
        """The model in every place of a pool that these answers give, by the dimension that asks first:
        another one than was asked for, where that was taken. Raises KeyError where an answer is missing."""
        filler = _Filler(self.lines, lambda dimension: answers[dimension.name])
        filler.recipe(self.data)
        return filler.picked

    def dimensions(self) -> list[Dimension]:
        """Every dimension that may be asked for, once, in the order of the document."""
        found: dict[str, Dimension] = {}
        for _ in self._walked(found, 0):
            pass
        return list(found.values())

    def with_each_option(self, end: int) -> Iterator[dict[str, Any]]:
        """Plain recipes, in which each option of each choice is at least once; numbers at their lowest
        (end 0) or highest (1)."""
        return self._walked({}, end)

    def _walked(self, found: dict[str, Dimension], end: int) -> Iterator[dict[str, Any]]:
        """The same; what is asked for on the way is put into `found`."""
        pending: list[dict[str, int]] = [{}]
        while pending:  # once for each option of each choice, those within the options too
            fixed = pending.pop()

            def ask(dimension: Dimension, fixed: dict[str, int] = fixed) -> float:
                new = dimension.name not in found
                found.setdefault(dimension.name, dimension)
                if not isinstance(dimension, Choice):
                    return ends(dimension)[end]
                if new:
                    pending.extend({**fixed, dimension.name: i} for i in range(1, dimension.count))
                return fixed.get(dimension.name, 0)

            yield self.filled(ask)


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
    if at[-1] == "slices" and (way := next((key for key in paths.LAYERED if key in value), None)):
        return way
    return next((key for key in WAYS if key in value and not isinstance(value[key], dict)), None)


class _Filler:
    """Walks a document and puts an answer in the place of everything that may vary."""

    def __init__(self, lines: Lines, ask: Ask) -> None:
        self._lines, self._ask = lines, ask
        self.base: str | None = None
        self.picked: dict[str, str] = {}

    def recipe(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """All of it, filled in."""
        data = dict(document)
        variants = data.pop("variants", None)
        found = cast(dict[str, Any], self.value(data, ()))
        if variants is not None:
            found = _joined(found, self.variant(variants))
        return ({"base_model": self.base} if self.base else {}) | found

    def value(self, value: Any, at: Place) -> Any:
        if isinstance(value, list):
            return [self.value(each, (*at, i)) for i, each in enumerate(value)]
        if not isinstance(value, dict):
            return value
        way = _way(value, at)
        if way == "search":
            return self._number(value, at)
        if way == "choice":
            check_keys(value, ("choice", "probabilities"), self._wrong(at))
            return self.one_of(value["choice"], at, value.get("probabilities"))
        if way == "pool":
            return self._models(value, at)
        if way == "path":
            return self._path(value, at)
        if way == "groups":
            return self._groups(value, at)
        return {key: self.value(each, (*at, str(key))) for key, each in value.items()}

    def one_of(self, options: Any, at: Place, shares: Any = None) -> Any:
        """The chosen one of `options`, filled in itself."""
        if not isinstance(options, list) or not options:
            raise self._error(at, "it must be a list of what to choose from")
        labels = tuple(_label(option) for option in options)
        if shares is not None and not are_shares(shares, len(options)):
            what = f"probabilities must be {len(options)} numbers above 0, one for each"
            raise self._error(at, what)
        chosen = int(self._ask(Choice(_name(at), labels, tuple(shares or ()))))
        return self.value(options[chosen], (*at, chosen))

    def variant(self, variants: Any) -> dict[str, Any]:
        """The chosen part of a recipe, filled in."""
        at: Place = ("variants",)
        parts = variants if isinstance(variants, list) else []
        if not parts or not all(isinstance(part, dict) for part in parts):
            raise self._lines.error(at, "variants must be a list of parts of a recipe")
        shares = [part["probability"] for part in parts if "probability" in part]
        if shares and not are_shares(shares, len(parts)):
            raise self._error(at, "probability must be a number above 0, in each or in none")
        plain = [{k: v for k, v in part.items() if k != "probability"} for part in parts]
        return cast(dict[str, Any], self.one_of(plain, at, shares or None))

    def _number(self, value: Mapping[str, Any], at: Place) -> Any:
        spec, name = numbers_in(value, self._wrong(at)), _name(at)
        if spec.points is None:
            return self._drawn(name, spec)
        return [self._drawn(f"{name}.{i}", spec) for i in range(spec.points)]

    def _drawn(self, name: str, spec: Numbers) -> float:
        if spec.whole:
            return int(self._ask(Whole(name, int(spec.low), int(spec.high), spec.log)))
        drawn = self._ask(Real(name, spec.low, spec.high, spec.log))
        return min(max(float(f"{drawn:.{DIGITS}g}"), spec.low), spec.high)

    def _models(self, value: Mapping[str, Any], at: Place) -> list[dict[str, Any]]:
        """So many different models of a pool."""
        spec = pool_in(value, self._wrong(at))
        found: list[dict[str, Any]] = []
        for i in range(spec.pick):
            taken = [entry["model"] for entry in found]
            place = f"{_name(at)}.{i}"
            entry: dict[str, Any] = {"model": self._another(spec.models, taken, place)}
            self.picked[f"{place}.{PICKED}"] = entry["model"]
            if "parameters" in value:
                entry["parameters"] = self.value(value["parameters"], (*at, i, "parameters"))
            found.append(entry)
        if spec.leads:
            self.base = found[0]["model"]
        return found

    def _another(self, pool: Sequence[str], taken: Sequence[str], name: str) -> str:
        """A model of the pool; where that is taken already, one of the others, each as likely."""
        asked = pool[int(self._ask(Choice(f"{name}.{PICKED}", tuple(pool))))]
        left = tuple(model for model in pool if model not in taken)
        if asked in left or len(left) == 1:
            return asked if asked in left else left[0]
        return left[int(self._ask(Choice(f"{name}.{LEFT}", left)))]

    def _path(self, value: Mapping[str, Any], at: Place) -> list[dict[str, Any]]:
        spec = self._layered(value, (*at, "path"), ("block", "repeats", "places"))
        name = _name((*at, "path"))
        return paths.path(
            spec, lambda place, labels: int(self._ask(Choice(f"{name}.{place}", labels)))
        )

    def _groups(self, value: Mapping[str, Any], at: Place) -> list[Any]:
        """Slices of so many layers each, from the first to the last; each is filled in for itself."""
        spec = self._layered(value, (*at, "groups"), ("block", "base_model", "parameters"))
        return [self.value(piece, (*at, i)) for i, piece in enumerate(paths.groups(spec))]

    def _layered(
        self, value: Mapping[str, Any], at: Place, more: tuple[str, ...]
    ) -> Mapping[str, Any]:
        """How layers are taken, which stands at `at` of a document and nothing else in its table."""
        way, known = str(at[-1]), ("models", "layers", *more)
        check_keys(value, (way,), self._wrong(at[:-1]))
        spec = value[way]
        if not isinstance(spec, dict):
            raise self._error(at, f"it must be a table of {', '.join(known)}")
        check_keys(spec, known, self._wrong(at))
        paths.check(spec, self._wrong(at), alike=way == "groups")
        return spec

    def _wrong(self, at: Place) -> Wrong:
        """Makes the error about a key of the table at a place, or ("") about all of it."""
        return lambda key, what: self._error((*at, key) if key else at, what)

    def _error(self, at: Place, what: str) -> RecipeError:
        return self._lines.error(at, f"{_name(at)}: {what}")


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
    """How an option is shown: a table by its method or model, where it names one."""
    name = (option.get("merge_method") or option.get("model")) if isinstance(option, dict) else None
    text = name if isinstance(name, str) else str(option)
    return text if len(text) <= 60 else f"{text[:57]}..."
