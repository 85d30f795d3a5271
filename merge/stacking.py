"""Layers put together anew: config.json for them, and whether the architecture can express it.

Everything that config.json says layer by layer (see kinds.py) is read at the layers' origins and must read
the same in the result. Where it does not, it is written anew: as a list where the architecture takes
one, else as another period or threshold if one fits.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from merge.anatomy import Section, at, count_keys, counted, layer_count, layer_tensors, sections
from merge.errors import PlanError
from merge.kinds import KNOWN, PER_LAYER, Aspect, Kinds, aspects, listed, model_type

Origin = tuple[Section, int]  # config.json of a layer's model, and the layer's number there

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
    "led": "its attention_window counts the layers of one half",
    "nllb-moe": "its experts lie at every n-th layer of both halves",
    "idefics": "its cross-attention lies between every n-th layer",
    "phi3small": "its dense attention lies at every n-th layer",
    "inkling2": "its layers are grouped",
}


# Keys -> model types whose layers differ by their number in ways that are not known here, unless config.json
# has one of the keys.
NEEDED = {
    tuple(keys.split("|")): frozenset(kinds.split())
    for keys, kinds in {
        "layer_types": "bailing_hybrid beam cohere2_moe deepseek_v4 diffusion_gemma_text dots3_note_text "
        "flint gemma3n_text gemma4_text gemma4_unified_text glm5_next_text lfm3 muse_glimmer_text "
        "muse_spark_text neomme qwen4_exp_text t5gemma2_decoder t5gemma2_text",
        "layer_types|hybrid_layer_pattern": "mimo_v2_flash",
        "layer_types|linear_attn_config": "kimi_linear",
        "layer_types|local_layer_ids": "inkling_text",
        "mlp_layer_types|first_k_dense_replace": "axk1 axk2 beam deepseek_v32 deepseek_v4 "
        "ernie4_5_vl_moe_text glm4_moe_lite glm5_next_text hy_v3 hy_v4 kimi_linear laguna step3p5 "
        "unlimited_ocr_text",
        "first_k_dense_replace": "deepseek_v2 deepseek_v3 dots1 glm4_moe glm4v_moe_text",
        "num_dense_layers": "afmoe lfm2_moe",
        "moe_layer_start_index": "ernie4_5_moe",
        "indexer_types": "glm5_next_text glm_moe_dsa hy_v4",
        "no_rope_layers|no_rope_layer_interval": "llama4_text smollm3",
        "cross_attention_layers": "mllama_text_model",
        "attn_layer_period": "jamba",
        "expert_layer_period": "jamba",
        "attention_types": "gpt_neo",
        "block_types": "recurrent_gemma",
    }.items()
}


def stacked_config(
    config: Section, stack: str, origins: Sequence[Origin]
) -> tuple[dict[str, Any], list[str]]:
    """config.json of a model whose layer i is layer origins[i], and notes; all else is as in `config`.

    stack: the stack that is built (anatomy.main_stack, or a module's). Raises PlanError where the
    architecture cannot express such layers.
    """
    result: dict[str, Any] = deepcopy(dict(config))
    paths = sections(config, stack)
    if not paths:
        raise PlanError(f"config.json: no known key has the number of layers of {stack}")
    for of, number in origins:
        layers = layer_count(of, stack) or 0
        if not 0 <= number < layers:
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
    paths = sections(config, stack)
    if not paths:
        return []
    table = at(config, paths[-1])
    layers = counted(table, stack)
    said = {aspect.key: aspect.read(table, layers) for aspect in aspects([(table, layers)])}
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


def check_layers(
    config: Section, stack: str, layers: Sequence[tuple[str, Mapping[str, Any]]]
) -> None:
    """Raises PlanError where a stacked layer differs from the others of its kind by the new config.json.

    layers: for every layer the model that it comes from, and shapes by names within the layer. The first
    and the last layer may have other tensors (see check_places), but not of other shapes.
    """
    inner = range(1, len(layers) - 1)
    kinds = [repr(kind) for kind in layer_kinds(config, stack)]
    usual: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for place in (*inner, 0, len(layers) - 1):
        label, shapes = layers[place]
        first, like = usual.setdefault(kinds[place], layers[place])
        compared = shapes.keys() | like.keys() if place in inner else shapes.keys() & like.keys()
        if wrong := sorted(name for name in compared if shapes.get(name) != like.get(name)):
            found, other = shapes.get(wrong[0]), like.get(wrong[0])
            raise PlanError(
                f"{label}: tensor {wrong[0]!r} of what becomes layer {place} has shape {found}, but "
                f"{other} in a layer of {first} that config.json says is alike; stack models of one shape"
            )


def _restacked(
    table: Section, stack: str, sources: Sequence[tuple[Section, int]]
) -> tuple[dict[str, Any], list[str]]:
    """One table of config.json for layers that are layers of other tables, and notes."""
    result, layers, before = deepcopy(dict(table)), len(sources), counted(table, stack)
    if list(sources) == [(table, number) for number in range(before)]:
        return result, []
    counts = [(source, counted(source, stack)) for source, _ in sources]
    for source, count in [(table, before), *counts]:
        _check_unbound(source)
        _check_lengths(source, count)
    result |= {key: layers for key in count_keys(table, stack) if isinstance(table[key], int)}
    notes = []
    for aspect in aspects([(table, before), *counts]):
        said = [aspect.read(source, count) for source, count in counts]
        if all(kinds is None for kinds in said) and aspect.read(result, layers) is None:
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
    got = aspect.read(table, len(wanted)) or [None] * len(wanted)
    for place, (would, was) in enumerate(zip(got, wanted, strict=True)):
        if would != was:
            raise PlanError(
                f"config.json: by {aspect.key}, layer {place} would be {would!r}, but it was {was!r} at "
                f"its origin; choose layers so that those at such places are alike"
            )


def _check_unbound(table: Section) -> None:
    kind = model_type(table)
    reasons = [(f"{key} is set", why) for key, why in BOUND.items() if table.get(key)]
    reasons += [(f"model_type is {kind}", BOUND_TYPES[kind])] if kind in BOUND_TYPES else []
    for keys, kinds in NEEDED.items():
        if kind in kinds and not any(table.get(key) is not None for key in keys):
            reasons.append((f"has no {keys[0]}", "what a layer is then depends on its number"))
    for what, why in reasons:
        raise PlanError(
            f"config.json: {what}: {why}; the layers of such a model must stay in place"
        )


def _check_lengths(table: Section, layers: int) -> None:
    for key in (*PER_LAYER, "layer_types", "no_rope_layers"):
        value = table.get(key)
        if isinstance(value, list) and value and listed(key, 0).read(table, layers) is None:
            raise PlanError(
                f"config.json: {key} has {len(value)} entries, but there are {layers} layers; an entry "
                f"a layer is needed to put layers together anew"
            )


def _odd_layers(names: Iterable[str], config: Section, stack: str) -> dict[int, str]:
    """Layers with other tensors than most of their kind -> a tensor that tells them apart."""
    tensors = {number: set(layer) for number, layer in layer_tensors(names, stack).items()}
    alike: dict[str, list[set[str]]] = defaultdict(list)
    kinds = [repr(kind) for kind in layer_kinds(config, stack)]
    for number, kind in reversed(list(enumerate(kinds))):  # the usual is what later layers have
        alike[kind].append(tensors.get(number, set()))
    usual = {kind: max(found, key=found.count) for kind, found in alike.items()}
    differences = {
        number: sorted(tensors.get(number, set()) ^ usual[kind])
        for number, kind in enumerate(kinds)
    }
    return {number: found[0] for number, found in differences.items() if found}


def _table(config: Section, stack: str, path: tuple[str, ...]) -> Section:
    """The table of another model that answers to the one at `path`."""
    paths = sections(config, stack)
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
