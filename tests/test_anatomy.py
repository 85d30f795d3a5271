"""What names tell, held against transformers' own models."""

from collections.abc import Iterator

import pytest
from architectures import LAYERS, MAPPINGS, Built, architectures, load_config

from merge.anatomy import (
    Module,
    beside_stack,
    layer_count,
    layer_of,
    layer_tensors,
    main_stack,
    matched,
    modules,
    recomputed,
    renamed,
    tied_heads,
)

EVERY = pytest.mark.parametrize("mapping", MAPPINGS)
HALVES = {"encoder", "decoder"}
# What has no single stack with as many layers as config.json says.
UNEVEN = {
    "AlbertForMaskedLM": "all layers are one",
    "FlaubertWithLMHeadModel": "a layer lies in four lists, of which one is named",
    "FunnelForMaskedLM": "blocks of several layers",
    "HrmTextForCausalLM": "two stacks",
    "NemotronHForCausalLM": "config.json has no number of layers",
    "PerceiverForMaskedLM": "the same layers several times",
    "PI0ForConditionalGeneration": "two text models",
    "XLMWithLMHeadModel": "a layer lies in four lists, of which one is named",
}
# Tied by transformers' default config.json, but not by their classes.
TIED_BY_CONFIG_ALONE = {
    "BigBirdPegasusForCausalLM",
    "LukeForMaskedLM",
    "NeoMMEForMaskedLM",
    "Pop2PianoForConditionalGeneration",
}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts.7.w1.weight", ("model.layers", 3)),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", ("encoder.block", 2)),
        ("h.11.attn.c_attn.weight", ("h", 11)),
        ("bert.encoder.layer.0.output.dense.bias", ("bert.encoder.layer", 0)),
        ("model.visual.blocks.26.attn.qkv.weight", ("model.visual.blocks", 26)),
        ("model.llm.attn_res.mlp_queries.5", ("model.llm.attn_res.mlp_queries", 5)),
        ("model.embed_tokens.weight", None),
        ("0.weight", None),
        ("model.layers.007.weight", None),
        ("model.layers.99999999999999999999.weight", None),
        ("", None),
    ],
)
def test_the_first_number_of_a_name_is_its_layer(name: str, layer: tuple[str, int] | None) -> None:
    assert layer_of(name) == layer


@EVERY
def test_enough_architectures_are_covered(mapping: str) -> None:
    assert len(architectures(mapping)) >= MAPPINGS[mapping]


@EVERY
def test_renaming_a_layer_can_be_undone(mapping: str) -> None:
    for built in architectures(mapping):
        for name in built.tensors:
            if layer := layer_of(name):
                moved = renamed(name, "elsewhere.layers", layer[1] + 100)
                assert layer_of(moved) == ("elsewhere.layers", layer[1] + 100)
                assert renamed(moved, *layer) == name


@EVERY
def test_every_tensor_is_in_one_module_and_one_layer_at_most(mapping: str) -> None:
    for built in architectures(mapping):
        parts = modules(built.tensors, built.config)
        assert sorted(n for part in parts.values() for n in part.names) == sorted(built.tensors)
        for part in parts.values():
            layers = layer_tensors(part.names, part.stack) if part.stack else {}
            inside = [name for layer in layers.values() for name in layer.values()]
            numbered = [name for name in part.names if layer_of(name)]
            assert sorted(inside + beside_stack(part)) == sorted(numbered), built.name


@EVERY
def test_the_main_stack_has_every_layer_that_the_model_was_built_with(mapping: str) -> None:
    wrong = []
    for built in architectures(mapping):
        parts = modules(built.tensors, built.config)
        stack = main_stack(built.tensors, built.config)
        stacks = [stack] if stack else [parts[half].stack for half in HALVES & parts.keys()]
        counts = [layer_count(built.config, found) for found in stacks if found]
        stored = [sorted(layer_tensors(built.tensors, found)) for found in stacks if found]
        if (
            not stored
            or counts != [LAYERS] * len(stacks)
            or stored != [[*range(LAYERS)]] * len(stacks)
        ):
            wrong.append(built.name)
    assert {*wrong} <= UNEVEN.keys()


@EVERY
def test_heads_are_copies_only_where_transformers_ties_them(mapping: str) -> None:
    for built in architectures(mapping):
        found = tied_heads(built.config, built.held)
        wrong = {a: b for a, b in found.items() if not _same(built, a, b)}
        assert not wrong or built.name in TIED_BY_CONFIG_ALONE, (built.name, wrong)


@EVERY
def test_a_head_that_is_not_stored_is_found_at_its_embedding(mapping: str) -> None:
    for built in architectures(mapping):
        stored = built.held - built.tied.keys()
        heads = {a for a, b in built.tied.items() if a.endswith(".weight") and "lm_head" in a}
        said = _flags(built)
        if heads and said == {True} and len(built.tied) < 4:
            found = tied_heads(built.config, stored, heads)
            assert found.keys() == heads, built.name
            assert all(_same(built, a, b) for a, b in found.items()), built.name


def test_a_head_of_its_own_is_no_copy() -> None:
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    copy = {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_heads({"tie_word_embeddings": True}, names) == copy
    assert tied_heads({"tie_word_embeddings": False}, names) == {}
    assert tied_heads({}, names) == {}
    assert tied_heads({}, {"model.embed_tokens.weight"}, names) == copy
    both = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}
    assert tied_heads(both, names) == {}


def test_halves_share_an_embedding() -> None:
    halves = {f"{half}.embed_tokens.weight": "shared.weight" for half in HALVES}
    stored = {"shared.weight", "lm_head.weight", *halves}
    found = tied_heads({"tie_word_embeddings": True}, stored)
    assert found == {"lm_head.weight": "shared.weight", **halves}


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ("encoder.layer.0.output.dense.bias", "bert.encoder.layer.0.output.dense.bias"),
        ("h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("model.norm.weight", "language_model.model.norm.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("vision_tower.encoder.layers.0.bias", "vision_tower.vision_model.encoder.layers.0.bias"),
        ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        ("layers.0.fc.weight", "unheard_of.layers.0.fc.weight"),
    ],
)
def test_names_match_under_other_prefixes(reference: str, other: str) -> None:
    assert matched([reference], [other]) == {reference: other}
    assert matched([other], [reference]) == {other: reference}
    assert matched([reference, other], [other, reference]) == {reference: reference, other: other}


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ("model.layers.0.norm.weight", ["vision_tower.layers.0.norm.weight"]),
        ("encoder.block.0.bias", ["decoder.block.0.bias"]),
        ("block.0.bias", ["encoder.block.0.bias"]),
        ("layers.0.bias", ["language_model.layers.0.bias", "text_model.layers.0.bias"]),
        ("model.layers.0.bias", ["model.layers.1.bias"]),
    ],
)
def test_names_that_may_mean_something_else_do_not_match(reference: str, other: list[str]) -> None:
    assert matched([reference], other) == {}


@pytest.mark.parametrize("mapping", [m for m in MAPPINGS if m != "IMAGE_TEXT_TO_TEXT"])
def test_a_model_without_its_head_matches_the_one_with_it(mapping: str) -> None:
    import transformers

    for built in architectures(mapping):
        prefix = f"{getattr(transformers, built.name).base_model_prefix}."
        whole = [name for name in built.tensors if name.startswith(prefix)]
        if prefix == "." or built.name == "BltForCausalLM":  # has another head inside
            continue
        pairs = {name.removeprefix(prefix): name for name in whole}
        assert matched(pairs, built.tensors) == pairs, built.name
        assert matched(built.tensors, pairs) == {b: a for a, b in pairs.items()}, built.name


def test_text_models_match_the_towers_of_text_and_nothing_else() -> None:
    complete = 0
    for built, text in _text_models():
        found = matched(text, built.tensors)
        of = {n: part for part, m in modules(built.tensors, built.config).items() for n in m.names}
        assert {of[name] for name in found.values()} <= {
            "text_decoder",
            "default",
            "shared",
            *HALVES,
        }
        assert all(built.tensors[b] == text[a] for a, b in found.items()), built.name
        complete += found.keys() == text.keys()
    assert complete >= 33  # the others name tensors within layers otherwise


def test_modules_have_the_names_of_the_field() -> None:
    names = [
        "model.visual.blocks.0.attn.proj.weight",
        "model.visual.merger.norm.weight",
        "model.visual.deepstack_merger_list.0.norm.weight",
        "model.language_model.layers.0.mlp.vision_model.weight",
        "lm_head.weight",
    ]
    parts = modules(names, {"text_config": {"num_hidden_layers": 1}, "vision_config": {"depth": 1}})
    assert {part: module.names for part, module in parts.items()} == {
        "vision_tower": (names[0],),
        "multi_modal_projector": (names[1], names[2]),
        "text_decoder": (names[3], names[4]),
    }
    assert parts["text_decoder"].stack == "model.language_model.layers"


@pytest.mark.parametrize(
    ("embedding", "module"),
    [("shared.weight", "shared"), ("decoder.embed_tokens.weight", "decoder")],
)
def test_a_head_is_shared_where_its_embedding_is(embedding: str, module: str) -> None:
    names = ["encoder.block.0.q.weight", "decoder.block.0.q.weight", embedding, "lm_head.weight"]
    parts = modules(names, {"num_layers": 1})
    assert {"lm_head.weight", embedding} <= set(parts[module].names)
    assert parts["encoder"] == Module((names[0],), "encoder.block")


def test_layers_that_predict_further_tokens_belong_to_the_stack() -> None:
    names = [f"model.layers.{i}.mlp.weight" for i in range(3)]
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    assert main_stack(names, config) == "model.layers"
    assert main_stack(names, {"num_hidden_layers": 2}) is None


def test_what_is_computed_on_loading_is_told_from_parameters() -> None:
    assert recomputed("model.layers.0.self_attn.rotary_emb.inv_freq", [64])
    assert recomputed("h.0.attn.bias", [1, 1, 1024, 1024])
    assert recomputed("gpt_neox.layers.0.attention.masked_bias", [])
    assert not recomputed("h.0.attn.bias", [768])
    assert not recomputed("h.0.attn.c_attn.bias", [2304])


@EVERY
def test_no_parameter_counts_as_recomputed(mapping: str) -> None:
    found = [
        (built.name, name)
        for built in architectures(mapping)
        for name, shape in built.tensors.items()
        if recomputed(name, shape)
    ]
    assert {name.rpartition(".")[2] for _, name in found} <= {"inv_freq"}


def _same(built: Built, a: str, b: str) -> bool:
    return _root(built, a) == _root(built, b)


def _root(built: Built, name: str) -> str:
    while built.tied.get(name, name) != name:
        name = built.tied[name]
    return name


def _flags(built: Built) -> set[object]:
    tables = [built.config, *(v for v in built.config.values() if isinstance(v, dict))]
    return {t["tie_word_embeddings"] for t in tables if "tie_word_embeddings" in t}


def _text_models() -> Iterator[tuple[Built, dict[str, tuple[int, ...]]]]:
    """Composite models and the tensors of their text model alone, where transformers has it as one."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    for built in architectures("IMAGE_TEXT_TO_TEXT"):
        config = load_config(built.model_type, built.config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config.text_config)
        except (AttributeError, ValueError):
            continue
        saved = revert_weight_conversion(model, dict(model.state_dict()))
        yield built, {name: tuple(tensor.shape) for name, tensor in saved.items()}
