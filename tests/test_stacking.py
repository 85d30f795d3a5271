"""Stacked layers: transformers builds from the new config.json what was stacked, or it is refused."""

import json
from contextlib import suppress
from typing import Any

import pytest
from architectures import (
    LAYERS,
    MAPPINGS,
    Built,
    architectures,
    build,
    load_config,
    stacked_tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.anatomy import Module, layer_count, layer_tensors, main_stack, modules, sections
from merge.anatomy import beside_stack as beside
from merge.errors import PlanError
from merge.kinds import KNOWN
from merge.stacking import BOUND, check_layers, check_places, layer_kinds, stacked_config

EVERY = pytest.mark.parametrize("mapping", MAPPINGS)
TWICE = [0, 1, 1, 2, 3]  # the second layer twice
BUILT_ANEW = {  # the least number of stacks that must be: a few below what transformers 5.23 gives
    "CAUSAL_LM": 150,
    "MASKED_LM": 46,
    "SEQ_TO_SEQ_CAUSAL_LM": 54,
    "SPEECH_SEQ_2_SEQ": 21,
    "IMAGE_TEXT_TO_TEXT": 74,
}
# Lists that transformers makes of config.json, one entry a layer.
LISTS = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "indexer_types", "layers_block_type"),
    *("layers_num_experts", "attention_layers", "activation_sparsity_pattern", "moe_layers"),
)
Settings = dict[str, Any]


@EVERY
def test_layers_in_place_leave_config_json_as_it_is(mapping: str) -> None:
    for built in architectures(mapping):
        for module in _stacks(built):
            assert module.stack
            same = [(built.config, i) for i in range(LAYERS)]
            assert stacked_config(built.config, module.stack, same) == (built.config, [])


@EVERY
def test_transformers_builds_what_was_stacked(mapping: str) -> None:
    wrong, done = [], 0
    for built in architectures(mapping):
        for module in _stacks(built):
            assert module.stack
            try:
                config = _stacked(built, module, TWICE, built.config)
            except PlanError:
                continue
            expected = stacked_tensors(built.tensors, module.stack, TWICE)
            done += 1
            if build(built.name, built.model_type, config).tensors != expected:
                wrong.append((built.name, module.stack))
    assert not wrong
    assert done >= BUILT_ANEW[mapping]


@EVERY
@pytest.mark.parametrize("numbers", [[1, 2, 3], [0, 1, 1, 2, 3, 2]])
def test_layers_stay_what_they_were_even_where_config_json_does_not_list_them(
    mapping: str, numbers: list[int]
) -> None:
    wrong = []
    for built in architectures(mapping):
        for module in _stacks(built):
            config, stack = _unlisted(built.config), module.stack
            if config == built.config or not stack or layer_count(config, stack) is None:
                continue
            try:
                new, _ = stacked_config(config, stack, [(config, i) for i in numbers])
            except PlanError:
                continue
            path = sections(config, stack)[-1]
            were, are = (_lists(load_config(built.model_type, c), path) for c in (config, new))
            if are != {key: [kinds[i] for i in numbers] for key, kinds in were.items()}:
                wrong.append((built.name, stack))
    assert not wrong


@EVERY
def test_what_config_json_leaves_to_defaults_is_not_taken_for_something_else(mapping: str) -> None:
    wrong, numbers = [], [1, 2, 3]
    for built in architectures(mapping):
        for module in _stacks(built):
            assert module.stack
            if layer_count(built.settings, module.stack) is None:
                continue
            try:
                config = _stacked(built, module, numbers, built.settings)
            except PlanError:
                continue
            expected = stacked_tensors(built.tensors, module.stack, numbers)
            if build(built.name, built.model_type, config).tensors != expected:
                wrong.append((built.name, module.stack))
    assert not wrong


STACKABLE: list[tuple[str, str, Settings, list[int]]] = [
    ("Gemma2ForCausalLM", "gemma2", {}, [0, 0, 1, 1, 3]),
    ("Gemma3ForCausalLM", "gemma3_text", {"sliding_window_pattern": 2}, [3, 2, 1, 0]),
    ("Cohere2ForCausalLM", "cohere2", {"sliding_window_pattern": 3}, [0, 1, 1, 2, 3]),
    ("GptOssForCausalLM", "gpt_oss", {}, [0, 0, 1, 3]),
    (
        "Qwen2ForCausalLM",
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
        [0, 3, 1, 2],
    ),
    ("Qwen2MoeForCausalLM", "qwen2_moe", {"decoder_sparse_step": 2}, [0, 1, 1, 2]),
    ("Qwen3MoeForCausalLM", "qwen3_moe", {"mlp_only_layers": [1, 3]}, [3, 2, 2, 1, 0]),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {"first_k_dense_replace": 1}, [0, 0, 1, 2]),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {"first_k_dense_replace": 2}, [2, 3, 3]),
    ("DeepseekV2ForCausalLM", "deepseek_v2", {"first_k_dense_replace": 1}, [0, 0, 0]),
    (
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
        [0, 0, 1, 2],
    ),
    (
        "Llama4ForCausalLM",
        "llama4_text",
        {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
        [0, 0, 1, 1],
    ),
    ("SmolLM3ForCausalLM", "smollm3", {"no_rope_layer_interval": 2}, [1, 1, 0, 2]),
    (
        "JambaForCausalLM",
        "jamba",
        {
            **{"attn_layer_period": 4, "attn_layer_offset": 1},
            **{"expert_layer_period": 2, "expert_layer_offset": 1},
        },
        [0, 1, 2, 3, 0, 1, 2, 3],
    ),
    (
        "JambaForCausalLM",
        "jamba",
        {
            **{"attn_layer_period": 4, "attn_layer_offset": 1},
            **{"expert_layer_period": 2, "expert_layer_offset": 1},
        },
        [1, 2, 3],
    ),
    ("BambaForCausalLM", "bamba", {"attn_layer_indices": [1]}, [0, 1, 1, 2]),
    ("Lfm2ForCausalLM", "lfm2", {"full_attn_idxs": [2]}, [0, 2, 2, 1]),
    (
        "RecurrentGemmaForCausalLM",
        "recurrent_gemma",
        {"block_types": ["recurrent", "recurrent", "attention"]},
        [2, 0, 2, 1],
    ),
    (
        "GPTNeoForCausalLM",
        "gpt_neo",
        {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
        [1, 1, 0, 2, 3],
    ),
    (
        "MllamaForCausalLM",
        "mllama_text_model",
        {"cross_attention_layers": [1]},
        [0, 1, 1, 2],
    ),
    (
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
        [1, 0, 1, 3],
    ),
    ("NemotronHForCausalLM", "nemotron_h", {"hybrid_override_pattern": "M-*-"}, [0, 0, 2, 3]),
    ("ModernBertForMaskedLM", "modernbert", {}, [0, 1, 1, 2, 3]),
    ("T5ForConditionalGeneration", "t5", {"num_layers": 4, "num_decoder_layers": 2}, [0, 1, 1]),
]


@pytest.mark.parametrize(
    ("name", "model_type", "settings", "numbers"),
    STACKABLE,
    ids=[f"{model_type}-{i}" for i, (_, model_type, *_) in enumerate(STACKABLE)],
)
def test_what_depends_on_a_layers_number_is_written_anew(
    name: str, model_type: str, settings: Settings, numbers: list[int]
) -> None:
    count = (
        {}
        if {"num_layers", "hybrid_override_pattern"} & settings.keys()
        else {"num_hidden_layers": 4}
    )
    given = count | settings | {"model_type": model_type}
    before = build(name, model_type, given)
    for config in (given, before.config):  # as written by hand, and as transformers writes it
        module = _stacks(before)[0]
        assert module.stack
        new, _ = stacked_config(config, module.stack, [(config, i) for i in numbers])
        after = build(name, model_type, new)
        assert after.tensors == stacked_tensors(before.tensors, module.stack, numbers)
        path = sections(config, module.stack)[-1]
        were, are = (_lists(load_config(model_type, c), path) for c in (config, new))
        assert are == {key: [kinds[i] for i in numbers] for key, kinds in were.items()}


def test_layers_of_a_text_model_go_into_a_tower_of_text() -> None:
    tower = {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
        "vision_config": {},
    }
    text = {"num_hidden_layers": 3, "layer_types": ["c", "d", "e"]}
    new, _ = stacked_config(tower, "model.layers", [(tower, 1), (text, 2), (text, 0)])
    assert new["text_config"] == {"num_hidden_layers": 3, "layer_types": ["b", "e", "c"]}


def test_settings_that_are_there_twice_are_both_rebuilt() -> None:
    twice = {"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 2}}
    new, _ = stacked_config(twice, "model.layers", [(twice, 0)] * 3)
    assert new == {"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 3}}


def test_lists_of_layers_that_predict_further_tokens_keep_their_ends() -> None:
    config = {
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "layer_types": ["a", "b", "further"],
    }
    new, _ = stacked_config(config, "model.layers", [(config, 1), (config, 0), (config, 0)])
    assert new["layer_types"] == ["b", "a", "a", "further"]


def test_numbers_of_layers_may_be_text_or_start_at_one() -> None:
    config = {
        "num_hidden_layers": 3,
        "moe_layers_enum": "1,2",
        "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2], "head_dim": 8},
    }
    new, _ = stacked_config(config, "model.layers", [(config, i) for i in (1, 1, 0)])
    assert new["moe_layers_enum"] == "0,1"
    expected = {"kda_layers": [3], "full_attn_layers": [1, 2], "head_dim": 8}
    assert new["linear_attn_config"] == expected


def test_an_unknown_list_with_an_entry_a_layer_is_rebuilt_and_told() -> None:
    config = {"num_hidden_layers": 3, "odd_list": [1, 2, 3], "eos_token_id": [1, 2, 3]}
    new, notes = stacked_config(config, "model.layers", [(config, 2), (config, 0)])
    assert new == {"num_hidden_layers": 2, "odd_list": [3, 1], "eos_token_id": [1, 2, 3]}
    assert len(notes) == 1
    assert "odd_list" in notes[0]


L2: Settings = {"num_hidden_layers": 2}
REFUSED: list[tuple[Settings, list[int], str]] = [
    ({"n_hidden": 2}, [0], "no known key"),
    (L2, [0, 2], "layer 2"),
    (L2, [-1], "layer -1"),
    ({"num_hidden_layers": 10**12}, [0], "no known key"),
    (L2 | {"num_kv_shared_layers": 1}, [0, 0], "num_kv_shared_layers"),
    (L2 | {"scale_attn_by_inverse_layer_idx": True}, [1], "scale_attn_by_inverse_layer_idx"),
    (L2 | {"model_type": "zamba2"}, [1, 1], "zamba2"),
    (L2 | {"model_type": "lfm3"}, [1, 1], "layer_types"),
    (L2 | {"layers_block_type": ["a", "b", "c"]}, [0], "layers_block_type has 3 entries"),
    (L2 | {"sliding_window_pattern": 2, "model_type": "unheard_of"}, [1], "sliding_window_pattern"),
    ({"num_hidden_layers": 3, "first_k_dense_replace": 1}, [1, 0, 2], "first_k_dense_replace"),
    (
        L2 | {"attn_layer_period": 2, "attn_layer_offset": 1},
        [0, 1, 1, 0, 1],
        "by attn_layer_period, layer 2 would be",
    ),
]


@pytest.mark.parametrize(("config", "numbers", "told"), REFUSED, ids=[told for *_, told in REFUSED])
def test_what_cannot_be_said_is_refused(config: Settings, numbers: list[int], told: str) -> None:
    with pytest.raises(PlanError) as error:
        stacked_config(config, "model.layers", [(config, i) for i in numbers])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_what_one_model_says_and_another_does_not_is_refused() -> None:
    with pytest.raises(PlanError, match="layer_types is said of some"):
        stacked_config(L2, "model.layers", [(L2, 0), (L2 | {"layer_types": ["a", "b"]}, 1)])


# Python makes no number of more than 4300 digits, and takes those of every script
WORDS = st.text("a1,", max_size=3) | st.sampled_from(["1" * 5000, "\u0661", "\u00b2"])
JUNK = WORDS | st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=500)
@given(
    config=st.dictionaries(
        st.sampled_from(
            [*sorted(KNOWN), *BOUND, "model_type", "linear_attn_config", "use_sliding_window"]
        ),
        JUNK,
        max_size=5,
    ),
    kind=st.sampled_from(
        ["", "qwen2", "gemma2", "exaone4", "modernbert", "llama4_text", "gpt_neo"]
    ),
    numbers=st.lists(st.integers(0, 3), min_size=2, max_size=5),
)
def test_whatever_stands_in_config_json_is_rebuilt_or_refused(
    config: Settings, kind: str, numbers: list[int]
) -> None:
    config = {"model_type": kind} | config | {"num_hidden_layers": 3}
    with suppress(PlanError):
        new, _ = stacked_config(config, "model.layers", [(config, i) for i in numbers])
        were, are = layer_kinds(config, "model.layers"), layer_kinds(new, "model.layers")
        assert [{key: kind[key] for key in were[0]} for kind in are] == [were[i] for i in numbers]


def test_the_given_config_is_left_alone() -> None:
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}}
    before = json.dumps(config)
    stacked_config(config, "model.layers", [(config, 1)])
    assert json.dumps(config) == before


FIRST = [f"block.{i}.q" for i in range(4)] + ["block.0.position_bias"]


@pytest.mark.parametrize(
    ("numbers", "layers", "told"),
    [
        ({0: 0, 1: 1, 2: 1, 3: 2, 4: 3}, 5, None),
        ({1: 0}, 5, "layer 0 cannot become layer 1"),
        ({0: 1}, 4, "layer 1 cannot become layer 0"),
        ({3: 2, 4: 2}, 6, None),
    ],
)
def test_a_layer_with_tensors_of_its_place_keeps_it(
    numbers: dict[int, int], layers: int, told: str | None
) -> None:
    arguments = ("t5", FIRST, {"num_layers": 4}, "block", numbers, layers)
    if told is None:
        check_places(*arguments)
        return
    with pytest.raises(PlanError, match=told) as error:
        check_places(*arguments)
    assert "position_bias" in str(error.value)


def test_the_last_layer_stays_the_last() -> None:
    names = [f"h.{i}.q" for i in range(3)] + ["h.2.dense_bias"]
    check_places("gpt", names, {"n_layer": 3}, "h", {0: 0, 4: 2}, 5)
    with pytest.raises(PlanError, match="layer 2 cannot become layer 3"):
        check_places("gpt", names, {"n_layer": 3}, "h", {3: 2}, 5)
    with pytest.raises(PlanError, match="layer 1 cannot become layer 4"):
        check_places("gpt", names, {"n_layer": 3}, "h", {4: 1}, 5)


def test_layers_of_one_kind_have_one_shape() -> None:
    small, large = {"q": (4, 4), "up": (8, 4)}, {"q": (4, 4), "up": (16, 4)}
    dense = {"num_hidden_layers": 4}
    check_layers(dense, "h", [("a", small)] * 4)
    check_layers(dense, "h", [("a", small | {"bias": (4,)}), *[("a", small)] * 3])
    with pytest.raises(PlanError, match=r"b: tensor 'up' of what becomes layer 3 .*16.*8"):
        check_layers(dense, "h", [("a", small)] * 3 + [("b", large)])
    with pytest.raises(PlanError, match="b: tensor 'bias'"):
        check_layers(dense, "h", [("a", small)] * 2 + [("b", small | {"bias": (4,)}), ("a", small)])
    kinds = dense | {"mlp_only_layers": [3]}
    check_layers(kinds, "h", [("a", small)] * 3 + [("b", large)])


def test_kinds_of_layers_are_what_config_json_says() -> None:
    config = {"num_hidden_layers": 3, "mlp_only_layers": [1], "layer_types": ["a", "a", "b"]}
    assert layer_kinds(config, "h") == [
        {"layer_types": "a", "decoder_sparse_step": True},
        {"layer_types": "a", "decoder_sparse_step": False},
        {"layer_types": "b", "decoder_sparse_step": True},
    ]


def _stacks(built: Built) -> list[Module]:
    """The modules whose layers can be stacked: of text, or of the halves of an encoder-decoder."""
    parts = modules(built.tensors, built.config)
    texts = (
        ["default", "text_decoder"]
        if main_stack(built.tensors, built.config)
        else ["encoder", "decoder"]
    )
    return [
        m
        for part, m in parts.items()
        if part in texts and m.stack and layer_count(built.config, m.stack)
    ]


def _stacked(built: Built, module: Module, numbers: list[int], config: Any) -> Settings:
    stack = module.stack
    assert stack
    if beside(module):
        raise PlanError("layers reach beyond their stack")
    check_places(built.name, module.names, config, stack, dict(enumerate(numbers)), len(numbers))
    new, _ = stacked_config(config, stack, [(config, i) for i in numbers])
    assert stacked_config(new, stack, [(new, i) for i in range(len(numbers))])[0] == new
    tensors = layer_tensors(module.names, stack)
    shapes = [{n: built.tensors[t] for n, t in tensors[i].items()} for i in numbers]
    check_layers(new, stack, [(built.name, layer) for layer in shapes])
    return new


def _unlisted(settings: Any) -> Any:
    """A config.json as it was before transformers wrote out what every layer is."""
    if not isinstance(settings, dict):
        return settings
    kept = {k: v for k, v in settings.items() if not (k in LISTS and isinstance(v, list))}
    return {key: _unlisted(value) for key, value in kept.items()}


def _lists(config: Any, path: tuple[str, ...]) -> dict[str, list[Any]]:
    """What transformers takes every layer for."""
    for key in path:
        config = getattr(config, key)
    found = {key: getattr(config, key, None) for key in LISTS}
    lists = {key: list(value) for key, value in found.items() if isinstance(value, list | tuple)}
    if "moe_layers" in lists:
        lists["moe_layers"] = [i in lists["moe_layers"] for i in range(config.num_hidden_layers)]
    return lists
