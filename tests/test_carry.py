"""What travels beside the tensors: the donor's files to the byte, a model card, the provenance."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import contents, drawn, family, shapes, ties_recipe, typed, write_model, write_recipe

from merge.pipeline import plan_recipe, run_recipe
from merge.verify import verify_folder

CARRIED = {
    "generation_config.json": b'{"eos_token_id": 1}',
    "tokenizer.json": b'{ "model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0}},'
    b' "added_tokens": [{"id": 1, "content":  "</s>", "special": true,'
    b' "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}] }',
    "tokenizer_config.json": b'{"bos_token":\t"<s>"}\r\n',
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}</s>{% endfor %}\r\n",
    "special_tokens_map.json": b"{}",
    "tokenizer.model": bytes(range(256)),
    "LICENSE": "Grüße\n".encode("latin-1"),
    "modeling_own.py": b"import this",
    "figures/plot.png": b"\x89PNG",
}
LEFT = {
    "README.md": b"of the donor",
    "pytorch_model.bin": b"weights",
    "model.gguf": b"weights",
    "mergetool.json": b"{}",
    ".gitattributes": b"hidden",
    ".cache/x.json": b"hidden",
    "original/consolidated.00.pth": b"weights",
    "checkpoint-5/config.json": b"{}",
    "checkpoint-5/trainer_state.json": b"{}",
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    found = family(tmp_path, "a", "b")
    for name, content in (CARRIED | LEFT).items():
        (found["base"] / name).parent.mkdir(exist_ok=True)
        (found["base"] / name).write_bytes(content)
    return found


def merged(models: dict[str, Path], **keys: Any) -> Path:
    folder = models["base"].parent
    return run_recipe(ties_recipe(folder / "r.yaml", models, **keys), folder / "out").folder


def test_the_donors_files_are_carried_to_the_byte_and_weights_are_not(
    models: dict[str, Path],
) -> None:
    out = merged(models)
    for name, content in CARRIED.items():
        assert (out / name).read_bytes() == content
    own = {"config.json", "README.md", "mergetool.json", "model.safetensors"}
    assert contents(out).keys() == CARRIED.keys() | own
    assert "of the donor" not in (out / "README.md").read_text()


def test_the_donor_is_the_base_or_the_tokenizer_source(models: dict[str, Path]) -> None:
    (models["b"] / "chat_template.jinja").write_text("of b")
    (models["b"] / "config.json").write_text((models["b"] / "config.json").read_text() + "  ")
    out = merged(models, tokenizer_source="b")
    assert (out / "chat_template.jinja").read_text() == "of b"
    assert (out / "config.json").read_bytes() == (models["b"] / "config.json").read_bytes()
    assert json.loads((out / "mergetool.json").read_text())["donor"] == "b"


@pytest.mark.parametrize("keys", [{}, {"out_dtype": "float32"}, {"dtype": "float32"}])
def test_config_is_the_donors_to_the_byte_while_the_dtype_stays(
    models: dict[str, Path], keys: dict[str, str]
) -> None:
    assert (merged(models, **keys) / "config.json").read_bytes() == (
        models["base"] / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_tells_another_dtype_and_nothing_else(models: dict[str, Path], key: str) -> None:
    before = json.loads((models["base"] / "config.json").read_text())
    before.pop("torch_dtype")
    before[key] = "float32"
    (models["base"] / "config.json").write_text(json.dumps(before))
    after = json.loads((merged(models, out_dtype="bfloat16") / "config.json").read_text())
    assert after == before | {key: "bfloat16"}


def card(out: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_tells_the_hub_what_it_is_made_of(models: dict[str, Path]) -> None:
    front, text = card(merged(models))
    assert front["base_model"] == ["base", "a", "b"]
    assert front["base_model_relation"] == "merge"
    assert "merge" in front["tags"]
    assert front["library_name"] == "transformers"
    assert "`ties` (arXiv:2306.01708)" in text


def test_the_recipe_in_the_card_makes_the_same_model_again(models: dict[str, Path]) -> None:
    out = merged(
        models,
        compat="mergekit",
        shard_size="2KB",
        tokenizer_source="b",
        parameters={"lambda": 0.7},
    )
    recipe = card(out)[1].split("```yaml\n")[1].split("```")[0]
    again = models["base"].parent / "again.yaml"
    again.write_text(recipe)
    assert run_recipe(again, out.with_name("again")).plan.digest == plan_recipe(again).digest
    assert contents(out.with_name("again")) == contents(out)


def test_rules_and_gradients_survive_in_the_card(models: dict[str, Path]) -> None:
    rules = [{"filter": "mlp", "value": [0.1, 0.9]}, {"filter": "norm", "value": 0.5}]
    keys = {"models": {"a": {"weight": rules}, "b": {}}, "parameters": {"weight": 0.3}}
    recipe = write_recipe(
        models["base"].with_name("r.yaml"),
        merge_method="task_arithmetic",
        base_model="base",
        **keys,
    )
    out = run_recipe(recipe, recipe.parent / "out").folder
    again = recipe.with_name("again.yaml")
    again.write_text(card(out)[1].split("```yaml\n")[1].split("```")[0])
    assert plan_recipe(again).digest == plan_recipe(recipe).digest


def test_the_provenance_lists_every_tensor_and_every_input(models: dict[str, Path]) -> None:
    out = merged(models)
    data = json.loads((out / "mergetool.json").read_text())
    assert data["outputs"].keys() == shapes().keys()
    for name, shape in shapes().items():
        assert data["outputs"][name]["shape"] == list(shape)
        assert len(data["outputs"][name]["digest"]) == 32
    assert [entry["model"] for entry in data["inputs"]] == ["base", "a", "b"]
    assert {entry["tensors"] for entry in data["inputs"]} == {len(shapes())}
    assert len({entry["digest"] for entry in data["inputs"]}) == 3
    assert data["recipe"][0]["models"][0]["parameters"] == {"weight": 0.5, "density": 0.6}


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    models = family(tmp_path / "secret", "a")
    absolute = write_recipe(
        tmp_path / "r.yaml",
        models={models["a"]: {"weight": 1.0}},
        base_model=str(models["base"]),
        merge_method="ties",
        tokenizer_source=str(models["a"]),
    )
    out = run_recipe(absolute, tmp_path / "out").folder
    for file in out.iterdir():
        assert b"secret" not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


def test_a_merge_of_merges_carries_no_old_provenance(tmp_path: Path) -> None:
    models = family(tmp_path, "a")
    first = run_recipe(ties_recipe(tmp_path / "r.yaml", models), tmp_path / "first").folder
    write_model(tmp_path / "c", typed(drawn(9)))
    recipe = write_recipe(
        tmp_path / "2.yaml",
        models={"first": {"weight": 1.0}, "c": {"weight": 1.0}},
        merge_method="linear",
    )
    second = run_recipe(recipe, tmp_path / "second").folder
    assert first != second
    verify_folder(second)
    assert (
        json.loads((second / "mergetool.json").read_text())["recipe"][0]["merge_method"] == "linear"
    )
