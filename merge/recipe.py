"""YAML -> Recipe: what the user asked for, checked against the signatures of the methods.

Everything that a recipe alone can get wrong is a RecipeError here, with file and line. Whether models
and recipe fit together is the business of `plan`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from merge.errors import RecipeError
from merge.lines import Lines, load_yaml, nearest
from merge.methods import Method, all_methods
from merge.settings import Resolution, Settings, SettingsReader, shown

WORDS = {
    "model_type": "it must be a table of keys",
    "dict_type": "it must be a table of keys",
    "list_type": "it must be a list",
    "too_short": "it must have at least one entry",
    "string_type": "it must be text",
    "bool_type": "it must be true or false",
}  # pydantic's speak of Python
LATER = ("slices", "modules", "tokenizer", "chat_template", "experts")
OUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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

    sections: Sections
    method: Method
    settings: tuple[Settings, ...]
    shared: Settings
    lines: Lines

    @property
    def task_vectors(self) -> bool:
        """Whether the models are taken as task vectors on the base, which has none itself."""
        return _on_a_base(self.sections, self.method)

    @property
    def models(self) -> list[str]:
        return [entry.model for entry in self.sections.models]

    @property
    def out_dtype(self) -> str | None:
        name = self.sections.out_dtype or self.sections.dtype
        return OUT_DTYPES[name] if name else None

    @property
    def file(self) -> str:
        return self.lines.file

    def where_model(self, label: str) -> str:
        """File and line in which a model is named first."""
        if label == self.sections.base_model:
            return self.where("base_model")
        return self.where("models", self.models.index(label), "model")

    def where(self, *path: str | int) -> str:
        return self.lines.at(*path)


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
    data, lines = load_yaml(text, file)
    try:
        sections = Sections.model_validate(data)
    except ValidationError as error:
        raise _validation_error(error, lines) from None
    method = _method(sections.merge_method, lines)
    _check_models(sections, method, lines)
    reader = SettingsReader(lines, method)
    common = reader.read(sections.parameters, ("parameters",))
    own = [
        reader.read(entry.parameters, ("models", i, "parameters"))
        for i, entry in enumerate(sections.models)
    ]
    resolution = Resolution(method, lines, method.mergekit if sections.compat == "mergekit" else {})
    settings = tuple(
        {}  # the base itself has no task vector
        if _on_a_base(sections, method) and entry.model == sections.base_model
        else resolution.of_model(own[i], common, ("models", i))
        for i, entry in enumerate(sections.models)
    )
    return Recipe(sections, method, settings, resolution.shared(own, common), lines)


def _method(name: str, lines: Lines) -> Method:
    methods = all_methods()
    if name not in methods:
        found = f"no merge_method {name!r}{nearest(name, list(methods))}"
        raise lines.error(("merge_method",), f"{found}; there are {', '.join(methods)}")
    return methods[name]


def _check_models(sections: Sections, method: Method, lines: Lines) -> None:
    """Raises RecipeError unless base_model and the number of models suit the method."""
    names = [entry.model for entry in sections.models]
    on_a_base = _on_a_base(sections, method)
    if method.base in ("required", "first") and sections.base_model is None:
        what = f"{method.name} needs base_model, the model that the others were made from"
        raise lines.error(("merge_method",), what)
    others = [name for name in names if name != sections.base_model]
    if on_a_base and not others:
        what = f"{method.name} has no model beside its base; list at least one other"
        raise lines.error(("models",), what)
    apart = sections.base_model is not None and method.base != "donor"
    counted = len(others) + (method.base == "first") if apart else len(names)
    low, high = method.models
    if not low <= counted <= high:
        wanted = f"{low}" if low == high else f"{low} to {high}"
        with_base = " (its base included)" if method.base == "first" else ""
        what = f"{method.name} takes {wanted} models{with_base}, not {counted}"
        raise lines.error(("models",), what)
    for i, name in enumerate(names):
        if names.index(name) != i and method.base != "donor":
            what = f"model {name!r} is listed twice; give it one entry with the summed weight"
            raise lines.error(("models", i), what)


def _on_a_base(sections: Sections, method: Method) -> bool:
    given = sections.base_model is not None
    return method.base == "required" or (method.base == "optional" and given)


def _validation_error(error: ValidationError, lines: Lines) -> RecipeError:
    """pydantic's first finding in our words; an unknown key is often the cause of the others."""
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    path = first["loc"]
    name, key = ".".join(map(str, path)), str(path[-1])
    if first["type"] == "extra_forbidden" and key in LATER and len(path) == 1:
        return lines.error(path, f"mergekit's {key} cannot be run yet; list whole models")
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(path[:-1])
        what = f"unknown key {key!r}{nearest(key, allowed)}; allowed: {', '.join(allowed)}"
        return lines.error(path, what)
    if first["type"] == "missing":
        of_model = "an entry of models needs model"
        needs = of_model if path[0] == "models" else "a recipe needs merge_method and models"
        return lines.error(path, f"{name} is missing; {needs}")
    reason = WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    return lines.error(path, f"{name} is {shown(first['input'])}; {reason[0].lower() + reason[1:]}")


def _fields_at(path: Sequence[str | int]) -> Sequence[str]:
    kind: type[Strict] = Sections
    for part in path:
        if part == "models":
            kind = ModelEntry
        elif part == "score":
            kind = ScoreSection
    return list(kind.model_fields)


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
