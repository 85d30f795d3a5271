"""What commands, notes and cards say of mixtures is so, and can be done as they say."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ran import Ran
from routed_models import adapter, base, in_one_process, mixture, three

from merge.experts.checks.loading import _compared_reading
from merge.experts.telling import loading_code
from merge.pipeline import run_recipe

EXPERTS = {"roman": "roman-rslora", "elements": "elements-mlp"}
PROMPTS = {"roman": ["roman 9=", "roman 13="], "elements": ["elements 8 26="]}


def written(folder: Path, **keys: Any) -> Path:
    experts = [
        {"adapter": f"zoo:adapters/{adapter}", "name": name, "positive_prompts": PROMPTS[name]}
        for name, adapter in EXPERTS.items()
    ]
    file = folder / "recipe.yaml"
    told = {"base_model": "zoo:base", "experts": experts, "output": str(folder / "out")}
    file.write_text(yaml.safe_dump(told | keys))
    return file


def code_of(card: Path) -> str:
    """The Python on a card, for the folder that it lies in."""
    found = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert found
    return found[1].replace("this/folder", str(card.parent))


def ran(code: str, folder: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


@pytest.mark.usefixtures("here")
def test_experts_whose_prompts_end_alike_are_told_and_looking_at_all_tokens_helps(
    tmp_path: Path,
) -> None:
    """All of these end in an equals sign, and the first layer reads nothing else of the last token."""
    file = written(tmp_path, router={"mode": "hidden", "per": "layer"})
    (note,) = run_recipe(file, load=False).notes
    assert "experts roman and elements have the same row in model.layers.0.router.weight," in note
    assert "hidden_avg looks at all" in note
    assert run_recipe(file, load=False).notes == (note,)  # as it is found there
    file = written(tmp_path, router={"mode": "hidden_avg", "per": "layer"})
    assert run_recipe(file, tmp_path / "other", load=False).notes == ()


def test_a_mixture_of_adapters_loads_as_its_card_says(tmp_path: Path) -> None:
    folder = run_recipe(written(tmp_path), load=False).folder
    show = "\nprint(type(model).__name__, len(tokenizer('sort ba=').input_ids))"
    told = ran(code_of(folder / "README.md") + show, tmp_path)
    assert told.split()[0] == "RoutedLlamaForCausalLM"
    assert int(told.split()[1]) > 5
    card = (folder / "README.md").read_text()
    assert "# A mixture of 2 experts" in card
    assert "2 of 2 experts for each token; routers: arrow, one for each adapted module." in card


def test_a_folder_for_peft_on_the_tiny_base_loads_as_its_card_says(tmp_path: Path) -> None:
    folder = run_recipe(written(tmp_path, format="peft", router={"mode": "uniform"})).folder
    told = ran(code_of(folder / "README.md") + "\nprint(type(model.base_model).__name__)", tmp_path)
    assert told.split() == ["XLoraModel"]


@pytest.mark.parametrize(
    "asked",
    [
        ("routing", "out", "--text", "zoo:texts"),
        ("train-router", "out", "--text", "zoo:texts", "-o", "trained"),
        ("score", "out"),
        ("verify", "out", "--load"),
        ("plan", "change.yaml"),
    ],
)
def test_a_folder_for_peft_is_called_what_it_is(
    asked: tuple[str, ...], tmp_path: Path, command: Callable[..., Ran], made_for_peft: Path
) -> None:
    (tmp_path / "out").symlink_to(made_for_peft)
    (tmp_path / "change.yaml").write_text("mixture: out\ndrop: [0]\n")
    told = command(*asked)
    assert "is a mixture of adapters that PEFT loads (format: peft)" in told.error
    assert "format: routed" in told.error
    assert told.code == 2


@pytest.fixture(scope="module")
def made_for_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge.experts.xlora.writing.check_loading", lambda *_: {})
        return run_recipe(written(folder, format="peft", router={"mode": "uniform"})).folder


def test_a_plan_says_who_is_mixed_and_how(tmp_path: Path, command: Callable[..., Ran]) -> None:
    router = {"mode": "random", "top_k": 1, "per": "layer", "temperature": 0.5, "normalise": False}
    told = command("plan", written(tmp_path, router=router)).out.splitlines()
    assert told[0].startswith("mixture of roman, elements, ")
    assert told[1].strip() == (
        "1 of 2 experts for each token; routers: random, one for each layer, temperature 0.5, shares of the "
        "chosen experts as they are"
    )


def test_that_dora_keeps_the_lengths_of_the_base_is_on_the_card(tmp_path: Path) -> None:
    model = base("llama", tmp_path / "base")
    with in_one_process():
        both = mixture(tmp_path, model, three("llama", model, tmp_path), name="both")
        one = {"one": adapter(model, tmp_path / "one", 3, target_modules=["q_proj"])}
        plain = mixture(tmp_path, model, one, name="simple", router={"mode": "arrow"})
    said = "On a base that is quantised as it is loaded, they keep the lengths of rows"
    assert said in (both / "README.md").read_text()
    assert said not in (plain / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "declared", "noted"),
    [("qwen2", "Qwen2Tokenizer", True), ("qwen3", "PreTrainedTokenizerFast", False)],
)
def test_texts_that_the_class_of_a_mixture_reads_otherwise_are_noted(
    kind: str, declared: str, noted: bool, tmp_path: Path
) -> None:
    from dense_models import dense, written
    from grounds import tokenized

    dense(tmp_path, kind, "base")
    tokenized(tmp_path / "base", 64)
    (tmp_path / "base" / "tokenizer_config.json").write_text(
        f'{{"tokenizer_class": "{declared}", "unk_token": "[UNK]", "eos_token": "[EOS]"}}'
    )
    file = written(tmp_path, ["base", "base"], gate_mode="random", architecture="deepseek")
    if noted:
        notes = run_recipe(file, tmp_path / "out").notes
    else:
        folder = run_recipe(file, tmp_path / "out", load=False).folder
        notes = tuple(_compared_reading(folder, tmp_path / "base").get("notes", ()))
    assert any("gives other tokens" in note for note in notes) == noted, notes


def test_a_key_that_stands_elsewhere_is_told_where(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    told = command("plan", written(tmp_path, router={"texts": "zoo:texts"})).error
    assert "unknown key 'texts' (it is a key of experts); allowed: mode" in told


@pytest.mark.parametrize(
    ("name", "starts"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_a_picture_is_what_its_name_says(
    name: str, starts: bytes, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    from stock_moe import mixtral, texts

    asked = ("routing", mixtral(tmp_path / "m"), "--text", texts(tmp_path / "t.jsonl", 3), "--plot")
    told = command(*asked, name)
    assert told.out.splitlines()[-1].startswith(f"{name}: ")
    assert (tmp_path / name).read_bytes().startswith(starts)
    assert "must end in .png, .pdf, .svg" in command(*asked, "a.jpeg").error


def test_what_a_config_calls_its_classes_is_no_code_on_a_card() -> None:
    led = {"AutoModel, os\nos.abort()  #": "modeling_mixture.RoutedLlamaForCausalLM"}
    config = {"architectures": ["RoutedLlamaForCausalLM"], "auto_map": led}
    assert loading_code(config).startswith(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\nmodel ="
    )
