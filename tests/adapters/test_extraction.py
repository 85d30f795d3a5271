"""What is extracted from a fine-tune is what PEFT puts on the base again, and its errors are measured."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from peft import PeftModel
from peft_models import MODELS, loaded, merged_by_peft, saved
from safetensors.numpy import load_file, save_file

from merge.adapters.modules import modules_of
from merge.adapters.run import adapter_budget, run_adapter
from merge.adapters.write import Report
from merge.errors import PlanError, SourceError
from merge.pipeline import plan_recipe
from merge.sources.opening import open_model

Change = Callable[[str], bool]


def tuned(base: Path, folder: Path, changed: Change, scale: float = 0.1) -> Path:
    """A fine-tune that moved the parameters that `changed` names."""
    model = loaded(base)
    random = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if changed(name):
                parameter.add_(scale * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(folder)
    return folder


def extracted(base: Path, fine: Path, out: Path, threads: int = 1, **wanted: Any) -> Report:
    """The report of a recipe that extracts an adapter from `fine`."""
    recipe = out.parent / "recipe.yaml"
    keys = {
        "merge_method": "passthrough",
        "base_model": str(base),
        "models": [{"model": str(fine)}],
    }
    recipe.write_text(yaml.safe_dump(keys | {"adapter": wanted}))
    plan = plan_recipe(recipe)
    budget = adapter_budget(plan, "1GiB", threads)
    return run_adapter(plan, budget, out, ask=modules_of)[0]


def relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b.astype(float)) / np.linalg.norm(b))


CASES: dict[str, tuple[str, Change]] = {
    "linear layers": ("llama", lambda n: "proj" in n),
    "one layer": ("llama", lambda n: "layers.1.mlp.up_proj" in n),
    "everything": ("llama", lambda n: True),
    "everything, tied": ("tied", lambda n: True),
    "fused": ("phi3", lambda n: True),
    "biases": ("qwen2", lambda n: "proj" in n),
    "biases alone": ("qwen2", lambda n: "o_proj" in n or "bias" in n),
    "stored transposed": ("gpt2", lambda n: "attn" in n or "ln_1" in n),
    "a head that is no vocabulary": (
        "bert",
        lambda n: "query" in n or "LayerNorm" in n or "class" in n,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_at_full_rank_peft_gives_the_fine_tune_back(tmp_path: Path, case: str) -> None:
    """To the rounding of the difference and of two factors to float32."""
    kind, changed = CASES[case]
    base = saved(MODELS[kind](), tmp_path / "base")
    fine = tuned(base, tmp_path / "fine", changed)
    report = extracted(base, fine, tmp_path / "adapter", rank=1000)
    assert report.error <= 2**-22
    expected = load_file(fine / "model.safetensors")
    merged = merged_by_peft(base, tmp_path / "adapter", into=tmp_path / "merged")
    assert merged.keys() == expected.keys()
    again = open_model(f"{base}+{tmp_path / 'adapter'}")
    for name, value in expected.items():
        assert relative(merged[name], value) <= 2**-22
        info = again.source.tensors[name]
        assert relative(again.source.rows(name, 0, info.rows).reshape(info.shape), value) <= 2**-22


def test_peft_runs_as_the_fine_tune_does(tmp_path: Path) -> None:
    """Not merged: what PEFT computes beside the base, head and embedding included. The factors are float32
    (2**-24), and two layers of attention make up to a hundred times as much of it."""
    base = saved(MODELS["tied"](), tmp_path / "base")
    fine = tuned(base, tmp_path / "fine", lambda n: True)
    extracted(base, fine, tmp_path / "adapter", rank=1000)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad(), warnings.catch_warnings(action="error", category=UserWarning):
        model = PeftModel.from_pretrained(loaded(base, torch.float64), tmp_path / "adapter")
        ours = model.double()(tokens).logits
        exact = loaded(fine, torch.float64)(tokens).logits
    assert relative(ours.numpy(), exact.numpy()) <= 1e-5


@pytest.mark.parametrize("wanted", [{"rank": 3}, {"energy": 0.8}, {"rank": 6, "energy": 0.9}])
def test_the_errors_reported_are_those_of_what_peft_merges(
    tmp_path: Path, wanted: dict[str, Any]
) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    fine = tuned(base, tmp_path / "fine", lambda n: "proj" in n or "norm" in n)
    report = extracted(base, fine, tmp_path / "adapter", **wanted)
    before, after = load_file(base / "model.safetensors"), load_file(fine / "model.safetensors")
    merged = merged_by_peft(base, tmp_path / "adapter", into=tmp_path / "merged")
    missing = changed = 0.0
    for layer in report.adapted:
        name = f"{layer.module}.weight"
        difference = after[name].astype(float) - before[name]
        error = np.linalg.norm(merged[name] - after[name]) / np.linalg.norm(difference)
        # the error is a difference of nearly equal numbers, and the fine-tune is stored in float32
        assert layer.error == pytest.approx(error, rel=1e-4)
        assert layer.norm == pytest.approx(np.linalg.norm(difference), rel=1e-6)
        assert layer.rank <= wanted.get("rank", 1000)
        if "rank" not in wanted:
            assert layer.error <= np.sqrt(1 - wanted["energy"])
        missing += float(np.sum((merged[name] - after[name]) ** 2))
        changed += float(np.sum(difference**2))
    assert report.error == pytest.approx(np.sqrt(missing / changed), rel=1e-4)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all(
        f"| {layer.module} |" in card and f"{layer.error:.4f}" in card for layer in report.adapted
    )


def test_a_head_that_the_base_does_not_have_is_kept_whole(tmp_path: Path) -> None:
    """The fine-tune untied its head; where PEFT runs it, the base's embedding stays as it was."""
    base = saved(MODELS["tied"](), tmp_path / "base")
    model = loaded(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    fine = tuned(tmp_path / "untied", tmp_path / "fine", lambda n: "lm_head" in n or "q_proj" in n)
    report = extracted(base, fine, tmp_path / "adapter", rank=16)
    assert report.saved == ("lm_head.weight",)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(
            loaded(base, torch.float64), tmp_path / "adapter"
        ).double()
        exact = loaded(fine, torch.float64)(tokens).logits
        assert relative(adapted(tokens).logits.numpy(), exact.numpy()) <= 1e-5


def test_the_same_bytes_come_out_twice(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    fine = tuned(base, tmp_path / "fine", lambda n: True)
    for out, threads in (("one", 1), ("two", 3)):
        extracted(base, fine, tmp_path / out, energy=0.7, threads=threads)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "mergetool.json",
    ]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_grown_vocabulary_is_kept_whole(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    model = loaded(base)
    model.resize_token_embeddings(43)
    model.save_pretrained(tmp_path / "grown")
    fine = tuned(tmp_path / "grown", tmp_path / "fine", lambda n: "q_proj" in n)
    report = extracted(base, fine, tmp_path / "adapter", rank=16)
    assert report.rows == 43
    assert "resize_token_embeddings(43)" in (tmp_path / "adapter" / "README.md").read_text()
    resized = loaded(base)
    resized.resize_token_embeddings(43)
    merged = (
        PeftModel.from_pretrained(resized, tmp_path / "adapter").merge_and_unload().state_dict()
    )
    for name, value in load_file(fine / "model.safetensors").items():
        assert relative(merged[name].numpy(), value) <= 2**-22


def renamed(folder: Path, rule: Callable[[str], str]) -> None:
    file = folder / "model.safetensors"
    save_file({rule(name): value for name, value in load_file(file).items()}, file)


def test_stored_names_without_their_first_part_are_found(tmp_path: Path) -> None:
    base = saved(MODELS["gpt2"](), tmp_path / "base")
    fine = tuned(base, tmp_path / "fine", lambda n: "attn" in n)
    for folder in (base, fine):
        renamed(folder, lambda name: name.removeprefix("transformer."))
    report = extracted(base, fine, tmp_path / "adapter", rank=4)
    assert {layer.module for layer in report.adapted} == {
        f"transformer.h.{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj")
    }


def test_what_peft_cannot_hold_is_named_or_left_out(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    fine = tuned(base, tmp_path / "fine", lambda n: "q_proj" in n)
    file = fine / "model.safetensors"
    extra = {"model.layers.0.gate.weight": np.full((3, 4), 2, "<f4")}
    save_file(load_file(file) | extra, file)
    with pytest.raises(PlanError, match=r"model\.layers\.0\.gate\.weight \(1 in all\)"):
        extracted(base, fine, tmp_path / "adapter", rank=16)
    assert not (tmp_path / "adapter").exists()
    report = extracted(base, fine, tmp_path / "adapter", rank=16, drop=True)
    assert report.dropped == {"model.layers.0.gate.weight": pytest.approx(np.sqrt(48))}
    assert report.error > 0.9
    assert "layers.0.gate.weight`: 6.928" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("wanted", "changed", "part"),
    [
        ({}, "q_proj", "give a rank or an energy"),
        ({"rank": 4}, "norm", "no linear layer changed"),
        ({"rank": 4}, "nothing", "no linear layer changed"),
    ],
)
def test_a_request_that_gives_no_adapter_is_refused(
    tmp_path: Path, wanted: dict[str, Any], changed: str, part: str
) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    fine = tuned(base, tmp_path / "fine", lambda n: changed in n)
    with pytest.raises(PlanError, match=part):
        extracted(base, fine, tmp_path / "adapter", **wanted)
    assert not (tmp_path / "adapter").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    base = saved(MODELS["llama"](), tmp_path / "base")
    with pytest.raises(PlanError, match="lacks tensor"):
        extracted(base, saved(MODELS["phi3"](), tmp_path / "phi3"), tmp_path / "adapter", rank=4)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["pipeline"]}))
    with pytest.raises(SourceError, match="cannot build 'pipeline'"):
        extracted(base, base, tmp_path / "adapter", rank=4)
