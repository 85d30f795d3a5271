"""The keys of a recipe, as pydantic checks them: names, types, what may be left out."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, StrictInt, ValidationError, field_validator, model_validator

from merge.errors import RecipeError
from merge.experts.sections import Architecture, ExpertEntry, Mode, RouterSection, SharedExpert
from merge.fields import Dtype, Label, Parameters, Pattern, Strict
from merge.lines import Lines, nearest
from merge.search.sections import GenomeSection, ObjectiveSection, StudySection, TaskSection
from merge.search.space import varying
from merge.tokens.sections import (
    StopSection,
    TemplateSection,
    TokenizerSection,
    TokenSection,
    UnifySection,
)

Section = TypeVar("Section", bound=Strict)
WORDS = {
    "model_type": "it must be a table of keys",
    "dict_type": "it must be a table of keys",
    "list_type": "it must be a list",
    "tuple_type": "it must be a list of two layer numbers, [first, end]",
    "int_type": "it must be a whole number",
    "too_short": "it must have at least one entry",
    "string_type": "it must be text",
    "bool_type": "it must be true or false",
}  # pydantic's speak of Python
KINDS = ("models", "slices", "modules")  # of which a recipe has one
# what can be changed of a mixture, and what a recipe that does so can say besides
KEYS_OF_CHANGE = frozenset({"drop", "experts", "router", "gate_mode", "experts_per_token"})
BESIDE_CHANGE = frozenset(
    [
        "saved_modules",
        "tokenizer",
        "tokenizer_source",
        "stop",
        "chat_template",
        "allow_nonfinite",
        "shard_size",
        "output",
        "name",
        "score",
        "compat",
    ]
)
# of a mixture alone
OF_MIXTURES = (
    *("shared_experts", "router", "gate_mode", "experts_per_token", "architecture"),
    *("format", "layers", "saved_modules"),
)
OF_SEARCHES = ("study", "preset", "genome")
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class ModelEntry(Strict):
    model: Label
    parameters: Parameters = {}


class SourceEntry(Strict):
    model: Label
    layer_range: tuple[StrictInt, StrictInt]
    parameters: Parameters = {}

    @field_validator("layer_range", mode="after")
    @classmethod
    def _range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError("must be [first, end] with 0 <= first < end")
        return value


class SliceEntry(Strict):
    sources: list[SourceEntry] = Field(min_length=1)
    base_model: Label | None = None
    parameters: Parameters = {}


class ModuleEntry(Strict):
    models: list[ModelEntry] | None = Field(default=None, min_length=1)
    slices: list[SliceEntry] | None = Field(default=None, min_length=1)
    parameters: Parameters = {}


class AdapterSection(Strict):
    """The result is written as a LoRA adapter of the base."""

    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    drop: bool = False


class ScoreSection(Strict):
    """What the result is scored on: a suite, or tasks of lm-eval by name."""

    suite: str | None = Field(default=None, min_length=1)
    tasks: list[Label] | None = Field(default=None, min_length=1)
    include: str | None = Field(default=None, min_length=1)
    parents: bool = True
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    chat_template: bool = False

    @model_validator(mode="after")
    def _one(self) -> "ScoreSection":
        if self.suite and self.tasks:
            raise ValueError("has both suite and tasks; keep one")
        if self.include and not self.tasks:
            raise ValueError("has include without tasks, which it is for")
        return self


class Sections(Strict):
    """The keys of a recipe; unknown ones are errors."""

    merge_method: str
    models: list[ModelEntry] | None = Field(default=None, min_length=1)
    slices: list[SliceEntry] | None = Field(default=None, min_length=1)
    modules: dict[str, ModuleEntry] | None = Field(default=None, min_length=1)
    base_model: Label | None = None
    parameters: Parameters = {}
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    include: list[Pattern] = []
    exclude: list[Pattern] = []
    compat: Literal["mergekit"] | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerSection | None = None
    stop: StopSection | None = None
    chat_template: TemplateSection | None = None
    missing_tensors: Literal["error", "base"] = "error"
    extra_tensors: Literal["error", "drop"] = "error"
    allow_nonfinite: bool = False
    shard_size: str = "5GB"
    output: str | None = Field(default=None, min_length=1)
    name: str | None = Field(default=None, min_length=1)
    score: ScoreSection | None = None
    adapter: AdapterSection | None = None
    experts: list[ExpertEntry] | None = Field(default=None, min_length=1)
    shared_experts: list[SharedExpert] | None = Field(default=None, min_length=1)
    router: RouterSection | None = None
    gate_mode: Mode | None = None
    experts_per_token: StrictInt | None = Field(default=None, ge=1)
    architecture: Architecture | None = None
    format: Literal["routed", "dense", "peft"] | None = None
    layers: list[StrictInt] | None = Field(default=None, min_length=1)
    saved_modules: str | None = Field(default=None, min_length=1)
    mixture: Label | None = None
    drop: list[Any] = []

    @field_validator("shard_size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> str:
        if parse_size(str(value)) < 1:
            raise ValueError("must be at least 1 byte")
        return str(value)

    @field_validator("drop", mode="after")
    @classmethod
    def _drop(cls, value: list[Any]) -> list[Any]:
        if any(type(entry) not in (int, str) for entry in value):
            raise ValueError("must be a list of names of experts, or of their numbers from 0")
        return value

    @property
    def tokens(self) -> TokenizerSection:
        """What becomes of the tokens, also where the recipe does not say so."""
        return self.tokenizer or TokenizerSection(source=self.tokenizer_source or "base")


def read_sections(data: dict[str, Any], lines: Lines) -> Sections:
    """The recipe in a document; raises RecipeError at its line."""
    searched = next(((key,) for key in OF_SEARCHES if key in data), None)
    if (at := searched or varying(data)) is not None:
        what = "this is a search; run it with mergetool evolve or mergetool sweep"
        raise lines.error(at, f"{'.'.join(map(str, at))}: {what}")
    if "model" in data and "merge_method" not in data:  # one model, rewritten
        rest = {key: value for key, value in data.items() if key != "model"}
        data = {"merge_method": "passthrough", "models": [{"model": data["model"]}], **rest}
    if "mixture" in data or "drop" in data:
        _check_mixture(data, lines)  # its base, with other experts on it
        data = {"merge_method": "passthrough", "models": [{"model": data["mixture"]}], **data}
    elif "experts" in data:  # its base, with experts in its layers
        _check_experts(data, lines)
        rest = {key: value for key, value in data.items() if key != "base_model"}
        data = {"merge_method": "passthrough", "models": [{"model": data["base_model"]}], **rest}
    elif lone := next((key for key in OF_MIXTURES if key in data), None):
        raise lines.error((lone,), f"{lone} is of a mixture; list its experts, or take it out")
    if "stop" in data and data["stop"] is None:
        what = "it must have eos, also or unify; {} stops where any of the models does"
        raise lines.error(("stop",), f"stop is empty; {what}")
    if "out_path" in data and "output" not in data:  # mergekit-mega's word
        data = {("output" if key == "out_path" else key): value for key, value in data.items()}
    sections = read_section(Sections, data, lines, ())
    _check_kinds(sections, (), lines)
    for name, module in (sections.modules or {}).items():
        _check_kinds(module, ("modules", name), lines)
    if sections.adapter:
        _check_adapter(sections, lines)
    if sections.tokenizer and sections.tokenizer_source:
        raise lines.error(("tokenizer",), "tokenizer and tokenizer_source are both given; keep one")
    return sections


def read_section(
    kind: type[Section], data: Mapping[str, Any], lines: Lines, at: tuple[str | int, ...]
) -> Section:
    """The table at `at` of a document as `kind` describes it; raises RecipeError at its line."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _validation_error(error, lines, at, kind) from None


def _check_adapter(sections: Sections, lines: Lines) -> None:
    if not sections.base_model:
        what = "an adapter needs base_model, the model that it will be put on"
        raise lines.error(("adapter",), what)
    for key in (
        "slices",
        "modules",
        "score",
        "tokenizer",
        "tokenizer_source",
        "stop",
        "chat_template",
    ):
        if getattr(sections, key):
            raise lines.error((key,), f"adapter and {key} are both given; an adapter has no {key}")


def _check_experts(data: dict[str, Any], lines: Lines) -> None:
    if "base_model" not in data:
        what = "experts need base_model, the model that everything else comes from"
        raise lines.error(("experts",), what)
    for key in ("merge_method", *KINDS, "model", "adapter", "include", "exclude", "parameters"):
        if key in data:
            what = "a mixture merges nothing: a merge can be a document of its own, and an expert by its name"
            raise lines.error((key,), f"experts and {key} are both given; {what}")


def _check_mixture(data: dict[str, Any], lines: Lines) -> None:
    if "mixture" not in data:
        what = "drop names experts of a mixture; write which, mixture: FOLDER"
        raise lines.error(("drop",), what)
    if not (KEYS_OF_CHANGE & data.keys()):
        what = "mixture has nothing to change; write drop, experts or router"
        raise lines.error(("mixture",), what)
    known = {"mixture", *KEYS_OF_CHANGE, *BESIDE_CHANGE}
    for key in data:
        if key in Sections.model_fields and key not in known:
            what = "what is kept of a mixture is copied"
            raise lines.error((key,), f"mixture and {key} are both given; {what}")


def _check_kinds(part: Sections | ModuleEntry, path: tuple[str, ...], lines: Lines) -> None:
    kinds = KINDS if isinstance(part, Sections) else KINDS[:2]
    given = [kind for kind in kinds if getattr(part, kind)]
    if len(given) > 1:
        raise lines.error((*path, given[1]), f"{given[0]} and {given[1]} are both given; keep one")
    if not given:
        what = "a recipe" if not path else f"module {path[-1]}"
        raise lines.error(path, f"models is missing; {what} needs one of {', '.join(kinds)}")


def _validation_error(
    error: ValidationError, lines: Lines, at: tuple[str | int, ...], kind: type[Strict]
) -> RecipeError:
    """pydantic's first finding in a table of that kind, in our words; an unknown key is often the cause of
    the others."""
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    path = (*at, *first["loc"])
    name, key = ".".join(map(str, path)), str(path[-1])
    if first["type"] == "extra_forbidden":
        fields = _kind_at(first["loc"][:-1], kind).model_fields
        allowed = [field.alias or name for name, field in fields.items()]
        meant = _elsewhere(key) or nearest(key, allowed)
        inside = f"{'.'.join(map(str, path[:-1]))}: " if len(path) > 1 else ""
        what = f"{inside}unknown key {key!r}{meant}; allowed: {', '.join(allowed)}"
        return lines.error(path, what)
    if first["type"] == "missing":
        whole = "a recipe needs merge_method and models, slices or modules"
        needs = whole if len(path) == 1 else f"an entry of {_list_of(path)} needs {key}"
        return lines.error(path, f"{name} is missing; {needs}")
    reason = WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    return lines.error(path, f"{name} is {shown(first['input'])}; {reason[0].lower() + reason[1:]}")


_KINDS: dict[str, type[Strict]] = {
    "models": ModelEntry,
    "sources": SourceEntry,
    "slices": SliceEntry,
    "modules": ModuleEntry,
    "score": ScoreSection,
    "adapter": AdapterSection,
    "tokenizer": TokenizerSection,
    "tokens": TokenSection,
    "stop": StopSection,
    "unify": UnifySection,
    "chat_template": TemplateSection,
    "experts": ExpertEntry,
    "shared_experts": SharedExpert,
    "router": RouterSection,
    "study": StudySection,
    "tasks": TaskSection,
    "objectives": ObjectiveSection,
    "genome": GenomeSection,
}


def _kind_at(path: Sequence[str | int], kind: type[Strict]) -> type[Strict]:
    """What stands at a path within a table of that kind."""
    return next((_KINDS[str(part)] for part in reversed(path) if part in _KINDS), kind)


def _elsewhere(key: str) -> str:
    """Which sections have a key that is not known where it stands."""
    kinds = {name: kind for name, kind in _KINDS.items() if key in kind.model_fields}
    top = ["the recipe itself"] if key in Sections.model_fields else []
    found = [*top, *kinds]
    return f" (it is a key of {' and '.join(found)})" if found else ""


def _list_of(path: Sequence[str | int]) -> str:
    return next((str(part) for part in reversed(path[:-1]) if part in _KINDS), "the recipe")


def shown(value: Any) -> str:
    """A value of a recipe as an error message shows it."""
    plain = {True: "true", False: "false", None: "null"}
    text = plain[value] if value is None or isinstance(value, bool) else _repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python does not print whole numbers of thousands of digits
        return "a huge number"


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
