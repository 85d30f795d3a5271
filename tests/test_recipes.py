"""Every shipped recipe runs as it says, and what it writes loads where it should."""

from pathlib import Path

import pytest

from merge.experts.checks.loading import check_loads
from merge.pipeline import run_recipe
from merge.shipped import shipped

RECIPES = [
    file
    for file in sorted(shipped("recipes").glob("*.yaml"))
    if "\nstudy:" not in file.read_text(encoding="utf-8")  # searches: see tests/search
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_runs_and_loads(recipe: Path, tmp_path: Path) -> None:
    result = run_recipe(recipe, tmp_path / "out")
    assert not any("fits no tensor" in note for note in result.plan.notes)
    if result.plan.recipe.sections.adapter:
        _put_on_base(result.folder)
    else:
        check_loads(result.folder)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_says_how_it_is_run(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert f"#     mergetool run {recipe.stem} --output out/{recipe.stem}\n" in text
    assert f"\noutput: out/{recipe.stem}\n" in text


def _put_on_base(folder: Path) -> None:
    """PEFT finds a place for every tensor of the adapter, and it changes the base's answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(shipped("evals/zoo/base"), dtype=torch.float32)
    prompt = torch.tensor([[3, 7, 11]])
    with torch.no_grad():
        before = base(prompt).logits
        adapted = PeftModel.from_pretrained(base, folder)
        changed = adapted(prompt).logits
    assert (changed - before).abs().max() > 0.1
