"""What config.json says of every layer: lists, numbers of layers, and rules over positions.

An aspect reads what one key (or a few) says of each layer and can write it for other layers, if the
architecture takes it. Which architecture reads what is data; the periods are those of transformers.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.anatomy import Section

Kinds = list[Any]  # one value a layer


@dataclass(frozen=True)
class Aspect:
    """Something that config.json says of every layer, or nothing (None). `write` may be unable (None)."""

    key: str
    read: Callable[[Section, int], Kinds | None]  # a table of config.json, its number of layers
    write: Callable[[Section, Kinds], dict[str, Any] | None]  # values to set in the table


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
# model_type -> (key of the period, its default, the kind of the layers at the end of a period, of others):
# what layer_types is where config.json has none, as it had before transformers wrote it out.
PERIODS = {
    "gemma2": ("", 2, FULL, SLIDING),
    "vaultgemma": ("", 2, FULL, SLIDING),
    "t5gemma": ("", 2, FULL, SLIDING),
    "t5_gemma_module": ("", 2, FULL, SLIDING),
    "gemma3_text": ("sliding_window_pattern", 6, FULL, SLIDING),
    "cohere2": ("sliding_window_pattern", 4, FULL, SLIDING),
    "exaone4": ("sliding_window_pattern", 4, FULL, SLIDING),
    "gpt_oss": ("", 2, FULL, SLIDING),
    "olmo3": ("", 4, FULL, SLIDING),
    "afmoe": ("global_attn_every_n_layers", 4, FULL, SLIDING),
    "qwen3_next": ("full_attention_interval", 4, FULL, LINEAR),
    "qwen3_5_text": ("full_attention_interval", 4, FULL, LINEAR),
    "qwen3_5_moe_text": ("full_attention_interval", 4, FULL, LINEAR),
    "olmo_hybrid": ("", 4, FULL, LINEAR),
    "exaone_moe": ("sliding_window_pattern", 4, FULL, SLIDING),
    "kolibri1": ("", 5, FULL, SLIDING),
    "ultrabert": ("", 3, FULL, SLIDING),
}
# As above, but the first layer of a period is of the first kind.
LEADING = {
    "modernbert": ("global_attn_every_n_layers", 3, FULL, SLIDING),
    "modernbert-decoder": ("global_attn_every_n_layers", 3, FULL, SLIDING),
    "cwm": ("", 4, FULL, SLIDING),
    "granite_swa": ("", 4, FULL, SLIDING),
    "granitemoe_swa": ("", 4, FULL, SLIDING),
    "minimax": ("", 2, FULL, LINEAR),
}
# Full attention below max_window_layers, if use_sliding_window is set.
WINDOWED = {"qwen2", "qwen3", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "dots1"}

# Experts at every decoder_sparse_step-th layer but mlp_only_layers.
SPARSE_STEP = {"qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "qwen3_omni_moe_text"}

# Numbers of layers, and the number that the first layer has there.
INDEXES = {
    "attn_layer_indices": 0,
    "cross_attention_layers": 0,
    "full_attn_idxs": 0,
    "rope_scaling_layers": 0,
    "local_layer_ids": 0,
    "linear_attn_config.kda_layers": 1,
    "linear_attn_config.full_attn_layers": 1,
    "moe_layers_enum": 0,
    "global_attn_indexes": 0,
}
# Lists that tell nothing of layers, even if there are as many entries.
NOT_LAYERS = {
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "mrope_section", "mlp_only_layers", "kv_source_layers"),
    *("encoder_hash_byte_group_size", "time_step_limit", "mamba_dt_limit"),
}
PER_LAYER = {  # lists with an entry a layer
    *("mlp_layer_types", "layers_block_type", "layer_block_types", "attn_layers"),
    *("attention_layers", "attention_window", "layer_rope_theta", "activation_sparsity_pattern"),
    *("block_configs", "hybrid_override_pattern", "hybrid_layer_pattern", "attn_type_list"),
    *("num_attention_heads_per_layer", "sliding_windows", "num_query_heads", "ffn_multipliers"),
    *("indexer_types", "swa_layers"),
}
ONE_OR_EACH = {  # numbers of all layers, or lists with one for each
    *("intermediate_size", "num_attention_heads", "num_key_value_heads", "num_kv_heads"),
    *("moe_layer_freq", "moe_topk", "num_shared_expert", "moe_intermediate_size", "num_experts"),
    "sliding_window",
}
NUMBER = re.compile("[0-9]{1,9}")  # of a layer, as text


def aspects(tables: Sequence[tuple[Section, int]]) -> Iterator[Aspect]:
    """Rules, and lists that have an entry a layer, or are known to have."""
    layers = tables[0][1]
    yield _layer_types(layers)
    yield from RULES
    yield from (indexed(key, first) for key, first in INDEXES.items())
    for key in dict.fromkeys(key for table, _ in tables for key in table):
        lengths = [(len(t[key]), n) for t, n in tables if isinstance(t.get(key), list)]
        like = any(length == n and (n > 1 or key in ONE_OR_EACH) for length, n in lengths)
        if key in PER_LAYER or (like and key not in NOT_LAYERS and key not in RULED):
            yield listed(key, layers)


def listed(key: str, before: int) -> Aspect:
    """A list with an entry a layer; more entries are of layers that predict further tokens."""

    def read(table: Section, layers: int) -> Kinds | None:
        value = table.get(key)
        if not isinstance(value, list | str) or not value:
            return None
        further = _number(table, "num_nextn_predict_layers") or 0
        return list(value[:layers]) if len(value) in (layers, layers + further) else None

    def write(table: Section, kinds: Kinds) -> dict[str, Any]:
        value = table.get(key)
        if isinstance(value, str):
            return {key: "".join(kinds)}
        return {key: kinds + (value[before:] if isinstance(value, list) else [])}

    return Aspect(key, read, write)


def indexed(key: str, first: int) -> Aspect:
    """A list of layers of which something holds, maybe as text (3,4,5) or in a table of its own."""
    outer, _, inner = key.rpartition(".")

    def read(table: Section, layers: int) -> Kinds | None:
        holder = table.get(outer) if outer else table
        value = holder.get(inner) if isinstance(holder, Mapping) else None
        if isinstance(value, str):
            value = [int(number) for number in value.split(",") if NUMBER.fullmatch(number.strip())]
        return [i + first in value for i in range(layers)] if isinstance(value, list) else None

    def write(table: Section, kinds: Kinds) -> dict[str, Any]:
        numbers = [i + first for i, holds in enumerate(kinds) if holds]
        if outer:
            return {outer: {**table[outer], inner: numbers}}
        as_text = isinstance(table.get(inner), str)
        return {inner: ",".join(map(str, numbers)) if as_text else numbers}

    return Aspect(key, read, write)


def model_type(table: Section) -> str:
    """What config.json calls the architecture; empty where it does not."""
    kind = table.get("model_type")
    return kind if isinstance(kind, str) else ""


def _number(table: Section, key: str) -> int | None:
    """A whole number that is not negative; None where the key has none."""
    value = table.get(key)
    return value if isinstance(value, int) and value >= 0 else None


def _never(table: Section, kinds: Kinds) -> None:
    """For what no key can say of single layers."""


def _layer_types(before: int) -> Aspect:
    """A list as any other; without one, what transformers makes of periods and thresholds."""
    said = listed("layer_types", before)

    def read(table: Section, layers: int) -> Kinds | None:
        if isinstance(table.get("layer_types"), list):
            return said.read(table, layers)
        return _implied_layer_types(table, layers)

    def write(table: Section, kinds: Kinds) -> dict[str, Any] | None:
        takes = "layer_types" in table or model_type(table) in {*WINDOWED, *PERIODS, *LEADING}
        return said.write(table, kinds) if takes else None

    return Aspect("layer_types", read, write)


def _implied_layer_types(table: Section, layers: int) -> Kinds | None:
    kind = model_type(table)
    if kind in WINDOWED:
        start = _number(table, "max_window_layers") if table.get("use_sliding_window") else None
        return [FULL if start is None or i < start else SLIDING for i in range(layers)]
    if kind not in PERIODS and kind not in LEADING:
        return None
    key, default, marked, others = {**PERIODS, **LEADING}[kind]
    said = table.get(key)  # a number, or a letter for every layer of a period
    period = len(said) if isinstance(said, str) else _number(table, key) or default
    if others == SLIDING and table.get("sliding_window", 0) is None:
        return [FULL] * layers
    return [others if (i + (kind in PERIODS)) % period else marked for i in range(layers)]


def _every(key: str) -> Aspect:
    """A period that is all that config.json says, for an architecture that is not known."""

    def read(table: Section, layers: int) -> Kinds | None:
        known = model_type(table) in {*PERIODS, *LEADING} or isinstance(
            table.get("layer_types"), list
        )
        period = None if known else _number(table, key)
        return [(i + 1) % period == 0 for i in range(layers)] if period else None

    return Aspect(key, read, _never)


def _read_window(table: Section, layers: int) -> Kinds | None:
    known = model_type(table) in WINDOWED or isinstance(table.get("layer_types"), list)
    start = _number(table, "max_window_layers")
    if known or start is None or not table.get("use_sliding_window"):
        return None
    return [i >= start for i in range(layers)]


def _from(key: str) -> Aspect:
    """Experts from a layer on, every moe_layer_freq-th where that is a number."""

    def read(table: Section, layers: int) -> Kinds | None:
        start, step = _number(table, key), _number(table, "moe_layer_freq") or 1
        if start is None or isinstance(table.get("mlp_layer_types"), list):
            return None
        return [i >= start and i % step == 0 for i in range(layers)]

    def write(table: Section, kinds: Kinds) -> dict[str, Any]:
        return {key: kinds.index(True) if True in kinds else len(kinds)}

    return Aspect(key, read, write)


def _periodic(name: str) -> Aspect:
    """Jamba's layers: every {name}_period-th from {name}_offset on; written as what period fits."""
    keys = f"{name}_period", f"{name}_offset"

    def read(table: Section, layers: int) -> Kinds | None:
        period, offset = (_number(table, key) for key in keys)
        if not period or offset is None:
            return None
        return [i % period == offset for i in range(layers)]

    def write(table: Section, kinds: Kinds) -> dict[str, Any] | None:
        for period in range(1, len(kinds) + 2):
            for offset in range(period):
                if all((i % period == offset) == kind for i, kind in enumerate(kinds)):
                    return dict(zip(keys, (period, offset), strict=True))
        return None

    return Aspect(keys[0], read, write)


def _read_sparse(table: Section, layers: int) -> Kinds | None:
    step, dense = _number(table, "decoder_sparse_step"), table.get("mlp_only_layers")
    if not step and not isinstance(dense, list):
        return None
    return [i not in (dense or []) and (i + 1) % (step or 1) == 0 for i in range(layers)]


def _write_sparse(table: Section, kinds: Kinds) -> dict[str, Any] | None:
    if "mlp_only_layers" not in table and model_type(table) not in SPARSE_STEP:
        return None
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, s in enumerate(kinds) if not s]}


def _read_ernie(table: Section, layers: int) -> Kinds | None:
    start, step = _number(table, "moe_layer_start_index"), _number(table, "moe_layer_interval")
    end = _number(table, "moe_layer_end_index")
    if start is None or not step:
        return None
    last = layers - 1 if end is None else end
    return [start <= i <= last and (i + 1) % step == 0 for i in range(layers)]


def _write_ernie(table: Section, kinds: Kinds) -> dict[str, Any] | None:
    if True not in kinds:
        return None
    places = [i for i, sparse in enumerate(kinds) if sparse]
    return {"moe_layer_start_index": places[0], "moe_layer_end_index": places[-1]}


def _read_moe_layers(table: Section, layers: int) -> Kinds | None:
    said, step = table.get("moe_layers"), _number(table, "interleave_moe_layer_step")
    if isinstance(said, list):
        return [i in said for i in range(layers)]
    return [(i + 1) % step == 0 for i in range(layers)] if step else None


def _write_moe_layers(table: Section, kinds: Kinds) -> dict[str, Any]:
    return {"moe_layers": [i for i, sparse in enumerate(kinds) if sparse]}


def _read_no_rope(table: Section, layers: int) -> Kinds | None:
    interval = _number(table, "no_rope_layer_interval")
    if table.get("no_rope_layers"):
        return listed("no_rope_layers", 0).read(table, layers)
    return [int((i + 1) % interval != 0) for i in range(layers)] if interval else None


def _write_no_rope(table: Section, kinds: Kinds) -> dict[str, Any]:
    return {"no_rope_layers": kinds}


def _read_block_types(table: Section, layers: int) -> Kinds | None:
    said = table.get("block_types")
    return [said[i % len(said)] for i in range(layers)] if isinstance(said, list) and said else None


def _write_block_types(table: Section, kinds: Kinds) -> dict[str, Any]:
    return {"block_types": kinds}


def _read_attention_types(table: Section, layers: int) -> Kinds | None:
    said = table.get("attention_types")
    try:
        kinds = [kind for group, times in said or () for kind in list(group) * min(times, layers)]
    except (TypeError, ValueError):
        return None
    return kinds if len(kinds) == layers else None


def _write_attention_types(table: Section, kinds: Kinds) -> dict[str, Any]:
    return {"attention_types": [[kinds, 1]]}


def _read_overrides(table: Section, layers: int) -> Kinds | None:
    said = table.get("per_layer_config")
    if not isinstance(said, dict) or not all(map(NUMBER.fullmatch, said)):
        return None
    numbered = {int(number): value for number, value in said.items()}
    return [numbered.get(i) for i in range(layers)]


def _write_overrides(table: Section, kinds: Kinds) -> dict[str, Any]:
    digits = len(str(len(kinds) - 1))  # as transformers writes them, so that they sort
    said = {str(i).zfill(digits): value for i, value in enumerate(kinds) if value is not None}
    return {"per_layer_config": said}


RULES = (
    Aspect("max_window_layers", _read_window, _never),
    _every("sliding_window_pattern"),
    _every("global_attn_every_n_layers"),
    _every("full_attention_interval"),
    *map(_from, ("first_k_dense_replace", "num_dense_layers")),
    *map(_periodic, ("attn_layer", "expert_layer")),
    Aspect("decoder_sparse_step", _read_sparse, _write_sparse),
    Aspect("moe_layer_start_index", _read_ernie, _write_ernie),
    Aspect("moe_layers", _read_moe_layers, _write_moe_layers),
    Aspect("no_rope_layers", _read_no_rope, _write_no_rope),
    Aspect("block_types", _read_block_types, _write_block_types),
    Aspect("attention_types", _read_attention_types, _write_attention_types),
    Aspect("per_layer_config", _read_overrides, _write_overrides),
)
RULED = {"layer_types", *INDEXES, *(rule.key for rule in RULES)}
KNOWN = {*PER_LAYER, *ONE_OR_EACH, *RULED}
