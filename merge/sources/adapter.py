"""A LoRA adapter in PEFT's format on top of a model: a source whose changed tensors are computed as they
are read, W + scale * B A, the same as PEFT's merge_and_unload and never held as a whole.

Factors are float32, their product is float64 for one grain at a time, and the sum is rounded once.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from merge.anatomy import vocabulary_tensors
from merge.blas import Matrix, product
from merge.errors import SourceError
from merge.numerics import Array, grain_rows, grains
from merge.sources import Source, TensorInfo
from merge.sources.lora import Change, Config, Product, changes, read_config
from merge.sources.model import (
    ADAPTER,
    ADAPTER_PICKLED,
    ADAPTER_WEIGHTS,
    Model,
    changed_config,
    class_names,
    read_json,
    text_config,
)
from merge.sources.pickled import read_checkpoint
from merge.sources.positioned import stored_source
from merge.sources.safetensors import read_header

KEPT = 2  # tensors whose factors stay in memory: one is being finished while the next begins
ARRAYS = 3 * 8 + 4  # bytes for each element of a grain: the sum, the product, a square; float32
HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


def with_adapter(
    model: Model, folder: Path, name: str, commit: str | None = None, *, headless: bool = False
) -> Model:
    """`model` with the LoRA adapter in `folder` merged into it, which `name` tells to others. headless: as
    of opened_adapter.

    Its changed tensors read as float32 and are written in the dtype of the base's. Raises SourceError for an
    adapter of another kind or of another base, before any values are read.
    """
    config, adapter, found = opened_adapter(model, folder, headless=headless)
    adapted = _Adapted(model.source, adapter, found)
    public = f"{model.public_name}+{name}"
    return replace(
        model,
        config=_resized(model, found, adapter),
        label=f"{model.label}+{name}",
        name=public,
        source=adapted.source(),
        commit=_joined(model.commit, commit),
        beside=(*model.beside, _weights(folder), folder / ADAPTER),
        adapters=(*model.adapters, folder),
        notes=(*model.notes, *_base_note(model, config, public)),
    )


def _resized(model: Model, found: Mapping[str, Change], adapter: Source) -> Mapping[str, Any]:
    """config.json with the number of rows that the adapter leaves."""
    rows = {
        adapter.tensors[change.whole].rows
        for name, change in found.items()
        if change.whole and adapter.tensors[change.whole].rows > model.source.tensors[name].rows
    }
    return changed_config(model.config, {"vocab_size": max(rows)}) if rows else model.config


@dataclass(frozen=True)
class KnownFactors:
    """What an adapter adds to one tensor: a product of that rank. `load`() -> (b [rows, rank], a [rank,
    cols]) float32, its scale in b."""

    rank: int
    load: Callable[[], tuple[Array, Array]]


def changed_by(model: Model, folder: Path) -> list[str]:
    """The tensors of `model` that the adapter in `folder` changes; raises SourceError."""
    return list(opened_adapter(model, folder)[2])


def factors_of(model: Model, folder: Path) -> dict[str, KnownFactors] | None:
    """By tensor of `model`; None where the adapter in `folder` does more than to add products (DoRA, whole
    tensors, biases, token rows)."""
    _, adapter, found = opened_adapter(model, folder)
    products = {name: change.product for name, change in found.items()}
    if any(p is None or p.magnitude or found[n] != Change(product=p) for n, p in products.items()):
        return None
    return {
        name: KnownFactors(_rank(adapter, product), partial(_factors, adapter, product))
        for name, product in products.items()
        if product
    }


def _rank(adapter: Source, product: Product) -> int:
    return adapter.tensors[product.a].rows


def _factors(adapter: Source, product: Product) -> tuple[Array, Array]:
    a, b = (adapter.rows(name, 0, adapter.tensors[name].rows) for name in (product.a, product.b))
    b, a = (a.T, b.T) if product.transposed else (b, a)
    return np.float32(product.scale) * b, np.ascontiguousarray(a)


def opened_adapter(
    model: Model, folder: Path, *, headless: bool = False
) -> tuple[Config, Source, dict[str, Change]]:
    """An adapter's config, its tensors, and what it changes of `model`; raises SourceError.

    headless: without a head that the model has tied to its embedding; what is done to that is not doubted.
    """
    config = read_config(str(folder / ADAPTER), read_json(folder / ADAPTER))
    stored = _stored(folder)
    kind = str(model.config.get("model_type"))
    found = changes(
        config, stored, model.source.tensors, label=model.label, model_type=kind,
        grown=_growing(model, folder), headless=headless,
    )  # fmt: skip
    if not headless:
        _check_tied(model, config, found)
    return config, stored_source(stored), found


def stored_adapter(folder: Path) -> Source:
    """The tensors of the adapter in `folder` as they are stored."""
    return stored_source(_stored(folder))


def _stored(folder: Path) -> Mapping[str, TensorInfo]:
    weights = _weights(folder)
    return (read_header if weights.name == ADAPTER_WEIGHTS else read_checkpoint)(weights)


def _growing(model: Model, folder: Path) -> Mapping[str, str]:
    """Tensors with a row for every token, where the adapter was saved with a tokenizer of its own."""
    if not (folder / "tokenizer.json").is_file():
        return {}
    return vocabulary_tensors(model.config, {n: i.shape for n, i in model.source.tensors.items()})


def _weights(folder: Path) -> Path:
    """safetensors, else PyTorch's format where that is there."""
    stored, pickled = folder / ADAPTER_WEIGHTS, folder / ADAPTER_PICKLED
    return pickled if pickled.is_file() and not stored.is_file() else stored


def _joined(base: str | None, adapter: str | None) -> str | None:
    return f"{base or ''}+{adapter or ''}" if base or adapter else None


def _base_note(model: Model, config: Config, name: str) -> Iterator[str]:
    told = config.base.partition("@")[0].rstrip("/")
    if model.within and not model.known_as:
        return  # the base of a mixture that does not tell what it was called
    known = {model.label, model.public_name, str(model.folder), model.folder.name, *model.known_as}
    if told and not {told, Path(told).name} & {label.partition("@")[0] for label in known}:
        yield f"{name}: the adapter was trained on {told[:100]!r}"


def _check_tied(model: Model, config: Config, found: Mapping[str, Change]) -> None:
    """Raises SourceError where head and embedding are one tensor and the adapter's meaning is doubtful.

    PEFT runs a changed embedding beside the unchanged head, merges it into both, and merges factors under
    ensure_weight_tying twice (0.21). Trained token rows are always meant for both.
    """
    vocabulary = text_config(model.config).get("vocab_size")
    tensors = model.source.tensors.items()
    matrices = [name for name, t in tensors if len(t.shape) == 2 and t.rows == vocabulary]
    generates = any(name.endswith(HEADS) for name in class_names(model.config))
    if not (model.tied or (generates and len(matrices) == 1)):
        return
    for change in (found.get(name, Change()) for name in matrices):
        if change.product or (change.whole and not config.keeps_tied):
            raise SourceError(
                f"{config.where}: changes what is embedding and head of {model.label} at once, and PEFT "
                "merges it otherwise than it runs it; untie the two in the base, train modules_to_save with "
                "ensure_weight_tying, or, in a mixture, leave it out (saved_modules: base)"
            )


# rows of the base [rows, cols] and the first one's number -> the same rows, adapted
Apply = Callable[[Array, int], Array | Matrix]


class _Adapted:
    """Reads a base's tensors as an adapter changes them; what it keeps is shared by all threads."""

    def __init__(self, base: Source, adapter: Source, found: Mapping[str, Change]) -> None:
        self._base, self._adapter, self._found = base, adapter, found
        self._recent = _Recent(self._loaded)

    def source(self) -> Source:
        sizes = [self._held(name) for name in self._found]
        held = self._base.held + KEPT * max(sizes, default=0)
        tensors = {name: self._info(name, info) for name, info in self._base.tensors.items()}
        return Source(tensors, self._read, self._scratch, held)

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        change = self._found.get(name)
        if change is None:
            return info
        if change == Change(whole=change.whole):
            return replace(self._adapter.tensors[change.whole], stored=info.written)
        return TensorInfo("F32", info.shape, stored=info.written)

    def _read(self, name: str, first_row: int, end_row: int, out: memoryview) -> None:
        change = self._found.get(name)
        if change is None:
            return self._base.read(name, first_row, end_row, out)
        if change == Change(whole=change.whole):
            return self._adapter.read(change.whole, first_row, end_row, out)
        apply, info = self._recent.get(name), self._base.tensors[name]
        merged = np.frombuffer(out, "<f4").reshape(end_row - first_row, info.cols)
        for first, end in grains(info.shape, first_row, end_row):
            merged[first - first_row : end - first_row] = apply(
                self._before(name, first, end), first
            )
        return None

    def _before(self, name: str, first: int, end: int) -> Array:
        """Rows of the tensor that the adapter's values are added to."""
        whole = self._found[name].whole
        source, stored = (self._adapter, whole) if whole else (self._base, name)
        return source.rows(stored, first, end)

    def _scratch(self, name: str, rows: int) -> int:
        """A grain widened and multiplied, and the factors, which others may have pushed out meanwhile."""
        change = self._found.get(name)
        if change is None:
            return self._base.scratch(name, rows)
        if change == Change(whole=change.whole):
            return 0
        info = self._base.tensors[name]
        rows = min(rows, grain_rows(info.shape))
        return (
            self._base.scratch(name, rows)
            + rows * (info.row_bytes + ARRAYS * info.cols)
            + self._held(name)
        )

    def _held(self, name: str) -> int:
        """Bytes of the adapter's values for a tensor as they are held: at most float64."""
        change = self._found[name]
        parts = [change.rows, change.added]
        if change.product:
            parts += [change.product.a, change.product.b, change.product.magnitude]
        elements = [
            self._adapter.tensors[p].rows * self._adapter.tensors[p].cols for p in parts if p
        ]
        return 8 * sum(elements)

    def _loaded(self, name: str) -> Apply:
        change = self._found[name]
        if change.product:
            return self._multiplied(name, change.product)
        if change.rows:
            return _replacing(change.indices, self._values(change.rows))
        added = change.scale * self._values(change.added).astype(np.float64)
        return lambda w, first: w + added[first : first + len(w)]

    def _multiplied(self, name: str, factors: Product) -> Apply:
        a, b = self._values(factors.a), self._values(factors.b)
        left, right = (a.T, b.T) if factors.transposed else (b, a)
        scaled = factors.scale * np.ascontiguousarray(right, np.float64)

        def add(w: Array, first: int) -> Matrix:
            total = product(left[first : first + len(w)].astype(np.float64), scaled)
            total += w
            return total

        if not factors.magnitude:
            return add
        magnitude = self._values(factors.magnitude).astype(np.float64)
        if factors.transposed:
            ratio = magnitude.T / np.sqrt(self._column_squares(name, add))
            return lambda w, first: add(w, first) * ratio
        return lambda w, first: _with_norms(add(w, first), magnitude[first : first + len(w)])

    def _column_squares(self, name: str, add: Callable[[Array, int], Matrix]) -> Matrix:
        """Sum of squares of every column, [cols]: DoRA's norms where a model stores [in, out]; one pass
        over the base."""
        info = self._base.tensors[name]
        total = np.zeros(info.cols)
        for first, end in grains(info.shape):
            total += np.square(add(self._before(name, first, end), first)).sum(axis=0)
        return total

    def _values(self, name: str) -> Array:
        """A tensor of the adapter, [rows, cols] float32; a vector is one column."""
        return self._adapter.rows(name, 0, self._adapter.tensors[name].rows)


def _replacing(indices: Sequence[int], values: Array) -> Apply:
    """Puts row i of `values` in the place of row indices[i]; of a token named twice the last counts."""
    order = np.array(indices)

    def apply(w: Array, first: int) -> Array:
        for i in np.flatnonzero((first <= order) & (order < first + len(w))):
            w[order[i] - first] = values[i]
        return w

    return apply


def _with_norms(w: Matrix, norms: Matrix) -> Matrix:
    """`w` with rows of the lengths `norms`, [rows, 1]."""
    w *= norms / np.sqrt(np.square(w).sum(axis=1, keepdims=True))
    return w


class _Recent:
    """The last KEPT results of `load(name)`, each loaded by one thread while the others wait."""

    def __init__(self, load: Callable[[str], Apply]) -> None:
        self._load, self._lock, self._kept = load, threading.Lock(), dict[str, Apply]()

    def get(self, name: str) -> Apply:
        with self._lock:
            found = self._kept.pop(name, None) or self._load(name)
            self._kept[name] = found  # the last one again
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
            return found
