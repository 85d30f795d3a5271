"""What an assembly works with: the experts of a recipe, the places of its routers, what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.experts.sections import ExpertEntry
from merge.numerics import Array
from merge.plan import Step
from merge.sources.model import Model


@dataclass(frozen=True)
class Expert:
    """`model`: the opened model, or the base with the adapter merged into it as it is read, whose folder is
    then `adapter`. `index`: its number among the plan's models. `place`: where the recipe names it,
    FILE:LINE, for messages."""

    name: str
    model: Model
    index: int
    adapter: Path | None
    entry: ExpertEntry
    place: str


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to a linear layer, B A, of that rank: `load`() -> (b [out, rank], a [rank, in])
    float32, its scale in b."""

    rank: int
    load: Callable[[], tuple[Array, Array]]


@dataclass(frozen=True)
class Site:
    """A router: `tensor`, the name of its weight [experts, cols] in the output; `module`, the part of the
    base, as transformers calls it, whose input it sees, [tokens, cols]."""

    tensor: str
    module: str
    cols: int


@dataclass(frozen=True)
class Routing:
    """How routers are made and used: the recipe's `router` with mergekit's keys and all defaults filled in.

    `absolute`: what counts is the size of a score, not its sign (Arrow). `weights`: fixed shares, one of
    each expert. `where`: FILE:LINE for messages.
    """

    mode: str
    top_k: int
    temperature: float
    per: str
    normalise: bool
    seed: int
    where: str
    absolute: bool = False
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Assembled:
    """The plan's `steps` and `config` with experts in them. `models`: pseudo-models that compute tensors,
    numbered on after the plan's. `files`: beside the tensors, in addition to what is carried over. `texts`:
    files that routers are made from, and the digests of what they say."""

    steps: tuple[Step, ...]
    config: Mapping[str, Any]
    models: tuple[Model, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    texts: Mapping[Path, str] = field(default_factory=dict)
