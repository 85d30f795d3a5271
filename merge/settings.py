"""Parameters of a recipe: from what is written to what each method, model and tensor gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.lines import Lines, Path, nearest
from merge.methods import REQUIRED, Method, Parameter
from merge.patterns import fits, pattern_problem
from merge.sections import shown

Value = float | int | bool | str


@dataclass(frozen=True)
class Setting:
    """A parameter as the recipe gives it: rules tried in order, (filter or None, gradient points)."""

    rules: tuple[tuple[str | None, tuple[Value, ...]], ...]

    def at(self, tensor: str, depth: float) -> Value | None:
        """The value for `tensor`, `depth` of the way (0 to 1) through the layers; None: no rule fits."""
        for pattern, points in self.rules:
            if pattern is None or fits(pattern, tensor):
                return _interpolated(points, depth)
        return None


def _interpolated(points: tuple[Value, ...], depth: float) -> Value:
    if len(points) == 1:
        return points[0]
    if isinstance(points[0], bool | str):
        return points[int(depth * (len(points) - 1))]
    place = depth * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    a, b = float(points[left]), float(points[left + 1])
    return a + (b - a) * (place - left)


Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Resolution:
    """Settings with every default filled in: by the model's, the recipe's, compat's, the method's."""

    method: Method
    lines: Lines
    fallback: Mapping[str, Any]

    def shared(self, own: Sequence[Settings], outer: Sequence[Settings], at: Path) -> Settings:
        """Of parameters with one value for all models, which the entry of a model (in the list at `at`)
        may give too; `outer`: the settings around it, the nearest first."""
        found: dict[str, Setting] = {}
        for parameter in self.method.parameters.values():
            if parameter.per_model:
                continue
            name = parameter.name
            if differing := _first_difference(own, name):
                what = f"{self.method.name}.{name} holds for all models, but models differ in it"
                place = (*at, differing, "parameters", name)
                raise self.lines.error(place, f"{what}; give it once, under parameters")
            found[name] = self._first_given(parameter, [*own, *outer], ("parameters",))
        return found

    def of_model(self, sources: Sequence[Settings], at: Path) -> Settings:
        """Of parameters with a value per model, for the model whose entry stands at `at`; `sources`: its
        own settings and those around it, the nearest first."""
        parameters = [p for p in self.method.parameters.values() if p.per_model]
        return {p.name: self._first_given(p, sources, at) for p in parameters}

    def _first_given(self, parameter: Parameter, sources: Sequence[Settings], at: Path) -> Setting:
        """Rules of all sources in order, so that what no filter of one fits falls to the next."""
        given = [s[parameter.name].rules for s in sources if parameter.name in s]
        rules = [rule for source in dict.fromkeys(given) for rule in source]
        default = self.fallback.get(parameter.name, parameter.default)
        if default is not REQUIRED:
            rules.append((None, (default,)))
        elif not rules:
            what = f"{self.method.name} needs {parameter.name} ({parameter.allowed})"
            raise self.lines.error(at, f"{what}; give it under parameters")
        return Setting(tuple(rules))


def _first_difference(own: Sequence[Settings], name: str) -> int | None:
    """The first model whose value of a shared parameter is not that of a model before it."""
    given = [i for i, settings in enumerate(own) if name in settings]
    return next((i for i in given if own[i][name] != own[given[0]][name]), None)


class SettingsReader:
    """Turns raw parameter tables into settings, each value checked against the method's signature."""

    def __init__(self, lines: Lines, method: Method) -> None:
        self._lines, self._method = lines, method

    def read(self, raw: Mapping[str, Any], path: Path) -> Settings:
        """The settings in the table `raw`, which stands at `path`; raises RecipeError."""
        return {name: self._setting(name, value, (*path, name)) for name, value in raw.items()}

    def _setting(self, name: str, value: Any, path: Path) -> Setting:
        parameter = self._method.parameters.get(name)
        if parameter is None:
            allowed = list(self._method.parameters)
            raise self._lines.error(
                path,
                f"{self._method.name} has no parameter {name!r}{nearest(name, allowed)}; it "
                f"has {', '.join(allowed)}",
            )
        if isinstance(value, dict) and "value" in value:
            return Setting((self._rule(parameter, value, path),))
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            return Setting(tuple(self._rule(parameter, v, (*path, i)) for i, v in enumerate(value)))
        return Setting(((None, self._points(parameter, value, path)),))

    def _rule(
        self, parameter: Parameter, rule: Mapping[str, Any], path: Path
    ) -> tuple[str | None, tuple[Value, ...]]:
        if unknown := [key for key in rule if key not in ("filter", "value")]:
            raise self._lines.error(
                (*path, unknown[0]),
                f"unknown key {unknown[0]!r} in a rule of {parameter.name}; allowed: filter, value",
            )
        pattern = rule.get("filter")
        if "value" not in rule or not isinstance(pattern, str | None):
            raise self._lines.error(
                path,
                f"a rule of {parameter.name} needs a value and, as text, what tensor names it filters",
            )
        if pattern is not None and (problem := pattern_problem(pattern)):
            raise self._lines.error(path, f"filter {pattern!r} of {parameter.name} {problem}")
        return pattern, self._points(parameter, rule["value"], (*path, "value"))

    def _points(self, parameter: Parameter, value: Any, path: Path) -> tuple[Value, ...]:
        points = value if isinstance(value, list) else [value]
        if not points:
            raise self._lines.error(
                path,
                f"{self._method.name}.{parameter.name} is {shown(value)}; it must be {parameter.allowed}",
            )
        for i, point in enumerate(points):
            if problem := _problem(parameter, point):
                here = (*path, i) if isinstance(value, list) else path
                raise self._lines.error(
                    here, f"{self._method.name}.{parameter.name} is {shown(point)}; it {problem}"
                )
        return tuple(points)


def _problem(parameter: Parameter, point: Any) -> str | None:
    try:
        return parameter.problem(point)
    except OverflowError:  # a whole number beyond any float
        return f"must be {parameter.range}"
