"""Models of several parts: one part is merged, or all of them, and the rest is carried bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from families import contents
from methods.cases import read_values
from real import SMALL, loaded, saved

from merge.errors import PlanError
from merge.experts.checks.loading import check_loads
from merge.pipeline import plan_recipe, run_recipe

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def written(folder: Path, **keys: Any) -> Path:
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    return file


def linear(*models: str) -> dict[str, Any]:
    return {"models": [{"model": name, "parameters": {"weight": 1.0}} for name in models]}


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **VISION)
    text = LlamaConfig(num_hidden_layers=3, **SMALL)
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-1
    )


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=3, **SMALL)


def t5() -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip


def whisper() -> Any:
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def bert() -> Any:
    from transformers import BertConfig

    keys = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    return BertConfig(num_hidden_layers=3, **keys)


PICTURES = "AutoModelForImageTextToText"


@pytest.fixture
def seeing(tmp_path: Path) -> Path:
    """v and w, which see and speak, and t, which speaks."""
    for seed, name in enumerate("vw"):
        saved(tmp_path / name, llava(), seed=seed, loader=PICTURES)
    saved(tmp_path / "t", llama(), seed=5)
    return tmp_path


def is_text(name: str) -> bool:
    return "language_model" in name or name == "lm_head.weight"


def test_the_text_tower_is_merged_and_the_rest_carried_bit_for_bit(seeing: Path) -> None:
    recipe = written(
        seeing, modules={"text_decoder": linear("v", "w")}, merge_method="linear",
        out_dtype="bfloat16",
    )  # fmt: skip
    result = run_recipe(recipe, seeing / "out")
    v, w, found = (read_values(folder) for folder in (seeing / "v", seeing / "w", result.folder))
    assert found.keys() == v.keys()
    for name, values in found.items():
        if is_text(name):
            mean = (v[name] + w[name]) / 2
            assert np.abs(values - mean).max() <= 2.0**-8 * np.abs(mean).max()
        else:
            assert np.array_equal(values, v[name])
    assert {step.dtype for step in result.plan.steps if is_text(step.name)} == {"BF16"}
    assert {step.dtype for step in result.plan.steps if not is_text(step.name)} == {"F32"}
    check_loads(result.folder)


def test_a_model_of_text_alone_is_merged_into_the_text_tower(seeing: Path) -> None:
    recipe = written(
        seeing, modules={"text_decoder": linear("t")}, base_model="v",
        merge_method="task_arithmetic",
    )  # fmt: skip
    result = run_recipe(recipe, seeing / "out")
    text, v = loaded(seeing / "t").state_dict(), loaded(seeing / "v", PICTURES).state_dict()
    found = loaded(result.folder, PICTURES).state_dict()
    tower = {n: t for n, t in found.items() if is_text(n)}
    assert len(tower) == len(text)
    for name, values in tower.items():
        own = name.replace("model.language_model.", "model.")
        # base + (text - base) in float32, of values below 2
        assert (values - text[own]).abs().max() <= 2 * 2.0**-23
    assert all(found[name].equal(v[name]) for name in found if not is_text(name))


def test_a_module_that_a_model_has_not_is_refused_with_those_that_it_has(seeing: Path) -> None:
    recipe = written(seeing, modules={"text": linear("v", "w")}, merge_method="linear")
    with pytest.raises(PlanError, match=r"r\.yaml:\d+: v has no module 'text'; it has ") as caught:
        plan_recipe(recipe)
    assert "text_decoder" in str(caught.value)
    assert "vision_tower" in str(caught.value)


def test_layers_of_the_text_tower_are_stacked(seeing: Path) -> None:
    spans = [("v", 0, 3), ("w", 1, 3)]
    slices = [{"sources": [{"model": m, "layer_range": [a, b]}]} for m, a, b in spans]
    for keys in ({"slices": slices}, {"modules": {"text_decoder": {"slices": slices}}}):
        result = run_recipe(
            written(seeing, merge_method="passthrough", **keys),
            seeing / next(iter(keys)),
        )
        model = loaded(result.folder, PICTURES)
        assert len(model.model.language_model.layers) == 5
        assert model.config.text_config.num_hidden_layers == 5
        assert model.config.vision_config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("config", "loader"),
    [
        (t5, "AutoModelForSeq2SeqLM"),
        (whisper, "AutoModelForSpeechSeq2Seq"),
        (bert, "AutoModelForMaskedLM"),
        (bert, "AutoModelForSequenceClassification"),
    ],
)
def test_encoders_and_encoder_decoders_merge_whole(
    tmp_path: Path, config: Any, loader: str
) -> None:
    parents = []
    for seed, name in enumerate("ab"):
        saved(tmp_path / name, config(), seed=seed, loader=loader)
        parents.append(loaded(tmp_path / name, loader).state_dict())
    result = run_recipe(
        written(tmp_path, merge_method="linear", **linear("a", "b")), tmp_path / "out"
    )
    for name, values in loaded(result.folder, loader).state_dict().items():
        mean = (parents[0][name].double() + parents[1][name].double()) / 2
        assert (values - mean).abs().max() <= 2.0**-23, name


def test_encoder_and_decoder_have_recipes_of_their_own(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        saved(tmp_path / name, t5(), seed=seed, loader="AutoModelForSeq2SeqLM")
    layers = [
        {"sources": [{"model": "b", "layer_range": [0, 2]}]},
        {"sources": [{"model": "a", "layer_range": [1, 3]}]},
    ]
    recipe = written(
        tmp_path, merge_method="passthrough",
        modules={"encoder": {"slices": layers}, "decoder": {"models": [{"model": "b"}]}},
    )  # fmt: skip
    result = run_recipe(recipe, tmp_path / "out")
    model = loaded(result.folder, "AutoModelForSeq2SeqLM")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (4, 2)
    b, a = (loaded(tmp_path / name, "AutoModelForSeq2SeqLM").state_dict() for name in "ba")
    found = model.state_dict()
    query = "{}.block.{}.layer.0.SelfAttention.q.weight"
    assert found[query.format("encoder", 1)].equal(b[query.format("encoder", 1)])
    assert found[query.format("encoder", 2)].equal(a[query.format("encoder", 1)])
    assert found[query.format("decoder", 0)].equal(b[query.format("decoder", 0)])


def test_slices_alone_do_not_say_which_layers_of_an_encoder_decoder(tmp_path: Path) -> None:
    saved(tmp_path / "a", t5(), loader="AutoModelForSeq2SeqLM")
    slices = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
    with pytest.raises(PlanError, match=r"name them under modules .*encoder"):
        plan_recipe(written(tmp_path, merge_method="passthrough", slices=slices))


def test_a_body_without_head_merges_into_a_model_with_one(tmp_path: Path) -> None:
    """BertModel's names lack the prefix that BertForMaskedLM's have."""
    saved(tmp_path / "head", bert(), seed=1, loader="AutoModelForMaskedLM")
    saved(tmp_path / "body", bert(), seed=2, loader="AutoModel")
    names = set(json.loads(_header(tmp_path / "body" / "model.safetensors")))
    assert not any(name.startswith("bert.") for name in names)
    recipe = written(
        tmp_path, merge_method="task_arithmetic", base_model="head", missing_tensors="base",
        extra_tensors="drop", **linear("body"),
    )  # fmt: skip
    result = run_recipe(recipe, tmp_path / "out")
    head, body, found = (read_values(tmp_path / n) for n in ("head", "body", "out"))
    query = "encoder.layer.1.attention.self.query.weight"
    assert np.abs(found[f"bert.{query}"] - body[query]).max() <= 2.0**-23
    kept = [name for name in found if name.startswith("cls.")]
    assert kept
    assert all(np.array_equal(found[name], head[name]) for name in kept)
    assert any("body: lacks tensors of head" in note for note in result.plan.notes)


def _header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_whole_models_of_parts_merge_with_one_recipe(seeing: Path) -> None:
    result = run_recipe(written(seeing, merge_method="linear", **linear("v", "w")), seeing / "out")
    assert not any(step.copy for step in result.plan.steps)
    check_loads(result.folder)
    assert contents(result.folder)["config.json"] == contents(seeing / "v")["config.json"]
