"""The registry of merge methods.

A method is a function of one grain: `x`, one float32 array [rows, cols] per model, to one merged array.
It registers with `@method`; its keyword-only arguments *are* the parameters of the recipe, so that
validation, `mergetool methods NAME` and the pages of docs/methods all come from it; so do the paragraphs
"When it helps: ..." and "Parameters:" of its docstring.

Further positional arguments are handed in by their names:
    x        list of arrays; with space="delta" they are task vectors and the result is added to the base
             (base="optional": where the recipe names one)
    stats    what the method's statistics passes found out about the whole tensor
    of_rows  what they found out about each row (see OfRows): float32 of the shape of x[0], or None
    random   random(i) -> uint32 array like x[i], the same for the same seed, tensor, model and element
    ranks    ranks(i) -> float64 array like x[i]: rank by magnitude in the row, 0 to 1 (merge/ranks.py)

Statistics passes are a generator: it yields a Sums or Counts, is sent what that found over the whole
tensor, and may yield again; what it returns becomes `stats`. Of the parameters it names those that it depends
on, the others are `**_`: a search that tries others does not measure again.

Methods and statistics are written as element-wise numpy expressions, which the engine may compile into
one loop (merge/fuse.py). What is not element-wise works too, only slower.
"""

import inspect
import math
import pkgutil
import re
import typing
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from merge.numerics import Array

T = TypeVar("T")
Models = Sequence[Array]
Random = Callable[[int], NDArray[np.uint32]]
Ranks = Callable[[int], NDArray[np.float64]]


@dataclass(frozen=True)
class Sums:
    """A pass: the sums over the tensor of the float64 arrays `terms(x)`, sent as float64 [terms].

    by_column: the sums over the rows of int64 arrays, which any order of adding leaves exact, sent as
    int64 [terms, cols]. `terms` may then yield one array after the other.

    by_row: the sums of each row, sent as float64 [terms, rows]. Not for tensors of one column, a vector
    being so many rows.
    """

    terms: Callable[[Models], Iterable[NDArray[Any]]]
    by_column: bool = False
    by_row: bool = False


@dataclass(frozen=True)
class Counts:
    """A pass: how often each number occurs in the uint32 arrays `bins(x)`, sent as int64 [arrays, BINS].

    Numbers from BINS on are not counted. of_rows: float32 [rows]; then it is bins(x, of_rows) that is
    counted, where each of these numbers is repeated along its row.
    """

    bins: Callable[..., Sequence[NDArray[np.uint32]]]
    of_rows: Array | None = None


@dataclass(frozen=True)
class OfRows:
    """What passes return to a method that takes `of_rows`: float32 [rows] or None, and its `stats`."""

    of_rows: Array | None
    stats: Any


Statistic = NDArray[Any]
Request = Sums | Counts
Passes = Generator[Request, Statistic, Any]


LARGEST = float(np.finfo(np.float32).max)
PER_MODEL = object()
PerModel = Annotated[list[T], PER_MODEL]  # a parameter with one value per model


def each(value: Any) -> Any:
    """Default of a PerModel parameter: `value` for every model."""
    return value


@dataclass(frozen=True)
class Range:
    """Annotation: the allowed values of a number; infinite and NaN never are."""

    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False

    def holds(self, value: float) -> bool:
        if not abs(value) <= LARGEST:  # NaN too, and integers that no float holds
            return False
        return (value > self.low if self.above_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "finite"
        if math.isinf(self.high):
            return f"{'>' if self.above_low else '>='} {self.low:g}"
        return f"in {'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"


Weight = Annotated[float, Range()]
Density = Annotated[float, Range(0, 1, above_low=True)]
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One recipe parameter as the signature states it; `kind` is float, int, bool or str."""

    name: str
    kind: type
    per_model: bool
    default: Any
    range: Range
    choices: tuple[str, ...]
    text: str

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, in the words of an error message, or None."""
        if self.kind is bool:
            return None if isinstance(value, bool) else "must be true or false"
        if self.kind is str:
            allowed = ", ".join(self.choices)
            return None if value in self.choices else f"must be one of {allowed}"
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (isinstance(value, float) and self.kind is float):
            return "must be a whole number" if self.kind is int else "must be a number"
        return None if self.range.holds(value) else f"must be {self.range}"

    @property
    def allowed(self) -> str:
        if self.choices:
            return " | ".join(self.choices)
        return self.kind.__name__ if self.kind is not float else f"number {self.range}"


@dataclass(frozen=True)
class Method:
    """A registered method. `base` is "required", "optional" (without one the models themselves take the
    place of task vectors), "first" (one of the models, put first) or "donor" (only lends its files).
    `workspace` counts the float32 arrays of a grain alive at once, per model.
    `coefficients`(**parameters): those of the models, where the result is their weighted sum.
    `settled`(stats, **parameters): what the function is given in the place of what its passes found."""

    name: str
    function: Callable[..., Array]
    space: Literal["weights", "delta"]
    base: Literal["required", "optional", "first", "donor"]
    models: tuple[int, int]
    passes: int
    workspace: int
    paper: str
    parameters: Mapping[str, Parameter]
    statistics: Callable[..., Passes | None] | None
    mergekit: Mapping[str, Any]
    check: Callable[..., str | None] | None
    copies: Callable[..., bool]
    coefficients: Callable[..., Sequence[float]] | None
    takes: tuple[str, ...]
    settled: Callable[..., Any] | None

    @property
    def summary(self) -> str:
        return self._doc.split("\n", 1)[0]

    @property
    def text(self) -> str:
        return re.split(r"\n(?:When it helps|Parameters):", self._doc)[0].strip()

    @property
    def when(self) -> str:
        """What the docstring says after "When it helps:", in one line."""
        found = re.search(r"^When it helps: (.*?)(?:\n\n|\Z)", self._doc, re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else ""

    @property
    def _doc(self) -> str:
        return inspect.getdoc(self.function) or ""

    def arguments(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Recipe parameters as keyword arguments (`lambda` is a word of Python)."""
        return {("lambda_" if name == "lambda" else name): v for name, v in parameters.items()}

    def measures_by(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the parameters that its statistics depend on: they take them by name."""
        known = inspect.signature(self.statistics).parameters if self.statistics else {}
        return {n: value for n, value in self.arguments(parameters).items() if n in known}


_REGISTRY: dict[str, Method] = {}


def method(
    *,
    space: Literal["weights", "delta"],
    base: Literal["required", "optional", "first", "donor"],
    models: tuple[int, int] = (1, 1000),
    passes: int = 0,
    workspace: int = 3,
    paper: str = "",
    statistics: Callable[..., Passes | None] | None = None,
    mergekit: Mapping[str, Any] | None = None,
    check: Callable[..., str | None] | None = None,
    copies: Callable[..., bool] = lambda **_: False,
    coefficients: Callable[..., Sequence[float]] | None = None,
    settled: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Registers a function of one grain as the merge method of its name.

    passes: statistics passes that the method usually makes; statistics(size, models=, cols=, **parameters)
    starts them (None: not needed with these parameters). mergekit: parameters that give mergekit's
    arithmetic. check(**parameters) -> what is wrong with them together. copies(**parameters): the result
    is the one model as it is stored, bit for bit. coefficients(**parameters), settled(stats, **parameters):
    see Method.
    """

    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        signature = inspect.signature(function, eval_str=True)
        takes = tuple(n for n, p in signature.parameters.items() if p.kind is not p.KEYWORD_ONLY)
        texts = _parameter_texts(inspect.getdoc(function) or "")
        parameters = [
            _parameter(p, texts) for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY
        ]
        _REGISTRY[function.__name__] = Method(
            function.__name__, function, space, base, models, passes, workspace, paper,
            {p.name: p for p in parameters}, statistics, mergekit or {}, check, copies,
            coefficients, takes, settled,
        )  # fmt: skip
        return function

    return register


def _parameter(argument: inspect.Parameter, texts: Mapping[str, str]) -> Parameter:
    kind, per_model = argument.annotation, False
    allowed, choices = Range(), ()
    if typing.get_origin(kind) is Annotated and PER_MODEL in typing.get_args(kind):
        (kind,), per_model = typing.get_args(typing.get_args(kind)[0]), True
    if typing.get_origin(kind) is Annotated:
        kind, allowed = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        kind, choices = str, typing.get_args(kind)
    name = argument.name.rstrip("_")
    return Parameter(name, kind, per_model, argument.default, allowed, choices, texts.get(name, ""))


def _parameter_texts(doc: str) -> dict[str, str]:
    """The `name: text` lines under "Parameters:" of a docstring."""
    texts: dict[str, str] = {}
    name = ""
    for line in doc.partition("Parameters:\n")[2].splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 4:
            name, _, text = line.strip().partition(": ")
            texts[name] = text
        elif indent > 4 and name:
            texts[name] += " " + line.strip()
    return texts


@cache
def all_methods() -> Mapping[str, Method]:
    """Every method by name; imports the modules of this folder."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))
