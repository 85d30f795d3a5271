"""Layers put together anew: config.json for them, and whether the architecture can express it.

What config.json says layer by layer is an aspect: a list, numbers of layers, or a rule over positions.
Each is read at the layers' origins and must read the same in the result; where it does not, it is
written anew: as a list where the architecture takes one, else as another period or threshold if one fits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from merge.anatomy import (
    TEXT_SECTIONS,
    Section,
    at,
    count_keys,
    layer_count,
    layer_of,
    renamed,
    sections,
)
from merge.errors import PlanError

Origin = tuple[Section, int]  # config.json of a layer's model, and the layer's number there
Kinds = list[Any]  # one value a layer


@dataclass(frozen=True)
class Aspect:
    """Something that config.json says of every layer, or nothing (None). `write` may be unable (None)."""

    key: str
    read: Callable[[Section, int], Kinds | None]  # a table of config.json and its number of layers
    write: Callable[
        [Section, Kinds], dict[str, Any] | None
    ]  # -> values to set, so that it reads so


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
    "minimax": ("", 2, FULL, LINEAR),
}
# As above where the first layer of a period is the odd one.
LEADING = {
    "modernbert": ("global_attn_every_n_layers", 3, FULL, SLIDING),
    "modernbert-decoder": ("global_attn_every_n_layers", 3, FULL, SLIDING),
    "cwm": ("", 4, FULL, SLIDING),
}
# Full attention below max_window_layers, if use_sliding_window is set.
WINDOWED = {"qwen2", "qwen3", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "dots1"}

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
}
# Lists that tell nothing of layers, even if there are as many entries.
NOT_LAYERS = {
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "mrope_section",
    "attention_types",
    "block_types",
    "mlp_only_layers",
    "kv_source_layers",
    "encoder_hash_byte_group_size",
    "time_step_limit",
    "mamba_dt_limit",
}
PER_LAYER = {  # lists known to have an entry a layer
    *("mlp_layer_types", "layers_block_type", "layer_block_types", "attn_layers"),
    *("attention_layers", "attention_window", "layer_rope_theta", "indexer_types"),
    *("activation_sparsity_pattern", "intermediate_size", "num_key_value_heads", "block_configs"),
    *("hybrid_override_pattern", "hybrid_layer_pattern", "moe_layer_freq", "attn_type_list"),
    *("num_attention_heads_per_layer", "num_attention_heads", "num_query_heads", "num_kv_heads"),
    *("ffn_multipliers", "sliding_windows", "moe_topk", "num_shared_expert", "sliding_window"),
    *("moe_intermediate_size", "num_experts", "swa_layers", "dense_layers"),
}
# Keys that tie layers to each other or to their numbers; model types that do so without a key.
BOUND = {
    "num_kv_shared_layers": "its last layers use keys and values of earlier ones",
    "hidden_size_per_layer_input": "its embeddings hold a part for every layer",
    "kv_source_layers": "its layers use keys and values of others",
    "use_cla": "its layers share keys and values",
    "scale_attn_by_inverse_layer_idx": "its attention is scaled by the layer's number",
    "n_layers_per_attn_res_block": "its layers are grouped",
    "attn_res_block_size": "its layers are grouped",
}
BOUND_TYPES = {
    "zamba": "its layers share one attention block",
    "zamba2": "its layers share attention blocks",
    "switch_transformers": "its experts lie at every n-th layer, n by the number of layers",
    "idefics": "its cross-attention lies between every n-th layer",
    "phi3small": "its dense attention lies at every n-th layer",
    "inkling2": "its layers are grouped",
}


POSITIONAL: set[str] = set()


def stacked_config(
    config: Section, stack: str, origins: Sequence[Origin]
) -> tuple[dict[str, Any], list[str]]:
    """config.json of a model whose layer i is layer origins[i], and notes; all else is as in `config`.

    stack: the stack that is built (anatomy.main_stack, or a module's). Raises PlanError where the
    architecture cannot express such layers.
    """
    result: dict[str, Any] = deepcopy(dict(config))
    paths = list(sections(config, stack))
    if not paths:
        raise PlanError(f"config.json: no known key has the number of layers of {stack}")
    for of, number in origins:
        if not 0 <= number < (layers := layer_count(of, stack) or 0):
            raise PlanError(f"layer {number} of {stack}: the model has layers 0 to {layers - 1}")
    notes: list[str] = []
    for path in paths:
        sources = [(_table(of, stack, path), number) for of, number in origins]
        changed, said = _restacked(at(config, path), stack, sources)
        _put(result, path, changed)
        notes += said
    return result, list(dict.fromkeys(notes))


def layer_kinds(config: Section, stack: str) -> list[dict[str, Any]]:
    """What config.json says of every layer of `stack`, by key; layers of one kind have equal dicts."""
    paths = list(sections(config, stack))
    if not paths:
        return []
    table = at(config, paths[-1])
    layers = _count(table, stack)
    said = {aspect.key: aspect.read(table, layers) for aspect in _aspects([(table, layers)])}
    return [{key: kinds[i] for key, kinds in said.items() if kinds} for i in range(layers)]


def check_places(
    label: str,
    names: Iterable[str],
    config: Section,
    stack: str,
    numbers: Mapping[int, int],
    layers: int,
) -> None:
    """Raises PlanError where a layer of a model cannot stand where it is put among `layers`.

    numbers: place in the result -> layer of this model. A layer with other tensors than its kind has
    them because of its place, as T5's first layer holds the position bias of all: it keeps the place.
    """
    own = layer_count(config, stack) or 0
    odd = _odd_layers(names, config, stack)
    for place, number in numbers.items():
        keeps = place == layers - 1 if number == own - 1 else place == number
        takes = (place == 0 and 0 in odd) or (place == layers - 1 and own - 1 in odd)
        if (number in odd and not keeps) or (number not in odd and takes):
            culprit = number if number in odd else (0 if place == 0 else own - 1)
            raise PlanError(
                f"{label}: layer {number} cannot become layer {place}: layer {culprit} differs from its "
                f"kind in {odd[culprit]!r}, which goes with its place; leave it there"
            )


def _restacked(
    table: Section, stack: str, sources: Sequence[tuple[Section, int]]
) -> tuple[dict[str, Any], list[str]]:
    """One table of config.json for layers that are layers of other tables, and notes."""
    result, layers, before = deepcopy(dict(table)), len(sources), _count(table, stack)
    if [number for _, number in sources] == list(range(before)) and all(
        s == table for s, _ in sources
    ):
        return result, []
    counts = [(source, _count(source, stack)) for source, _ in sources]
    for source in [table, *(source for source, _ in sources)]:
        _check_unbound(source)
    result |= {key: layers for key in count_keys(table, stack) if isinstance(table[key], int)}
    notes = []
    for aspect in _aspects([(table, before), *counts]):
        said = [aspect.read(source, count) for source, count in counts]
        if all(kinds is None for kinds in said):
            continue
        if None in said:
            raise PlanError(
                f"config.json: {aspect.key} is said of some layers and not of others; merge models "
                f"that all have it, or add it to the config.json that lacks it"
            )
        wanted = [kinds[n] for kinds, (_, n) in zip(said, sources, strict=True) if kinds]
        if aspect.read(result, layers) != wanted:
            result |= aspect.write(result, wanted) or {}
            _check_reads(aspect, result, wanted)
            if aspect.key not in KNOWN:
                notes.append(f"config.json: {aspect.key} seems to have an entry a layer; rebuilt")
    return result, notes


def _check_reads(aspect: Aspect, table: Section, wanted: Kinds) -> None:
    got = aspect.read(table, len(wanted)) or []
    wrong = [
        place
        for place, kinds in enumerate(zip(got, wanted, strict=False))
        if len({*map(repr, kinds)}) > 1
    ]
    if wrong:
        raise PlanError(
            f"config.json: by {aspect.key}, layer {wrong[0]} would be {got[wrong[0]]!r}, but it was "
            f"{wanted[wrong[0]]!r} at its origin; choose layers so that those at such places are alike"
        )
    assert got == wanted, aspect.key


def _check_unbound(table: Section) -> None:
    reasons = {f"{key} is set": why for key, why in BOUND.items() if table.get(key)}
    kind = table.get("model_type")
    if kind in BOUND_TYPES:
        reasons[f"model_type is {kind}"] = BOUND_TYPES[kind]
    if kind in POSITIONAL and not table.get("layer_types"):
        reasons[f"model_type is {kind} without layer_types"] = "its layers differ by their number"
    for what, why in reasons.items():
        raise PlanError(f"config.json: {what}: {why}, so that they cannot be put together anew")


def _odd_layers(names: Iterable[str], config: Section, stack: str) -> dict[int, str]:
    """Layers with other tensors than most of their kind -> a tensor that tells them apart."""
    tensors: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if (layer := layer_of(name)) and layer[0] == stack:
            tensors[layer[1]].add(renamed(name, stack, 0).removeprefix(f"{stack}.0."))
    alike: dict[str, list[set[str]]] = defaultdict(list)
    kinds = [repr(kind) for kind in layer_kinds(config, stack)]
    for number, kind in reversed(list(enumerate(kinds))):  # the usual is what later layers have
        alike[kind].append(tensors[number])
    usual = {kind: max(found, key=found.count) for kind, found in alike.items()}
    differences = {
        number: sorted(tensors[number] ^ usual[kind]) for number, kind in enumerate(kinds)
    }
    return {number: found[0] for number, found in differences.items() if found}


def _table(config: Section, stack: str, path: tuple[str, ...]) -> Section:
    """The table of another model that answers to the one at `path`."""
    paths = list(sections(config, stack))
    return at(config, path if path in paths else paths[-1])


def _put(config: dict[str, Any], path: Sequence[str], table: dict[str, Any]) -> None:
    """Outer tables come first: they bring their inner ones along as they were."""
    if not path:
        config.update(table)
        return
    *outer, last = path
    for key in outer:
        config = config[key]
    config[last] = table


def _count(table: Section, stack: str) -> int:
    value = table[count_keys(table, stack)[0]]
    return value if isinstance(value, int) else len(value)


def _aspects(tables: Sequence[tuple[Section, int]]) -> Iterator[Aspect]:
    """Rules, and lists that have an entry a layer in the first table, or are known to have."""
    yield from RULES
    yield from (_indexed(key, first) for key, first in INDEXES.items())
    first, layers = tables[0]
    for key in dict.fromkeys(key for table, _ in tables for key in table):
        value = first.get(key)
        like = isinstance(value, list) and len(value) == layers and layers > 1
        if key in PER_LAYER or (like and key not in NOT_LAYERS and key not in RULED):
            yield _listed(key, layers)


def _listed(key: str, before: int) -> Aspect:
    """A list with an entry a layer; more entries are of layers that predict further tokens."""

    def read(table: Section, layers: int) -> Kinds | None:
        value = table.get(key)
        if not isinstance(value, list | str) or not value:
            return None
        further = table.get("num_nextn_predict_layers") or 0
        return list(value[:layers]) if len(value) in (layers, layers + further) else None

    def write(table: Section, kinds: Kinds) -> dict[str, Any]:
        value = table.get(key)
        if isinstance(value, str):
            return {key: "".join(kinds)}
        return {key: kinds + (value[before:] if isinstance(value, list) else [])}

    return Aspect(key, read, write)


def _indexed(key: str, first: int) -> Aspect:
    """A list of layers of which something holds, maybe as text (3,4,5) or in a table of its own."""
    outer, _, inner = key.rpartition(".")

    def read(table: Section, layers: int) -> Kinds | None:
        value = (table.get(outer) or {} if outer else table).get(inner)
        if isinstance(value, str):
            value = [int(number) for number in value.split(",") if number.strip().isdecimal()]
        return [i + first in value for i in range(layers)] if isinstance(value, list) else None

    def write(table: Section, kinds: Kinds) -> dict[str, Any]:
        numbers = [i + first for i, holds in enumerate(kinds) if holds]
        if outer:
            return {outer: {**table[outer], inner: numbers}}
        as_text = isinstance(table.get(inner), str)
        return {inner: ",".join(map(str, numbers)) if as_text else numbers}

    return Aspect(key, read, write)


def _never(table: Section, kinds: Kinds) -> None:
    """For what no key can say of single layers."""


def _read_layer_types(table: Section, layers: int) -> Kinds | None:
    kind, said = table.get("model_type"), table.get("layer_types")
    if isinstance(said, list):
        return _listed("layer_types", 0).read(table, layers)
    if kind in WINDOWED:
        full = table.get("max_window_layers", layers) if table.get("use_sliding_window") else layers
        return [SLIDING if i >= full else FULL for i in range(layers)]
    if kind not in PERIODS and kind not in LEADING:
        return None
    key, default, marked, others = {**PERIODS, **LEADING}[kind]
    period, at_end = table.get(key) or default, kind in PERIODS
    return [others if (i + at_end) % period else marked for i in range(layers)]


def _write_layer_types(table: Section, kinds: Kinds) -> dict[str, Any] | None:
    takes = "layer_types" in table or table.get("model_type") in {*WINDOWED, *PERIODS, *LEADING}
    return {"layer_types": kinds} if takes else None


def _every(key: str) -> Aspect:
    """A period that is all that config.json says, for an architecture that is not known."""

    def read(table: Section, layers: int) -> Kinds | None:
        period, kind = table.get(key), table.get("model_type")
        known = isinstance(table.get("layer_types"), list) or kind in {*PERIODS, *LEADING}
        if known or not isinstance(period, int) or period < 1:
            return None
        return [(i + 1) % period == 0 for i in range(layers)]

    return Aspect(key, read, _never)


def _read_window(table: Section, layers: int) -> Kinds | None:
    start, known = table.get("max_window_layers"), isinstance(table.get("layer_types"), list)
    if known or not isinstance(start, int) or not table.get("use_sliding_window"):
        return None
    return None if table.get("model_type") in WINDOWED else [i >= start for i in range(layers)]


def _from(key: str) -> Aspect:
    """Experts from a layer on, every moe_layer_freq-th where that is a number."""

    def read(table: Section, layers: int) -> Kinds | None:
        start, step = table.get(key), table.get("moe_layer_freq", 1)
        if not isinstance(start, int) or isinstance(table.get("mlp_layer_types"), list):
            return None
        step = step if isinstance(step, int) and step > 0 else 1
        return [i >= start and i % step == 0 for i in range(layers)]

    def write(table: Section, kinds: Kinds) -> dict[str, Any]:
        return {key: kinds.index(True) if True in kinds else len(kinds)}

    return Aspect(key, read, write)


def _periodic(name: str) -> Aspect:
    """Jamba's layers: every {name}_period-th from {name}_offset on; written as what period fits."""
    keys = f"{name}_period", f"{name}_offset"

    def read(table: Section, layers: int) -> Kinds | None:
        period, offset = (table.get(key) for key in keys)
        if not isinstance(period, int) or not isinstance(offset, int) or period < 1:
            return None
        return [i % period == offset for i in range(layers)]

    def write(table: Section, kinds: Kinds) -> dict[str, Any] | None:
        places = range(len(kinds))
        for period in range(1, len(kinds) + 2):
            for offset in range(period):
                if [i % period == offset for i in places] == kinds:
                    return dict(zip(keys, (period, offset), strict=True))
        return None

    return Aspect(keys[0], read, write)


def _read_sparse(table: Section, layers: int) -> Kinds | None:
    step, dense = table.get("decoder_sparse_step"), table.get("mlp_only_layers")
    if step is None and dense is None:
        return None
    return [i not in (dense or ()) and (i + 1) % (step or 1) == 0 for i in range(layers)]


def _write_sparse(table: Section, kinds: Kinds) -> dict[str, Any] | None:
    if "mlp_only_layers" not in table:
        return None
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, s in enumerate(kinds) if not s]}


def _read_ernie(table: Section, layers: int) -> Kinds | None:
    start, end, step = (
        table.get(f"moe_layer_{k}") for k in ("start_index", "end_index", "interval")
    )
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    last = end if isinstance(end, int) and end >= 0 else layers - 1
    return [start <= i <= last and (i + 1) % step == 0 for i in range(layers)]


def _write_ernie(table: Section, kinds: Kinds) -> dict[str, Any] | None:
    if True not in kinds:
        return None
    places = [i for i, sparse in enumerate(kinds) if sparse]
    return {"moe_layer_start_index": places[0], "moe_layer_end_index": places[-1]}


def _read_moe_layers(table: Section, layers: int) -> Kinds | None:
    said, step = table.get("moe_layers"), table.get("interleave_moe_layer_step")
    if isinstance(said, list):
        return [i in said for i in range(layers)]
    return [(i + 1) % step == 0 for i in range(layers)] if step else None


def _write_moe_layers(table: Section, kinds: Kinds) -> dict[str, Any]:
    return {"moe_layers": [i for i, sparse in enumerate(kinds) if sparse]}


def _read_no_rope(table: Section, layers: int) -> Kinds | None:
    said, interval = table.get("no_rope_layers"), table.get("no_rope_layer_interval")
    if said:
        return list(said) if len(said) == layers else None
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
    if not isinstance(said, list):
        return None
    kinds = [kind for group, times in said for _ in range(times) for kind in group]
    return kinds if len(kinds) == layers else None


def _write_attention_types(table: Section, kinds: Kinds) -> dict[str, Any]:
    return {"attention_types": [[kinds, 1]]}


def _read_overrides(table: Section, layers: int) -> Kinds | None:
    said = table.get("per_layer_config")
    if not isinstance(said, dict):
        return None
    numbered = {int(number): value for number, value in said.items()}
    return [numbered.get(i) for i in range(layers)]


def _write_overrides(table: Section, kinds: Kinds) -> dict[str, Any]:
    digits = len(str(len(kinds) - 1))  # as transformers writes them, so that they sort
    said = {str(i).zfill(digits): value for i, value in enumerate(kinds) if value is not None}
    return {"per_layer_config": said}


RULES = (
    Aspect("layer_types", _read_layer_types, _write_layer_types),
    Aspect("max_window_layers", _read_window, _never),
    *map(
        _every, ("sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval")
    ),
    *map(_from, ("first_k_dense_replace", "num_dense_layers")),
    *map(_periodic, ("attn_layer", "expert_layer")),
    Aspect("mlp_only_layers", _read_sparse, _write_sparse),
    Aspect("moe_layer_start_index", _read_ernie, _write_ernie),
    Aspect("moe_layers", _read_moe_layers, _write_moe_layers),
    Aspect("no_rope_layers", _read_no_rope, _write_no_rope),
    Aspect("block_types", _read_block_types, _write_block_types),
    Aspect("attention_types", _read_attention_types, _write_attention_types),
    Aspect("per_layer_config", _read_overrides, _write_overrides),
)
RULED = {*INDEXES, *(rule.key for rule in RULES)}
KNOWN = {*PER_LAYER, *RULED}
