"""YAML -> Recipe: what the user asked for, checked against the signatures of the methods.

Everything that a recipe alone can get wrong is a RecipeError here, with file and line. Whether models
and recipe fit together is the business of `plan`.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from merge.errors import RecipeError
from merge.methods import REQUIRED, Method, Parameter, all_methods

Value = float | int | bool | str
LATER = ("slices", "modules", "tokenizer", "chat_template", "experts")
OUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Setting:
    """A parameter as the recipe gives it: rules tried in order, (filter or None, gradient points)."""

    rules: tuple[tuple[str | None, tuple[Value, ...]], ...]

    def at(self, tensor: str, depth: float) -> Value | None:
        """The value for `tensor`, `depth` of the way (0 to 1) through the layers; None: no rule fits."""
        for pattern, points in self.rules:
            if pattern is None or pattern == "*" or pattern in tensor:
                return _interpolated(points, depth)
        return None


def _interpolated(points: tuple[Value, ...], depth: float) -> Value:
    if len(points) == 1:
        return points[0]
    place = depth * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    a, b = float(points[left]), float(points[left + 1])
    return a + (b - a) * (place - left)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(Strict):
    model: str = Field(min_length=1)
    parameters: dict[str, Any] = {}


class ScoreSection(Strict):
    suite: str = "quickstart"
    parents: bool = True
    limit: int | None = Field(default=None, ge=1)


class Sections(Strict):
    """The keys of a recipe; unknown ones are errors."""

    merge_method: str
    models: list[ModelEntry] = Field(min_length=1)
    base_model: str | None = Field(default=None, min_length=1)
    parameters: dict[str, Any] = {}
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    out_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    compat: Literal["mergekit"] | None = None
    tokenizer_source: str | None = None
    missing_tensors: Literal["error", "base"] = "error"
    extra_tensors: Literal["error", "drop"] = "error"
    allow_nonfinite: bool = False
    shard_size: str = "5GB"
    output: str | None = Field(default=None, min_length=1)
    name: str | None = None
    score: ScoreSection | None = None

    @field_validator("shard_size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> str:
        if parse_size(str(value)) < 1:
            raise ValueError("must be at least 1 byte")
        return str(value)


@dataclass(frozen=True)
class Recipe:
    """A recipe that is right in itself. `settings[i]` are the parameters of models[i]; `shared` those
    with one value for all models. `lines` finds the line of a key for later errors."""

    file: str
    sections: Sections
    method: Method
    settings: tuple[Mapping[str, Setting], ...]
    shared: Mapping[str, Setting]
    lines: Mapping[tuple[str | int, ...], int]

    @property
    def models(self) -> list[str]:
        return [entry.model for entry in self.sections.models]

    @property
    def out_dtype(self) -> str | None:
        name = self.sections.out_dtype or self.sections.dtype
        return OUT_DTYPES[name] if name else None

    def where_model(self, label: str) -> str:
        """File and line in which a model is named first."""
        if label == self.sections.base_model:
            return self.where("base_model")
        return self.where("models", self.models.index(label), "model")

    def where(self, *path: str | int) -> str:
        return f"{self.file}:{_line(self.lines, path)}"


def load_recipe(file: Path | str) -> Recipe:
    """The recipe in `file`; raises RecipeError `file:line: what, found, allowed`."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: cannot be read as text ({error.reason})") from None
    return parse_recipe(text, str(file))


def parse_recipe(text: str, file: str = "recipe") -> Recipe:
    """As load_recipe, from text."""
    data, lines = _load_yaml(text, file)
    try:
        sections = Sections.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_validation_message(error, file, lines)) from None
    method = _method(sections.merge_method, file, lines)
    _check_bases(sections, method, file, lines)
    reader = _ParameterReader(file, lines, method)
    shared_raw = reader.known(sections.parameters, ("parameters",))
    settings = []
    for i, entry in enumerate(sections.models):
        own = reader.known(entry.parameters, ("models", i, "parameters"))
        settings.append(own)
    return _resolve(sections, method, file, lines, settings, shared_raw)


def _resolve(
    sections: Sections,
    method: Method,
    file: str,
    lines: Mapping[tuple[str | int, ...], int],
    own: Sequence[Mapping[str, Setting]],
    shared: Mapping[str, Setting],
) -> Recipe:
    """Precedence: model, then recipe, then compat, then the method's default."""
    fallback = dict(method.mergekit) if sections.compat == "mergekit" else {}

    def pick(
        parameter: Parameter, sources: Sequence[Mapping[str, Setting]], at: tuple[str | int, ...]
    ) -> Setting:
        rules: list[tuple[str | None, tuple[Value, ...]]] = []
        for source in sources:
            if parameter.name in source:
                rules += source[parameter.name].rules
        default = fallback.get(parameter.name, parameter.default)
        if default is not REQUIRED:
            rules.append((None, (default,)))
        elif not rules:
            what = f"{method.name} needs {parameter.name} ({parameter.allowed})"
            raise RecipeError(f"{file}:{_line(lines, at)}: {what}; give it under parameters")
        return Setting(tuple(rules))

    per_model: list[Mapping[str, Setting]] = []
    common: dict[str, Setting] = {}
    for parameter in method.parameters.values():
        if not parameter.per_model:
            if differing := _first_difference(own, parameter.name):
                what = (
                    f"{method.name}.{parameter.name} holds for all models, but models differ in it"
                )
                at = ("models", differing, "parameters", parameter.name)
                raise RecipeError(
                    f"{file}:{_line(lines, at)}: {what}; give it once, under parameters"
                )
            common[parameter.name] = pick(
                parameter, [_merged(own, parameter.name), shared], ("parameters",)
            )
    for i, settings in enumerate(own):
        if sections.models[i].model == sections.base_model and method.base == "required":
            per_model.append({})  # the base itself has no task vector
            continue
        per_model.append(
            {
                p.name: pick(p, [settings, shared], ("models", i))
                for p in method.parameters.values()
                if p.per_model
            }
        )
    return Recipe(file, sections, method, tuple(per_model), common, lines)


def _merged(own: Sequence[Mapping[str, Setting]], name: str) -> Mapping[str, Setting]:
    """A shared parameter given under a model counts for all."""
    return next(({name: s[name]} for s in own if name in s), {})


def _first_difference(own: Sequence[Mapping[str, Setting]], name: str) -> int | None:
    """The first model whose value of a shared parameter is not that of a model before it."""
    given = [i for i, settings in enumerate(own) if name in settings]
    return next((i for i in given if own[i][name] != own[given[0]][name]), None)


class _ParameterReader:
    """Turns raw parameter tables into settings, each value checked against the method's signature."""

    def __init__(
        self, file: str, lines: Mapping[tuple[str | int, ...], int], method: Method
    ) -> None:
        self._file, self._lines, self._method = file, lines, method

    def known(self, raw: Mapping[str, Any], path: tuple[str | int, ...]) -> dict[str, Setting]:
        return {name: self._setting(name, value, (*path, name)) for name, value in raw.items()}

    def _setting(self, name: str, value: Any, path: tuple[str | int, ...]) -> Setting:
        parameter = self._method.parameters.get(name)
        if parameter is None:
            allowed = list(self._method.parameters)
            raise self._error(
                path,
                f"{self._method.name} has no parameter {name!r}{_nearest(name, allowed)}; it "
                f"has {', '.join(allowed)}",
            )
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            return Setting(tuple(self._rule(parameter, v, (*path, i)) for i, v in enumerate(value)))
        return Setting(((None, self._points(parameter, value, path)),))

    def _rule(
        self, parameter: Parameter, rule: Mapping[str, Any], path: tuple[str | int, ...]
    ) -> tuple[str | None, tuple[Value, ...]]:
        if unknown := [key for key in rule if key not in ("filter", "value")]:
            raise self._error(
                (*path, unknown[0]),
                f"unknown key {unknown[0]!r} in a rule of {parameter.name}; allowed: filter, value",
            )
        pattern = rule.get("filter")
        if "value" not in rule or not isinstance(pattern, str | None):
            raise self._error(
                path,
                f"a rule of {parameter.name} needs a value and, as text, what tensor names it filters",
            )
        return pattern, self._points(parameter, rule["value"], (*path, "value"))

    def _points(
        self, parameter: Parameter, value: Any, path: tuple[str | int, ...]
    ) -> tuple[Value, ...]:
        points = value if isinstance(value, list) else [value]
        if not points or (len(points) > 1 and parameter.kind not in (float, int)):
            raise self._error(
                path,
                f"{self._method.name}.{parameter.name} is {_shown(value)}; it must be {parameter.allowed}",
            )
        for i, point in enumerate(points):
            if problem := _problem(parameter, point):
                here = (*path, i) if isinstance(value, list) else path
                raise self._error(
                    here, f"{self._method.name}.{parameter.name} is {_shown(point)}; it {problem}"
                )
        return tuple(points)

    def _error(self, path: tuple[str | int, ...], message: str) -> RecipeError:
        return RecipeError(f"{self._file}:{_line(self._lines, path)}: {message}")


def _problem(parameter: Parameter, point: Any) -> str | None:
    try:
        return parameter.problem(point)
    except OverflowError:  # a whole number beyond any float
        return f"must be {parameter.range}"


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else _repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python does not print whole numbers of thousands of digits
        return "a huge number"


def _method(name: str, file: str, lines: Mapping[tuple[str | int, ...], int]) -> Method:
    methods = all_methods()
    if name not in methods:
        at = f"{file}:{_line(lines, ('merge_method',))}"
        raise RecipeError(
            f"{at}: no merge_method {name!r}{_nearest(name, list(methods))}; there are {', '.join(methods)}"
        )
    return methods[name]


def _check_bases(
    sections: Sections, method: Method, file: str, lines: Mapping[tuple[str | int, ...], int]
) -> None:
    def fail(message: str, *path: str | int) -> RecipeError:
        return RecipeError(f"{file}:{_line(lines, path)}: {message}")

    names = [entry.model for entry in sections.models]
    if method.base != "donor" and sections.base_model is None:
        raise fail(
            f"{method.name} needs base_model, the model that the others were made from",
            "merge_method",
        )
    others = [n for n in names if n != sections.base_model]
    if method.base == "first" and sections.base_model not in names:
        others = names[:]
    counted = len(names) if method.base == "donor" else len(others) + (method.base == "first")
    low, high = method.models
    if method.base == "required" and not others:
        raise fail(f"{method.name} has no model beside its base; list at least one other", "models")
    if not low <= counted <= high:
        wanted = f"{low}" if low == high else f"{low} to {high}"
        raise fail(
            f"{method.name} takes {wanted} models (its base included), not {counted}"
            if method.base == "first"
            else f"{method.name} takes {wanted} models, not {counted}",
            "models",
        )
    for i, name in enumerate(names):
        if names.index(name) != i and method.base != "donor":
            raise fail(
                f"model {name!r} is listed twice; give it one entry with the summed weight",
                "models",
                i,
            )


# -- YAML with line numbers ------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 in which 1e-3 is a number; PyYAML reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9]+[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
_ALIAS_LIMIT = 100_000  # nodes; a recipe is read by people, an alias bomb is not


def _load_yaml(text: str, file: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    lines: dict[tuple[str | int, ...], int] = {(): 1}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _collect_lines(node, (), lines, file)
        data = loader.construct_document(node) if node is not None else None
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = " ".join((error.problem or "malformed").split())
        raise RecipeError(f"{file}:{mark.line + 1 if mark else 1}: not YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(
            f"{file}:{line}: not YAML: {error.reason} (#x{error.character:04x})"
        ) from None
    except (
        Exception
    ) as error:  # PyYAML meets a wrong !!timestamp with AttributeError, !!bool with KeyError
        raise RecipeError(f"{file}:1: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"{file}:1: a recipe is a table of keys such as merge_method and models, not "
            f"{type(data).__name__}"
        )
    return data, lines


def _collect_lines(
    node: yaml.Node, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int], file: str
) -> None:
    if len(lines) > _ALIAS_LIMIT:
        raise ValueError("too many values")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise RecipeError(
                    f"{file}:{key.start_mark.line + 1}: {key.value!r} is given twice (first in "
                    f"line {lines[here]})"
                )
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _collect_lines(value, (*path, i), lines, file)


def _line(lines: Mapping[tuple[str | int, ...], int], path: Sequence[str | int]) -> int:
    for end in range(len(path), -1, -1):
        if tuple(path[:end]) in lines:
            return lines[tuple(path[:end])]
    return 1


def _validation_message(
    error: ValidationError, file: str, lines: Mapping[tuple[str | int, ...], int]
) -> str:
    found = error.errors()
    first = next(
        (e for e in found if e["type"] == "extra_forbidden"), found[0]
    )  # often the cause of others
    path = first["loc"]
    name = ".".join(str(part) for part in path)
    at = f"{file}:{_line(lines, path)}"
    if first["type"] == "extra_forbidden":
        if path[-1] in LATER and len(path) == 1:
            return (
                f"{at}: {path[-1]} is a key of mergekit that mergetool cannot run yet; list models"
            )
        allowed = list(_fields_at(path[:-1]))
        said = f"{at}: unknown key {str(path[-1])!r}{_nearest(str(path[-1]), allowed)}"
        return f"{said}; allowed: {', '.join(allowed)}"
    if first["type"] == "missing":
        needs = (
            "an entry of models needs model"
            if path[0] == "models"
            else "a recipe needs merge_method and models"
        )
        return f"{at}: {name} is missing; {needs}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{at}: {name} is {_shown(first['input'])}; {reason[0].lower() + reason[1:]}"


def _fields_at(path: Sequence[str | int]) -> Sequence[str]:
    kind: type[Strict] = Sections
    for part in path:
        if part == "models":
            kind = ModelEntry
        elif part == "score":
            kind = ScoreSection
    return list(kind.model_fields)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse_size(text: str) -> int:
    """Bytes of '512MiB', '2 GB' or '4096'; raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*((?:[KMGT]i?)?B?)\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 2GB")
    unit = match[2].upper()
    unit = unit if unit in SIZES else unit + "B"
    size = float(match[1]) * SIZES[unit]
    if not math.isfinite(size):
        raise ValueError(f"{text[:20]}... is larger than any disk")
    return int(size)
