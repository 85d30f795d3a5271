"""What a LoRA adapter in PEFT's format changes: its config and tensor names -> a Change for each tensor.

Everything is checked from headers; the values are read in `adapter.py`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Any

from merge.errors import SourceError
from merge.numerics import FLOATS
from merge.sources import TensorInfo
from merge.sources.module_patterns import ALLOWED, LONGEST, first_fitting, is_readable
from merge.sources.names import Names

PREFIX = "base_model.model."
HEAD = "lm_head.weight"
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|"
    r"lora_embedding_B|lora_magnitude_vector(?=(\.weight)?$)|token_adapter\.trainable_tokens_delta)(\.weight)?$"
)
WRAPPER = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
SAVED = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
# what an adapter may say without changing how it is merged, and what is taken from the file's own tensors
TRAINING = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
}
READ = {
    "alpha_pattern",
    "ensure_weight_tying",
    "lora_alpha",
    "r",
    "rank_pattern",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
# the others (pissa, olora, corda, loftq, lora_ga, ...) change the base as PEFT loads them
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
# architectures whose linear layers are stored transposed, [in, out], and the names of those
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
PATTERNS = 1000  # of rank_pattern or alpha_pattern, at most: each is held against each module


@dataclass(frozen=True)
class Config:
    """adapter_config.json, checked: `where` names it in messages."""

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    keeps_tied: bool
    tokens: Mapping[str, tuple[int, ...]]
    base: str

    def rank_of(self, module: str) -> int:
        return self.ranks.get(first_fitting(self.ranks, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the factors of `module` is multiplied by."""
        rank = self.rank_of(module)
        alpha = self.alphas.get(first_fitting(self.alphas, module), self.alpha)
        return alpha / (sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Product:
    """W + scale * B A, or its transpose where W is stored as [in, out]; `a`, `b`, `magnitude` (DoRA; ""
    without) are names of the adapter's tensors."""

    a: str
    b: str
    scale: float
    transposed: bool
    magnitude: str = ""


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor, in this order; the names are of the adapter's tensors.

    whole: stands in the base's place. added: times `scale` added to a vector. rows: stand in the place
    of the rows with the numbers `indices`.
    """

    whole: str = ""
    product: Product | None = None
    added: str = ""
    scale: float = 1.0
    rows: str = ""
    indices: tuple[int, ...] = ()


def read_config(where: str, data: Mapping[str, Any]) -> Config:
    """The config of a LoRA adapter; SourceError for every other kind and for what is not known here."""
    kind = data.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{where}: peft_type is {kind!r}; only LORA adapters can be merged")
    for key in sorted(data.keys() - TRAINING - READ):
        if data[key]:
            raise SourceError(
                f"{where}: {key[:60]!r} is {str(data[key])[:60]!r}; adapters with it cannot be merged here"
            )
    initial = data.get("init_lora_weights")
    if initial not in INITIAL:
        raise SourceError(
            f"{where}: init_lora_weights is {str(initial)[:40]!r}: the factors belong to a base that PEFT "
            "changes on loading; save it converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    return Config(
        where,
        _rank(where, "r", data.get("r", 8)),
        _number(where, "lora_alpha", data.get("lora_alpha", 8)),
        {
            k: _rank(where, f"rank_pattern {k!r}", v)
            for k, v in _patterns(where, data, "rank_pattern")
        },
        {
            k: _number(where, f"alpha_pattern {k!r}", v)
            for k, v in _patterns(where, data, "alpha_pattern")
        },
        bool(data.get("use_rslora")),
        bool(data.get("use_dora")),
        bool(data.get("ensure_weight_tying")),
        _tokens(where, data.get("trainable_token_indices")),
        str(data.get("base_model_name_or_path") or ""),
    )


def _rank(where: str, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise SourceError(
            f"{where}: {key} is {str(value)[:40]!r}; it must be a whole number from 1"
        )
    return value


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise SourceError(f"{where}: {key} is {str(value)[:40]!r}; it must be a number")
    return float(value)


def _patterns(where: str, data: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """The entries of rank_pattern or alpha_pattern; their keys are regular expressions of a stranger."""
    table = data.get(key) or {}
    if not isinstance(table, dict):
        raise SourceError(f"{where}: {key} is not a table of modules")
    if len(table) > PATTERNS:
        raise SourceError(f"{where}: {key} has {len(table)} patterns; at most {PATTERNS} are read")
    for pattern in table:
        if not is_readable(pattern):
            raise SourceError(
                f"{where}: {key} has {pattern[:60]!r}; name the modules, with {ALLOWED} alone, in at most "
                f"{LONGEST} characters"
            )
    yield from table.items()


def _tokens(where: str, value: Any) -> dict[str, tuple[int, ...]]:
    table = value if isinstance(value, dict) else {"embed_tokens": value} if value else {}
    for rows in table.values():
        if not isinstance(rows, list) or any(type(row) is not int or row < 0 for row in rows):
            raise SourceError(f"{where}: trainable_token_indices must be lists of token numbers")
    return {module: tuple(rows) for module, rows in table.items()}


def changes(
    config: Config,
    adapter: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    *,
    label: str,
    model_type: str,
    grown: Mapping[str, str],
    headless: bool = False,
) -> dict[str, Change]:
    """What the adapter does, by the base's tensor names; every tensor of the adapter is used.

    grown: the base's tensors that may have more rows in the adapter. headless: what it does to a head that
    the base has not (see `lost_head`) is left out. Raises SourceError, naming a tensor,
    where adapter and base (`label`) do not fit together.
    """
    lost = lost_head(adapter, base) if headless else set()
    fit = _Fit(config, {n: i for n, i in adapter.items() if n not in lost}, base, label, model_type)
    found: dict[str, Change] = {}
    for name, target in fit.whole_tensors():
        if target in found:
            raise SourceError(
                f"{config.where}: {found[target].whole!r} and {name!r} are both {target!r}"
            )
        if target not in grown or not fit.is_grown(name, target):
            fit.check(name, target, base[target].shape)
        found[target] = Change(whole=name)
    for module, names in fit.parts().items():
        for target, change in fit.changes_of(module, names):
            before = found.get(target, Change())
            if before.product or before.rows:
                raise SourceError(
                    f"{config.where}: changes {target!r} of {label} twice; merge one at a time"
                )
            found[target] = replace(change, whole=before.whole)
    return found


def lost_head(adapter: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]) -> set[str]:
    """The adapter's tensors for a head of its own, where the base has none: its embedding is its head."""
    head = HEAD.removesuffix("weight")
    names = {name: WRAPPER.sub("", name.removeprefix(PREFIX)) for name in adapter}
    return (
        set()
        if Names(base).fitting(HEAD)
        else {n for n, of in names.items() if of.startswith(head)}
    )


@dataclass(frozen=True)
class _Fit:
    """An adapter's tensors against those of its base."""

    config: Config
    adapter: Mapping[str, TensorInfo]
    base: Mapping[str, TensorInfo]
    label: str
    model_type: str

    def whole_tensors(self) -> Iterator[tuple[str, str]]:
        """Tensors that stand in the place of one of the base (modules_to_save, bias), with its name.

        Not the head that is kept the same as the embedding, where the base has none of its own, and not what
        PEFT writes again under the name of its wrapper (bias: all) and does not read.
        """
        for name in self.adapter:
            key = WRAPPER.sub("", name.removeprefix(PREFIX))
            same = self.config.keeps_tied and key == HEAD and key not in self.base
            again = SAVED.sub("", name) if SAVED.search(name) else None
            if not same and again not in self.adapter and not PART.fullmatch(key):
                yield name, self.place(name, key)

    def parts(self) -> dict[str, dict[str, str]]:
        """Module -> part (lora_A.weight, ...) -> tensor."""
        found: dict[str, dict[str, str]] = {}
        for name in self.adapter:
            if match := PART.fullmatch(name.removeprefix(PREFIX)):
                part = found.setdefault(match["module"], {})
                if other := part.get(match["part"]):
                    raise SourceError(f"{self.config.where}: {other!r} and {name!r} are the same")
                part[match["part"]] = name
        return found

    def changes_of(self, module: str, parts: Mapping[str, str]) -> Iterator[tuple[str, Change]]:
        """The changes of the tensors of one module, by the base's names."""
        left = dict(parts)
        plain = WRAPPER.sub("", module)
        target = self.place(next(iter(parts.values())), f"{plain}.weight")
        if rows := left.pop("token_adapter.trainable_tokens_delta", None):
            yield target, self.new_rows(rows, module, target)
        a, b = left.pop("lora_A.weight", None), left.pop("lora_B.weight", None)
        embedded = "lora_embedding_A" in left
        if embedded:
            a, b = left.pop("lora_embedding_A"), left.pop("lora_embedding_B", None)
        magnitude = left.pop("lora_magnitude_vector", "") if self.config.dora else ""
        if a and b:
            yield target, Change(product=self.product(module, target, a, b, magnitude, embedded))
            if bias := left.pop("lora_B.bias", None):
                place = self.place(bias, f"{plain}.bias")
                self.check(bias, place, self.base[place].shape)
                yield place, Change(added=bias, scale=self.config.scale_of(module))
        if spare := [*left.values(), *(n for n in (a, b) if n and not (a and b))]:
            raise SourceError(
                f"{self.config.where}: {spare[0]!r} stands alone; the file is not whole"
            )
        if self.config.dora and not magnitude and a:
            raise SourceError(
                f"{self.config.where}: use_dora, but {module} has no lora_magnitude_vector"
            )

    def product(
        self, module: str, target: str, a: str, b: str, magnitude: str, embedded: bool
    ) -> Product:
        rank, shape = self.config.rank_of(module), self.base[target].shape
        transposed = embedded or self.is_transposed(
            target, self.adapter[a].shape, self.adapter[b].shape
        )
        outs, ins = (shape[::-1] if transposed else shape) if len(shape) == 2 else (0, 0)
        self.check(a, target, (rank, ins))
        self.check(b, target, (outs, rank))
        if magnitude:
            self.check(magnitude, target, (outs,))
        return Product(a, b, self.config.scale_of(module), transposed, magnitude)

    def is_transposed(self, target: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        """Whether the base stores [in, out]. The config's fan_in_fan_out does not tell: PEFT corrects it
        as it meets each layer and saves what the last one left."""
        shape, leaf = self.base[target].shape, target.split(".")[-2]
        if len(a) == len(b) == 2 and (b[0], a[1]) != (a[1], b[0]):
            return shape == (a[1], b[0])
        return self.model_type in CONV1D and leaf in CONV1D_LAYERS

    def new_rows(self, name: str, module: str, target: str) -> Change:
        indices = next(
            (rows for key, rows in self.config.tokens.items() if f".{module}".endswith(f".{key}")),
            (),
        )
        self.check(name, target, (len(indices), *self.base[target].shape[1:]))
        if indices and max(indices) >= self.base[target].rows:
            raise SourceError(
                f"{self.config.where}: trains token {max(indices)}, but {target!r} of {self.label} has "
                f"{self.base[target].rows} rows; give the base that has these tokens"
            )
        return Change(rows=name, indices=indices)

    def check(self, name: str, target: str, wanted: tuple[int, ...]) -> None:
        """Raises SourceError unless the adapter's tensor has the shape that the base's tensor asks for."""
        info, stored = self.adapter[name], self.base[target]
        if info.dtype not in FLOATS or stored.dtype not in FLOATS:
            raise SourceError(
                f"{self.config.where}: {name!r} is {info.dtype} and {target!r} of {self.label} is "
                f"{stored.dtype}; only floats can be adapted"
            )
        if info.shape == wanted:
            return
        todo = "it is an adapter of another base"
        if wanted[1:] == stored.shape[1:] and self.is_grown(name, target):
            todo = "its vocabulary was resized, and it brings no tokenizer.json that tells the new tokens"
        raise SourceError(
            f"{self.config.where}: {name!r} has shape {list(info.shape)}, but {list(wanted)} would fit "
            f"{target!r} of {self.label}, {list(stored.shape)}; {todo}"
        )

    def is_grown(self, name: str, target: str) -> bool:
        """Whether the adapter's tensor is the base's with more rows."""
        info, stored = self.adapter[name], self.base[target]
        return info.shape[1:] == stored.shape[1:] and info.rows > stored.rows

    def place(self, name: str, wanted: str) -> str:
        """The base's name for the tensor `wanted`, which the adapter's tensor `name` is for."""
        found = self.names.fitting(wanted)
        if len(found) > 1:
            raise SourceError(
                f"{self.config.where}: {name!r} may belong to {found[0]!r} or {found[1]!r} of {self.label}"
            )
        if not found:
            tied = "its embedding is its head: untie the two first, or, in a mixture, leave it out "
            tied += "(saved_modules: base)"
            raise SourceError(
                f"{self.config.where}: {name!r} belongs to {wanted!r}, which {self.label} lacks; "
                f"{tied if wanted == HEAD else 'it is an adapter of another base'}"
            )
        return found[0]

    @cached_property
    def names(self) -> Names:
        return Names(self.base)
