"""What the experts of a linear layer add to it, read by rows: the factors of all of them side by side, and
how much DoRA stretches the rows of the sum.

An adapter with DoRA gives row i of W + s B A the length m_i, that is, multiplies it by
c_i = m_i / ||W + s B A||_i. c goes into B where the expert is mixed; c - 1 is kept for what it does to W.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merge.blas import Matrix, product
from merge.experts.assembly import Factors
from merge.numerics import Array, grain_rows, grains, whole_grains
from merge.sources import Source, TensorInfo
from merge.sources.lora import Product

Fill = Callable[[int, int, Array], None]
WIDE = 4 + 2 * 8  # bytes for each value of a factor: as it is read, as float64, and scaled
ARRAYS = (
    4 + 3 * 8
)  # bytes for each element of a grain of the base: read, changed, a product, a square


@dataclass(frozen=True)
class Update:
    """One expert's product at a linear layer, of the adapter's tensors in `source`."""

    source: Source
    product: Product

    @property
    def rank(self) -> int:
        return self.source.tensors[self.product.a].rows

    @property
    def stretches(self) -> bool:
        """Whether it is DoRA's."""
        return bool(self.product.magnitude)

    @property
    def scale(self) -> float:
        return self.product.scale

    def a(self, first: int, end: int) -> Array:
        """Rows [end - first, in] of A."""
        return self.source.rows(self.product.a, first, end)

    def b(self, first: int, end: int) -> Array:
        """Rows [end - first, rank] of B, without the scale."""
        return self.source.rows(self.product.b, first, end)

    def magnitude(self, first: int, end: int) -> Array:
        """Lengths [end - first] of rows of the sum."""
        return self.source.rows(self.product.magnitude, first, end)[:, 0]

    def factors(self) -> Factors:
        outs = self.source.tensors[self.product.b].rows

        def load() -> tuple[Array, Array]:
            return np.float32(self.scale) * self.b(0, outs), self.a(0, self.rank)

        return Factors(self.rank, load)


def stacked(factors: Sequence[Factors]) -> Factors:
    """The factors of the layers that read one vector, as of one layer whose outputs are those of all."""

    def load() -> tuple[Array, Array]:
        pairs = [each.load() for each in factors]
        b = np.zeros((sum(len(b) for b, _ in pairs), sum(f.rank for f in factors)), np.float32)
        row = column = 0
        for part, _ in pairs:
            b[row : row + len(part), column : column + part.shape[1]] = part
            row, column = row + len(part), column + part.shape[1]
        return b, np.concatenate([a for _, a in pairs])

    return factors[0] if len(factors) == 1 else Factors(sum(f.rank for f in factors), load)


@dataclass(frozen=True)
class Layer:
    """A linear layer `name` whose weight is the tensor `weight` of `base`, and what experts add to it, by
    their numbers, of which there are `experts`."""

    name: str
    weight: str
    base: Source
    updates: Mapping[int, Update]
    experts: int

    @property
    def ranks(self) -> list[int]:
        """Of each expert; 0 where it leaves the layer as it is."""
        return [self.updates[i].rank if i in self.updates else 0 for i in range(self.experts)]

    @property
    def stretches(self) -> bool:
        return any(update.stretches for update in self.updates.values())

    @property
    def size(self) -> tuple[int, int]:
        """(out, in)."""
        info = self.base.tensors[self.weight]
        return (info.cols, info.rows) if self._transposed else (info.rows, info.cols)

    def tensors(self) -> dict[str, tuple[TensorInfo, Fill]]:
        """Its tensors in a mixture, float32, and what fills rows [first, end) of each into an array."""
        outs, ins = self.size
        total = sum(self.ranks)
        found: dict[str, tuple[TensorInfo, Fill]] = {
            f"{self.name}.lora_A": (TensorInfo("F32", (total, ins)), self._fill_a),
            f"{self.name}.lora_B": (TensorInfo("F32", (outs, total)), self._fill_b),
        }
        if self.stretches:
            info = TensorInfo("F32", (self.experts, outs))
            found[f"{self.name}.dora"] = info, self._fill_dora
        return found

    def scratch(self, name: str, rows: int) -> int:
        """Bytes that filling so many rows of one of its tensors takes."""
        outs, ins = self.size
        if name.endswith(".lora_A"):
            return rows * ins * 2 * 4
        norms = max((self._norm_bytes(u) for u in self.updates.values() if u.stretches), default=0)
        if name.endswith(".lora_B"):
            return rows * max(self.ranks) * (4 + WIDE) + norms
        return 3 * 8 * outs + norms

    @property
    def _transposed(self) -> bool:
        return next(iter(self.updates.values())).product.transposed

    def _fill_a(self, first: int, end: int, out: Array) -> None:
        start = 0
        for _, update in sorted(self.updates.items()):
            low, high = max(first, start), min(end, start + update.rank)
            if low < high:
                out[low - first : high - first] = update.a(low - start, high - start)
            start += update.rank

    def _fill_b(self, first: int, end: int, out: Array) -> None:
        start = 0
        for _, update in sorted(self.updates.items()):
            b = update.b(first, end)
            if update.stretches:
                wide = update.scale * b.astype(np.float64)
                wide *= self._stretched(update, first, end)[:, None]
                out[:, start : start + update.rank] = wide
            else:
                out[:, start : start + update.rank] = np.float32(update.scale) * b
            start += update.rank

    def _fill_dora(self, first: int, end: int, out: Array) -> None:
        out[:] = 0
        for number in range(first, end):
            update = self.updates.get(number)
            if update and update.stretches:
                out[number - first] = self._stretched(update, 0, self.size[0]) - 1.0

    def _stretched(self, update: Update, first: int, end: int) -> Matrix:
        """c of rows [first, end), [end - first] float64."""
        squares = (self._column_squares if self._transposed else self._row_squares)(
            update, first, end
        )
        with np.errstate(divide="ignore", invalid="ignore"):  # found in the result
            return update.magnitude(first, end) / np.sqrt(squares)

    def _row_squares(self, update: Update, first: int, end: int) -> Matrix:
        """Sums of squares of rows of the sum. They are computed by grains of the base, so that their bits do
        not depend on what is asked for."""
        shape = self.base.tensors[self.weight].shape
        start, stop = whole_grains(shape, first, end)
        right = update.scale * update.a(0, update.rank).astype(np.float64)
        sums = [
            np.square(self._sum(update.b(low, high), right, low, high)).sum(axis=1)
            for low, high in grains(shape, start, stop)
        ]
        return np.concatenate(sums)[first - start : end - start]

    def _column_squares(self, update: Update, first: int, end: int) -> Matrix:
        """As _row_squares where the base stores [in, out]: one pass over all of it."""
        info = self.base.tensors[self.weight]
        right = update.scale * update.b(0, info.cols).T.astype(np.float64)
        left = update.a(0, update.rank).T
        total = np.zeros(info.cols)
        for low, high in grains(info.shape):
            total += np.square(self._sum(left[low:high], right, low, high)).sum(axis=0)
        return total[first:end]

    def _sum(self, left: Array, right: Matrix, first: int, end: int) -> Matrix:
        """Rows of the base's tensor with the product added."""
        total = product(left.astype(np.float64), right)
        total += self.base.rows(self.weight, first, end)
        return total

    def _norm_bytes(self, update: Update) -> int:
        info = self.base.tensors[self.weight]
        rows = min(grain_rows(info.shape), info.rows)
        grain = rows * (info.cols * ARRAYS + info.row_bytes) + self.base.scratch(self.weight, rows)
        return grain + WIDE * update.rank * sum(self.size) + 3 * 8 * info.rows


def source_of(layers: Sequence[Layer]) -> Source:
    """The tensors of all layers, each computed as it is read, one expert after the other."""
    known = {name: (layer, *made) for layer in layers for name, made in layer.tensors().items()}

    def read(name: str, first: int, end: int, out: memoryview) -> None:
        _, info, fill = known[name]
        fill(first, end, np.frombuffer(out, "<f4").reshape(end - first, info.cols))

    return Source(
        {name: info for name, (_, info, _) in known.items()},
        read,
        lambda name, rows: known[name][0].scratch(name, rows),
    )
