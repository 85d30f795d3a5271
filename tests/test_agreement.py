"""Models of equal shapes that do not belong together are refused; doubtful ones get a note."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import drawn, typed, write_model, write_recipe

from merge.budget import RESERVED
from merge.errors import PlanError, SourceError
from merge.pipeline import plan_recipe
from merge.sources.opening import open_model
from merge.tokens.doctor import diagnosed
from merge.tokens.vocabulary import PARSED

OF_CONFIGS = {
    "architecture-differs",
    "heads-differ",
    "settings-differ",
    "rope-differs",
    "tying-differs",
}
WORDS = ["<s>", "</s>", "ein", "zwei"]


def pair(
    folder: Path, *, config: dict[str, Any] | None = None, words: list[str] | None = None
) -> Path:
    """A recipe for two models that differ in the second one's config or vocabulary."""
    shared = {"eos_token_id": 1, "rope_theta": 10000.0}
    write_model(folder / "one", typed(drawn(1)), config=shared, vocabulary=WORDS)
    write_model(
        folder / "two", typed(drawn(2)), config=shared | (config or {}), vocabulary=words or WORDS
    )
    models = {"one": {"weight": 1.0}, "two": {"weight": 1.0}}
    return write_recipe(folder / "r.yaml", models=models, merge_method="linear")


def test_models_that_agree_get_no_note(tmp_path: Path) -> None:
    assert plan_recipe(pair(tmp_path)).notes == ()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["<s>", "</s>", "zwei", "ein"], "token 'ein' has id 3, not 2"),
        (["<s>", "</s>", "ein", "drei"], "it lacks the token 'zwei' (id 3)"),
        ([*WORDS, "drei"], "it has the token 'drei' (id 4) besides"),
    ],
)
def test_another_vocabulary_is_refused_by_its_first_token(
    tmp_path: Path, words: list[str], part: str
) -> None:
    with pytest.raises(PlanError, match="two: its tokenizer is not that of one") as caught:
        plan_recipe(pair(tmp_path, words=words))
    assert part in str(caught.value)


def test_the_same_vocabulary_in_another_order_of_lines_is_the_same(tmp_path: Path) -> None:
    recipe = pair(tmp_path)
    file = tmp_path / "two" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    file.write_text(json.dumps(data))
    assert plan_recipe(recipe).notes == ()


def test_added_tokens_are_taken_in_with_a_note(tmp_path: Path) -> None:
    recipe = pair(tmp_path)
    file = tmp_path / "two" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"] = [{"id": 4, "content": "<|im_end|>"}]
    file.write_text(json.dumps(data))
    plan = plan_recipe(recipe)
    assert "'<|im_end|>' (4)" in plan.notes[0]
    assert plan.tokens is not None
    assert b"<|im_end|>" in plan.tokens.files["tokenizer.json"]


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model": null}', '{"model": {"vocab": [1]}}', '{"added_tokens": [{}]}']
)
def test_a_broken_tokenizer_file_is_a_source_error(tmp_path: Path, text: str) -> None:
    recipe = pair(tmp_path)
    (tmp_path / "two" / "tokenizer.json").write_text(text)
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        plan_recipe(recipe)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, "\xff"])
def test_a_broken_config_is_a_source_error(tmp_path: Path, text: str) -> None:
    recipe = pair(tmp_path)
    (tmp_path / "two" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match=r"config\.json"):
        plan_recipe(recipe)


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "qwen3"), ("num_attention_heads", 4), ("hidden_act", "gelu")]
)
def test_another_architecture_is_refused_by_the_key_that_tells(
    tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(PlanError, match=rf"two: {key} is {value} in config\.json, but .* in one"):
        plan_recipe(pair(tmp_path, config={key: value}))


def test_another_rope_gets_a_note(tmp_path: Path) -> None:
    notes = plan_recipe(pair(tmp_path, config={"rope_theta": 5e5})).notes
    assert any("two: rope_theta is 500000.0" in note for note in notes)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3"},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 4, "head_dim": 2},
        {"rope_theta": 5e5},
        {
            "rope_theta": None,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0},
        },
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
        {"rms_norm_eps": 1e-5, "sliding_window": 8},
        {"tie_word_embeddings": True},
    ],
)
def test_a_plan_says_of_configs_what_the_doctor_says(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """The same findings: errors refuse it, warnings are notes."""
    recipe = pair(tmp_path, config=config)
    one = tmp_path / "one" / "config.json"
    told = {"rms_norm_eps": 1e-6, "sliding_window": 4, "head_dim": 4}
    one.write_text(json.dumps(json.loads(one.read_text()) | told))
    found = diagnosed([open_model(str(tmp_path / name)) for name in ("one", "two")], load=False)
    found = [finding for finding in found if finding.code in OF_CONFIGS]
    assert found
    if errors := [finding for finding in found if finding.severity == "error"]:
        with pytest.raises(PlanError, match=rf"\({errors[0].code}\)"):
            plan_recipe(recipe)
        return
    notes = [note for note in plan_recipe(recipe).notes if "config.json comes from one" in note]
    assert [note.partition(" (")[2].partition(")")[0] for note in notes] == [f.code for f in found]


def test_both_generations_of_config_get_no_note(tmp_path: Path) -> None:
    newer = {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert plan_recipe(pair(tmp_path, config=newer)).notes == ()


def tokenizers_differ(folder: Path, **changes: Any) -> None:
    """Both models get one added token, and the tokenizer of the second these keys besides."""
    for name, more in (("one", {}), ("two", changes)):
        file = folder / name / "tokenizer.json"
        added = [{"id": 1, "content": "</s>", "special": True}]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens": added} | more))


@pytest.mark.parametrize(
    ("code", "changes", "lines"),
    [
        ("normalizer-differs", {"normalizer": {"type": "Lowercase"}}, "tokenizer: {source: base}"),
        (
            "pre-tokenizer-differs",
            {"pre_tokenizer": {"type": "Whitespace"}},
            "tokenizer_source: base",
        ),
        (
            "flags-differ",
            {"added_tokens": [{"id": 1, "content": "</s>", "special": False}]},
            "tokenizer: {conflict: base}",
        ),
    ],
)
def test_a_plan_notes_what_differs_in_tokenizers_unless_the_recipe_says_whose_counts(
    tmp_path: Path, code: str, changes: dict[str, Any], lines: str
) -> None:
    recipe = pair(tmp_path)
    tokenizers_differ(tmp_path, **changes)
    assert any(f"({code})" in note for note in plan_recipe(recipe).notes)
    recipe.write_text(f"{recipe.read_text()}{lines}\n")
    assert not any(f"({code})" in note for note in plan_recipe(recipe).notes)


def test_what_the_memory_does_not_allow_to_compare_is_told(tmp_path: Path) -> None:
    """One vocabulary can be read: the result is looked at, and what the other does otherwise is unseen."""
    recipe = pair(tmp_path)
    tokenizers_differ(tmp_path, normalizer={"type": "Lowercase"})
    size = (tmp_path / "one" / "tokenizer.json").stat().st_size
    plan = plan_recipe(recipe, memory=str(RESERVED + PARSED * size))
    assert plan.notes == ()
    (unseen,) = plan.unseen
    assert "other models may split texts otherwise; looking at that takes --memory 81MiB" in unseen
    (unseen,) = plan_recipe(recipe, memory=str(RESERVED)).unseen
    assert "its tokens were not looked at, which takes --memory 81MiB" in unseen


def test_another_eos_is_refused_with_the_lines_that_resolve_it(tmp_path: Path) -> None:
    """With these lines in the recipe, or in the way of mergekit, it is planned."""
    recipe = pair(tmp_path, config={"eos_token_id": 3})
    with pytest.raises(
        PlanError, match=r"one stops at 1 '</s>' \(config.json\), two at 3 'zwei'"
    ) as caught:
        plan_recipe(recipe)
    lines = str(caught.value).partition("each on its line: ")[2].strip("`")
    text = recipe.read_text()
    recipe.write_text(f"{text}{lines}\n")
    assert plan_recipe(recipe).config["eos_token_id"] == 1
    recipe.write_text(f"{text}compat: mergekit\n")
    assert any("eos-differs" in note for note in plan_recipe(recipe).notes)
