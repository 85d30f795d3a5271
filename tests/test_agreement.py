"""Models of equal shapes that do not belong together are refused; doubtful ones get a note."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import drawn, typed, write_model, write_recipe

from merge.errors import PlanError, SourceError
from merge.pipeline import plan_recipe

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
