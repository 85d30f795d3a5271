"""What a mixture cannot be made of, or must not run, is refused before anything is written."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from dense_models import dense, written
from routed_models import in_one_process

from merge.errors import OutputError, PlanError, RecipeError, RequestError, SourceError
from merge.experts.checks.trust import may_run_code
from merge.experts.configs import check_configs
from merge.experts.routers.gates import gates_of
from merge.experts.training.running import opened
from merge.pipeline import plan_recipe, run_recipe
from merge.recipe import parse_recipe
from merge.sources.inside import base_inside
from merge.sources.opening import open_model


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the tiny family behind routers."""
    folder = tmp_path_factory.mktemp("mixture")
    adapters = ({"adapter": f"zoo:adapters/{name}"} for name in ("roman-rslora", "elements-mlp"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "zoo:base", "experts": list(adapters)}))
    with in_one_process():
        return run_recipe(recipe, folder / "out", load=False).folder


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"models": [{"model": "other"}]}, "experts and models are both given"),
        ({"merge_method": "linear"}, "experts and merge_method are both given"),
        ({"base_model": None}, "experts need base_model"),
    ],
)
def test_experts_stand_beside_no_merge(more: dict[str, Any], what: str) -> None:
    data = {"base_model": "base", "experts": [{"source_model": "a"}]} | more
    text = yaml.safe_dump({key: value for key, value in data.items() if value is not None})
    with pytest.raises(RecipeError, match=what):
        parse_recipe(text)


@pytest.mark.parametrize(
    "key", ["router: {top_k: 1}", "format: routed", "layers: [0]", "gate_mode: random"]
)
def test_keys_of_mixtures_need_experts(key: str) -> None:
    with pytest.raises(
        RecipeError, match=f"{key.partition(':')[0]} is of a mixture; list its experts"
    ):
        parse_recipe(f"model: base\n{key}")


def test_an_expert_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base", "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}))
    recipe = written(tmp_path, ["other"], router={"mode": "random", "top_k": 1})
    with pytest.raises(
        PlanError, match=r"other: hidden_act is gelu in config.json, but silu in base"
    ):
        plan_recipe(recipe)


def test_an_expert_with_other_positions_is_noted(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base", "other")
    file = tmp_path / "other" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "rope_theta"}))
    recipe = written(tmp_path, ["other"], router={"mode": "random", "top_k": 1})
    assert any("rope_theta is 77.0" in note for note in plan_recipe(recipe).notes)


def test_shares_are_those_of_all_experts_unless_top_k_says_less(tmp_path: Path) -> None:
    entries = [
        {"adapter": f"zoo:adapters/{n}"}
        for n in ("roman-rslora", "elements-mlp", "roman-attention")
    ]
    recipe = tmp_path / "recipe.yaml"
    router = {"weights": [0.5, 0.3, 0.2]}
    recipe.write_text(
        yaml.safe_dump({"base_model": "zoo:base", "experts": entries, "router": router})
    )
    assert plan_recipe(recipe).config["mixture"]["top_k"] == 3


def test_several_adapters_in_a_row_are_no_expert(tmp_path: Path) -> None:
    entry = {"adapter": "zoo:adapters/roman-rslora+zoo:adapters/elements-mlp"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "zoo:base", "experts": [entry]}))
    with pytest.raises(PlanError, match="is several adapters in a row; an expert is one"):
        plan_recipe(recipe)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda told: _first(told).update(ranks=[1, 500]), r"has shape \[.*, but \[501, 'any'\]"),
        (lambda told: _first(told).update(ranks=[1]), "a damaged table `mixture`"),
        (lambda told: _first(told).update(ranks=[-1, 9]), "a damaged table `mixture`"),
        (lambda told: told.pop("per"), "a damaged table `mixture`"),
        (lambda told: told.update(top_k=9), "a damaged table `mixture`"),
        (lambda told: told["sites"].popitem(), "a damaged table `mixture`"),
    ],
)
def test_a_table_that_lies_about_sizes_is_refused(
    mixture: Path, tmp_path: Path, change: Any, what: str
) -> None:
    folder = shutil.copytree(mixture, tmp_path / "mixture")
    config = json.loads((folder / "config.json").read_text())
    change(config["mixture"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=what):
        base_inside(open_model(str(folder)))


def _first(told: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(told["modules"].values()))
    return found


def test_a_result_that_other_versions_compute_otherwise_is_not_called_another_merge(
    mixture: Path, tmp_path: Path
) -> None:
    folder, recipe = shutil.copytree(mixture, tmp_path / "out"), mixture.parent / "recipe.yaml"
    assert run_recipe(recipe, folder, load=False).existed
    told = json.loads((folder / "mergetool.json").read_text())
    routers = next(each for each in told["inputs"] if each["model"] == "routers")
    routers["digest"] = "0" * 32
    cases = {
        "4.0": r"is this merge, made by .*transformers 4\.0.*keep it",
        told["versions"]["transformers"]: "of another recipe or of other",
    }
    for transformers, what in cases.items():
        told["versions"]["transformers"] = transformers
        (folder / "mergetool.json").write_text(json.dumps(told))
        with pytest.raises(OutputError, match=what):
            run_recipe(recipe, folder, load=False)


def test_a_folder_that_overwrite_would_not_replace_is_not_said_to_be_replaced(
    mixture: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"choose another output$"):
        run_recipe(mixture.parent / "recipe.yaml", tmp_path / "out")


def test_code_of_a_tokenizer_never_runs(mixture: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mixture, tmp_path / "mixture")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    }
    file.write_text(json.dumps(told))
    model = open_model(str(folder))
    assert may_run_code(folder), "the modelling code itself is ours"
    with suppress(
        RequestError, ValueError
    ):  # whether it loads without its code is up to transformers
        opened(model, gates_of(model), "cpu", trusted=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "custom_generate"])
def test_what_leads_to_other_code_is_not_run(mixture: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(mixture, tmp_path / "mixture")
    (folder / name).write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(RequestError, match=f"{name}: is not what this version of mergetool writes"):
        may_run_code(folder)


def test_numbers_of_single_layers_are_no_error_where_nothing_reads_them(tmp_path: Path) -> None:
    """As in models whose MLPs are not all as wide."""
    dense(tmp_path, "llama", "base")
    model = open_model(str(tmp_path / "base"))
    odd = {"model_type": "other", "intermediate_size": [32, 24], "rope_theta": [1e4, 5e5]}
    check_configs([replace(model, config=model.config | odd)])
    with pytest.raises(
        PlanError, match=r"intermediate_size is \[32, 24\] in config.json; it must be a wh"
    ):
        check_configs([replace(model, config=model.config | odd | {"model_type": "llama"})])
    with pytest.raises(PlanError, match="intermediate_size is"):
        check_configs([replace(model, config=model.config | odd | {"intermediate_size": [[1]]})])


def test_a_table_named_mixture_makes_no_mixture(tmp_path: Path) -> None:
    dense(tmp_path, "llama", "base")
    file = tmp_path / "base" / "config.json"
    told = {"mixture": {"sites": {}, "bias": False, "experts": ["a", "b"], "top_k": 2}}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    with pytest.raises(RequestError):
        gates_of(open_model(str(tmp_path / "base")))
