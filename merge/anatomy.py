"""What the names of a model's tensors say: layers, modules, tied and recomputed tensors.

Nothing here knows an architecture. The field's models name things alike, and where they do not, the
words below say so; a model that uses other words still has layers and is merged name by name.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A config.json, or the table in it that describes one of several models.
Section = Mapping[str, Any]

# Parts of composite models: module -> words, of which one is in the path of each of its tensors. The first
# module that fits holds. The names of modules are mergekit's, which has Llama 4's tower as vision_model
# and what joins Qwen's towers (visual.merger) as multi_modal_projector.
COMPOSITE = {
    module: frozenset(words.split())
    for module, words in {
        "multi_modal_projector": "multi_modal_projector mm_projector modality_projection connector "
        "vision_language_adapter aligner generation_embeddings generation_aligner generation_head "
        "projector merger merger_list deepstack_merger_list qformer query_tokens language_projection "
        "perceiver_resampler resampler_model image_projection visual_projection mlp1 "
        "image_to_text_projection embed_vision embed_audio",
        "vision_tower": "vision_tower vision_model vision_encoder visual visual_encoder vision_backbone "
        "vision_embed_tokens image_tower image_encoder image_embed video_tower vit vqmodel sam_model "
        "high_res_vision_model high_res_vision_proj img_temporal_embedding",
        "audio_tower": "audio_tower audio_model audio_encoder audio_embed speech_encoder codec_model "
        "perception acoustic_tokenizer_encoder semantic_tokenizer_encoder ctc_timestamp diffusion_head",
        "protein_encoder": "protein_encoder",
    }.items()
}
TEXT = {"language_model", "text_model", "llm", "text_decoder"}  # what names a tower of text
SIDES = {  # a word of the path -> half of an encoder-decoder
    "encoder": "encoder",
    "decoder": "decoder",
    "text_encoder": "encoder",
    "text_decoder": "decoder",
    "transf_decoder": "decoder",
}
TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "global_config")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "num_blocks")
SIDE_COUNTS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
}
MOST_LAYERS = 100_000  # a config.json that claims more is none; lists of this length are made
KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern")  # their length is a count

# How the names of one model begin: with its head, without, as a tower, as a tower of a model without head.
BEGINNINGS = """
model. transformer. backbone. gpt_neox. bert. roberta. distilbert. electra. deberta. albert.
language_model. language_model.model. model.language_model. language_model.transformer.
text_model. model.text_model. text_model.model. llm. llm.model. model.llm. thinker. thinker.model.
vision_tower. vision_model. vision_tower.vision_model. model.vision_tower. model.vision_model.
model.vision_tower.vision_model. visual. model.visual.
"""
PREFIXES = ("", *BEGINNINGS.split())

EMBEDDING = re.compile(
    r"(^|\.)(shared|embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|tokens_embed|embeddings"
    r"|transformer\.w|embedding_projection)\.weight$"
)
HEAD = re.compile(
    r"(^|\.)(lm_head(\.decoder|\.out_proj)?|embed_out|proj_out|output_projection|vocab_projector"
    r"|generator_lm_head|lm_loss|pred_layer\.proj|predictions\.decoder|unembedding_projection)\.weight$"
    r"|^((transformer\.)?output(_layer)?|decoder)\.weight$"
)
PER_LAYER = re.compile(
    r"(^|\.)embed_tokens_per_layer\.weight$"
)  # beside the embedding, as many rows
OF_TOKENS = re.compile(
    r"(^|[._])(lm_head|predictions|embed_out|output|vocab_projector)(\.decoder)?\.bias$"
)
HEAD_BIAS = re.compile(r"^(?P<head>.*(predictions|lm_head))\.decoder\.bias$")
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
# Computed as a model is loaded; older versions of transformers stored them nevertheless.
RECOMPUTED = re.compile(
    r"(^|\.)(rotary\w*|rope)\.(inv_freq|cos_cached|sin_cached)$|(^|\.)(attn|attention)\.masked_bias$"
)
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # [1, 1, positions, positions]


@dataclass(frozen=True)
class Module:
    """A part of a model. `names`: its tensors. `stack`: the prefix of its layers, where it has layers."""

    names: tuple[str, ...]
    stack: str | None


def layer_of(name: str) -> tuple[str, int] | None:
    """The layer stack that a tensor belongs to and its number there: the first number in the name."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if NUMBER.fullmatch(part)), 0)
    return (".".join(parts[:place]), int(parts[place])) if place else None


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Sort key in which layer 2 comes before layer 10."""
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in name.split(".")]


def renamed(name: str, stack: str, number: int) -> str:
    """The name that a layer's tensor has in layer `number` of `stack`."""
    layer = layer_of(name)
    assert layer is not None, name
    rest = name.removeprefix(f"{layer[0]}.").partition(".")[2]
    return f"{stack}.{number}.{rest}" if rest else f"{stack}.{number}"


def layer_tensors(names: Iterable[str], stack: str) -> dict[int, dict[str, str]]:
    """The tensors of every layer of `stack`: layer -> name within the layer -> whole name."""
    layers: dict[int, dict[str, str]] = defaultdict(dict)
    for name in names:
        if (layer := layer_of(name)) and layer[0] == stack:
            layers[layer[1]][name.removeprefix(f"{stack}.{layer[1]}").removeprefix(".")] = name
    return dict(layers)


def main_stack(names: Iterable[str], config: Section) -> str | None:
    """The stack that layer ranges and gradients over layers speak of: the text decoder's, or the only one.

    None where there is none, and for encoder-decoders, whose modules each have one.
    """
    parts = modules(names, config)
    for module in ("text_decoder", "default"):
        if module in parts:
            return parts[module].stack
    return None


def modules(names: Iterable[str], config: Section) -> dict[str, Module]:
    """The parts of a model by name; every tensor is in exactly one.

    `default` alone for plain models; `encoder`, `decoder` and `shared` for encoder-decoders; otherwise
    `text_decoder` and the likes of `vision_tower` and `multi_modal_projector`.
    """
    names = list(names)
    towers = {word for name in names for word in _words(name) if word in TEXT}
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[_part(name, towers)].append(name)
    text = found.pop("text_decoder", [])
    if sides := _sides(text):
        found.update(sides)
    elif text:
        found["text_decoder" if found else "default"] = text
    if config.get("model_type") == "llama4" and "vision_tower" in found:
        found["vision_model"] = found.pop("vision_tower")
    return {part: Module(tuple(own), _stack(own, config, part)) for part, own in found.items()}


def beside_stack(module: Module) -> list[str]:
    """Numbered tensors of a module outside its stack: stacking its layers would leave them behind."""
    layers = [(name, layer_of(name)) for name in module.names]
    return [name for name, layer in layers if layer and layer[0] != module.stack]


def matched(reference: Iterable[str], other: Iterable[str]) -> dict[str, str]:
    """Tensors of `reference` -> the same tensors of `other`, which may begin otherwise (see PREFIXES).

    Equal names first; else where exactly one name fits, and it fits one tensor alone.
    """
    reference, theirs = list(dict.fromkeys(reference)), set(other)
    pairs = {name: name for name in reference if name in theirs}
    free, left = theirs - pairs.keys(), [name for name in reference if name not in pairs]
    bases = {f"{name.split('.')[0]}." for name in (*left, *free) if layer_of(name)}
    bases -= {f"{side}." for side in SIDES}
    fits = {name: _swaps(name, bases, free) for name in left}
    times = Counter(name for found in fits.values() for name in found)
    for name, found in fits.items():
        if len(found) == 1 and times[fit := found.pop()] == 1:
            pairs[name] = fit
    return pairs


def tied_heads(config: Section, stored: Iterable[str], heads: Iterable[str] = ()) -> dict[str, str]:
    """Copies of an embedding -> the embedding, which is `stored`: output heads, and halves that share one.

    Copies are sought among `stored` and `heads`, names of another checkpoint of the same model. Of those
    that are stored, only what config.json says outright is tied counts: a head of its own must not be lost.
    """
    stored = {
        name for name in stored if _part(name, set()) == "text_decoder" and not layer_of(name)
    }
    said = _said_tied(config)
    looked = {*stored, *heads} if said == {True} else set(heads) - stored
    found = [name for name in stored if EMBEDDING.search(name)]
    if not found or said == {False}:
        return {}
    first = min(found, key=_precedence)
    copies = {name: first for name in looked if HEAD.search(name) or _half_of(name, first)}
    for name in looked:
        bias = HEAD_BIAS.match(name)
        if bias and f"{bias['head']}.bias" in stored:
            copies[name] = f"{bias['head']}.bias"
    return copies


def token_tensors(names: Iterable[str]) -> dict[str, str]:
    """Tensors of the text model that by their names have a row for every token -> "embed", or "head" for what
    gives the logits; of embeddings the one first that the others are copies of."""
    stored = [n for n in names if _part(n, set()) == "text_decoder" and not layer_of(n)]
    embeddings = sorted((n for n in stored if EMBEDDING.search(n)), key=_precedence)
    beside = [n for n in stored if PER_LAYER.search(n)]
    heads = [n for n in stored if HEAD.search(n) or OF_TOKENS.search(n)]
    return dict.fromkeys([*embeddings, *beside], "embed") | dict.fromkeys(heads, "head")


def embedding_and_head(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The text model's input embedding and its output head, None where it has none of its own."""
    found = token_tensors(names)
    embedding = next((name for name in found if EMBEDDING.search(name)), None)
    return embedding, next((name for name in found if HEAD.search(name)), None)


def vocabulary_tensors(config: Section, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Those of token_tensors that do have a row for every token."""
    kinds = {
        name: kind
        for name, kind in token_tensors(shapes).items()
        if len(shapes[name]) == 2 or (shapes[name] and not EMBEDDING.search(name))
    }
    rows = {shapes[name][0] for name in [*kinds][:1]}
    return {name: kind for name, kind in kinds.items() if shapes[name][0] in rows}


def recomputed(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor is a table or mask that models compute as they are loaded."""
    return bool(RECOMPUTED.search(name) or (len(shape) == 4 and CAUSAL_MASK.search(name)))


def sections(config: Section, stack: str) -> list[tuple[str, ...]]:
    """Paths in config.json of all tables that count the layers of `stack`; the last one is its own.

    Settings of a text model may be repeated at the top.
    """
    side = _side(stack)
    inner: tuple[str, ...] = (*TEXT_SECTIONS, side, f"{side}_config") if side else TEXT_SECTIONS
    tower = "vision_config" in config and TEXT.isdisjoint(stack.split("."))
    if side == "encoder" and tower and config.get("is_encoder_decoder"):
        inner = ("vision_config",)  # the encoder reads pictures, as in Pix2Struct

    def walk(path: tuple[str, ...], section: Section) -> Iterator[tuple[str, ...]]:
        if count_keys(section, stack):
            yield path
        for key in inner:
            if isinstance(section.get(key), dict):
                yield from walk((*path, key), section[key])

    paths = list(walk((), config))
    counts = [counted(at(config, path), stack) for path in paths]
    return [path for path, count in zip(paths, counts, strict=True) if count == counts[-1]]


def count_keys(section: Section, stack: str) -> list[str]:
    """The keys of a table of config.json that hold the number of layers of `stack`."""
    side = _side(stack)
    own = [key for key in SIDE_COUNTS.get(side, ()) if _is_count(section.get(key))]
    others = [key for key in SIDE_COUNTS["decoder"] if section.get(key)]
    if own and side == "decoder":
        return own
    general = [key for key in COUNTS if _is_count(section.get(key))]
    if side == "encoder" and (own or others):  # num_hidden_layers then repeats the encoder's
        return own + [k for k in general if not own or section[k] == section[own[0]]]
    kinds = [key for key in KINDS if isinstance(section.get(key), list | str)]
    return own or [key for key in general if section[key] == section[general[0]]] or kinds[:1]


def counted(section: Section, stack: str) -> int:
    """The number of layers of `stack` by a table that has a key for it."""
    value = section[count_keys(section, stack)[0]]
    return value if isinstance(value, int) else len(value)


def layer_count(config: Section, stack: str) -> int | None:
    """The number of layers of `stack` by config.json; None where no key is known to hold it."""
    paths = sections(config, stack)
    return counted(at(config, paths[-1]), stack) if paths else None


def at(config: Section, path: Sequence[str]) -> Section:
    """The table of config.json at `path`."""
    for key in path:
        config = config[key]
    return config


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_LAYERS


def _part(name: str, towers: set[str]) -> str:
    """The module of a composite model; where a tower has a text word, what lies outside it is not text."""
    words = _words(name)
    for module, marks in COMPOSITE.items():
        if not words.isdisjoint(marks):
            return module
    path = name.removeprefix("model.").split(".")
    if towers.isdisjoint(words) and towers and path[0] in ("encoder", "decoder"):
        return path[0]
    return "text_decoder"


def _words(name: str) -> set[str]:
    """The words of the path before the layer's number: inside a layer they mean other things."""
    layer = layer_of(name)
    return set((layer[0] if layer else name).split("."))


def _side(name: str) -> str:
    """Half of an encoder-decoder that a path belongs to, by its first word for it; empty for none."""
    return next((SIDES[word] for word in name.split(".") if word in SIDES), "")


def _sides(text: Sequence[str]) -> dict[str, list[str]]:
    """encoder, decoder and shared, where the text model has both; heads are the decoder's unless its
    embedding is shared too."""
    shared = any(name.endswith("shared.weight") for name in text)
    halves: dict[str, list[str]] = defaultdict(list)
    for name in text:
        head = HEAD.search(name) or name.endswith("final_logits_bias")
        halves[_side(name) or ("decoder" if head and not shared else "shared")].append(name)
    layered = {_side(name) for name in text if layer_of(name)}
    return dict(halves) if {"encoder", "decoder"} <= layered else {}


def _stack(names: Sequence[str], config: Section, part: str) -> str | None:
    """The stack with as many layers as config.json says, and most tensors; longer ones end in layers
    that predict further tokens."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        if layer := layer_of(name):
            numbers[layer[0]].append(layer[1])
    text = part in ("default", "text_decoder", "encoder", "decoder")

    def rank(stack: str) -> tuple[bool, bool, bool, int]:
        layers = len(set(numbers[stack]))
        wanted = layer_count(config, stack) if text else None
        further = wanted is not None and 0 < layers - wanted <= _further(config)
        known = layers == wanted or wanted is None
        return known, further, stack.split(".")[-1] == "layers", len(numbers[stack])

    whole = [s for s, found in numbers.items() if len(set(found)) == max(found) + 1]
    best = max(whole, key=rank, default=None)
    return best if best is not None and any(rank(best)[:2]) else None


def _further(config: Section) -> int:
    """Layers after the last that predict further tokens; they are numbered on."""
    tables = [config, *(config[key] for key in TEXT_SECTIONS if isinstance(config.get(key), dict))]
    found = [table.get("num_nextn_predict_layers") for table in tables]
    return max((value for value in found if isinstance(value, int)), default=0)


def _swaps(name: str, bases: set[str], other: set[str]) -> set[str]:
    """Names in `other` that the same tensor may have: vision stays vision, text stays text."""
    rests = [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    found = {prefix + rest for rest in rests for prefix in PREFIXES}
    found |= {base + name for base in bases} | {name.removeprefix(base) for base in bases}
    return {new for new in found & other if _part(new, set()) == _part(name, set())}


def _precedence(embedding: str) -> tuple[bool, bool, int, str]:
    """Sorts first the embedding that the others are copies of."""
    parts = embedding.split(".")
    return "shared" not in parts, "encoder" in parts, len(embedding), embedding


def _half_of(name: str, embedding: str) -> bool:
    """Whether a half's own embedding is the one that both halves share."""
    parts = name.split(".")
    whole = ".".join(part for part in parts if part not in SIDES)
    shared = embedding.endswith("shared.weight") and parts[-2:] == ["embed_tokens", "weight"]
    return len(whole) < len(name) and (shared or whole == embedding)


def _said_tied(config: Section) -> set[bool]:
    """What config.json says, at its top or of its text model: nothing, one thing, or both."""
    sections = [config] + [config[k] for k in TEXT_SECTIONS if isinstance(config.get(k), dict)]
    return {bool(s["tie_word_embeddings"]) for s in sections if "tie_word_embeddings" in s}
