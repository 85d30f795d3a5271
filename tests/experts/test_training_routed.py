"""Laws of training the routers of a mixture of LoRAs, which brings its modelling file along."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from routed_models import in_one_process
from stock_moe import outputs

from merge.errors import RequestError
from merge.experts.routers.gates import gates_of
from merge.experts.training.learning import Course, train_router
from merge.experts.training.running import opened
from merge.pipeline import run_recipe
from merge.score import Suite, score_models
from merge.shipped import shipped
from merge.sources.opening import open_model

SKILLS = {"sort": "zoo:adapters/sort-mixed-ranks", "roman": "zoo:adapters/roman-rslora"}
TEXTS = [shipped("evals/zoo/texts") / f"{skill}.jsonl" for skill in SKILLS]
SHORT = Course(steps=20, rate=0.02)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def routed(folder: Path, **router: Any) -> Path:
    experts = [{"adapter": adapter} for adapter in SKILLS.values()]
    recipe = folder / "mix.yaml"
    recipe.write_text(
        yaml.safe_dump({"base_model": "zoo:base", "experts": experts, "router": router})
    )
    with in_one_process():
        return run_recipe(recipe, folder / "mix", load=False).folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed(tmp_path_factory.mktemp("mixture"), mode="uniform")


def told_otherwise(mixture: Path, folder: Path, **changes: Any) -> Path:
    """A copy whose config.json says something else about its routers."""
    shutil.copytree(mixture, folder)
    config = json.loads((mixture / "config.json").read_text())
    config["mixture"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_only_router_tensors_change_and_texts_are_predicted_better(
    mixture: Path, tmp_path: Path
) -> None:
    done = train_router(mixture, TEXTS, tmp_path / "out", SHORT)
    before, after = outputs(mixture), outputs(done.folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.endswith(".router.weight")}
    assert len(changed) == 4 * len(MODULES)
    first, last = done.told["held_out_loss"]
    assert last < first
    for file in ("config.json", "modeling_mixture.py", "tokenizer.json"):
        assert (mixture / file).read_bytes() == (done.folder / file).read_bytes()
    told = score_models([done.folder], Suite.named("quickstart"), labels=["trained"], limit=2)
    assert 0 <= told.models[0].mean <= 1


def test_shared_routers_and_fixed_shares_are_trained_as_well(tmp_path: Path) -> None:
    mixture = routed(tmp_path, mode="weights", weights=[0.7, 0.3], per="layer")
    done = train_router(mixture, TEXTS, tmp_path / "out", SHORT)
    before, after = outputs(mixture), outputs(done.folder)
    changed = {name for name in before if before[name] != after[name]}
    layers = [f"model.layers.{i}.router" for i in range(4)]
    assert changed == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_scores_are_one_row_a_token_whose_softmax_are_the_shares(
    mixture: Path, tmp_path: Path
) -> None:
    trained = train_router(mixture, TEXTS, tmp_path / "out", SHORT).folder
    model = open_model(str(told_otherwise(trained, tmp_path / "other", temperature=0.5)))
    running = opened(model, gates_of(model), "cpu", False)
    ids = torch.tensor([[1, 5, 9, 30], [1, 7, 8, 9]])
    router = running.model.get_submodule("model.layers.1.self_attn.q_proj.router")
    with running.watched() as scores, torch.no_grad():
        running.model(ids)
        found = scores()
    assert len(found) == len(running.routers)
    assert {tuple(s.shape) for s in found} == {(8, 2)}
    shares = router.gates.flatten(0, -2)  # of both experts: top_k is 2
    assert any(torch.allclose(s.softmax(-1), shares) for s in found)


def test_one_adapter_a_token_with_the_whole_share_is_refused(mixture: Path, tmp_path: Path) -> None:
    single = told_otherwise(mixture, tmp_path / "single", top_k=1)
    with pytest.raises(RequestError, match=r"top_k is 1 .* or with normalise: false"):
        train_router(single, TEXTS, tmp_path / "out", SHORT)


def test_code_that_is_not_ours_is_not_run(mixture: Path, tmp_path: Path) -> None:
    strange = told_otherwise(mixture, tmp_path / "strange")
    with (strange / "modeling_mixture.py").open("a") as file:
        file.write("\nraise SystemExit('ran')\n")
    with pytest.raises(RequestError, match="--trust-remote-code"):
        train_router(strange, TEXTS, tmp_path / "out", SHORT)
