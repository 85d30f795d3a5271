"""Sums of how models lie to each other, tensor by tensor, and what follows from them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

OUTSIDE = ""  # the layer of what is in none


@dataclass(frozen=True)
class Size:
    """How far a model is from what it is compared with: sums of squares of the difference and of that."""

    square: float = 0.0
    reference: float = 0.0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.square + other.square, self.reference + other.reference)

    @property
    def norm(self) -> float:
        return math.sqrt(self.square)

    @property
    def relative(self) -> float:
        """In norms of the reference; NaN where that is zero."""
        return math.sqrt(self.square / self.reference) if self.reference > 0 else math.nan


@dataclass(frozen=True)
class Pair:
    """Two models over the same values: their inner product, their sums of squares, how many values both have
    that are not zero, and of these how many have opposite signs."""

    product: float = 0.0
    first: float = 0.0
    second: float = 0.0
    both: int = 0
    opposed: int = 0

    def __add__(self, other: "Pair") -> "Pair":
        return Pair(
            self.product + other.product,
            self.first + other.first,
            self.second + other.second,
            self.both + other.both,
            self.opposed + other.opposed,
        )

    @property
    def cosine(self) -> float:
        lengths = math.sqrt(self.first) * math.sqrt(self.second)
        return self.product / lengths if lengths > 0 else math.nan

    @property
    def conflict(self) -> float:
        """The share of values with opposite signs, of those that neither leaves at zero."""
        return self.opposed / self.both if self.both else math.nan


@dataclass(frozen=True)
class Shared:
    """Values that two models or more do not leave at zero, and those of them in which signs conflict."""

    values: int = 0
    opposed: int = 0

    def __add__(self, other: "Shared") -> "Shared":
        return Shared(self.values + other.values, self.opposed + other.opposed)

    @property
    def conflict(self) -> float:
        return self.opposed / self.values if self.values else math.nan


@dataclass(frozen=True)
class Tensor:
    """One tensor of the merge. `layer`: OUTSIDE where it is in none; `module`: what it is called there."""

    name: str
    layer: str
    module: str
    shape: tuple[int, ...]
    with_base: bool
    sizes: Mapping[str, Size]
    pairs: Mapping[tuple[str, str], Pair]
    shared: Shared


@dataclass(frozen=True)
class Comparison:
    """All tensors that several models, or one and a base, go into. `base`: its name; `copied`: how many
    tensors are taken over as they are. `apart`: it is a part of one in which not all have a base."""

    recipe: str
    method: str
    base: str | None
    tensors: tuple[Tensor, ...]
    copied: int
    apart: bool = False

    @property
    def parts(self) -> list["Comparison"]:
        """Tensors with a base and tensors without one, where there are both: task vectors and distances from
        a mean have no sum."""
        based = tuple(tensor for tensor in self.tensors if tensor.with_base)
        bare = tuple(tensor for tensor in self.tensors if not tensor.with_base)
        if not based or not bare:
            return [self]
        with_base, without = (replace(self, tensors=each, apart=True) for each in (based, bare))
        return [with_base, replace(without, base=None)]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(name for tensor in self.tensors for name in tensor.sizes))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(pair for tensor in self.tensors for pair in tensor.pairs))

    def size(self, model: str, of: Iterable[Tensor] | None = None) -> Size:
        """Over some tensors, or all."""
        tensors = self.tensors if of is None else of
        return sum((t.sizes[model] for t in tensors if model in t.sizes), Size())

    def pair(self, pair: tuple[str, str], of: Iterable[Tensor] | None = None) -> Pair:
        """Over some tensors, or all."""
        tensors = self.tensors if of is None else of
        return sum((t.pairs[pair] for t in tensors if pair in t.pairs), Pair())

    def shared(self, of: Iterable[Tensor] | None = None) -> Shared:
        """Over some tensors, or all."""
        return sum((t.shared for t in (self.tensors if of is None else of)), Shared())
