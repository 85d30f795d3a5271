"""Scores come from real lm-eval runs on the tiny family; damaged models are met, not scored."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from full_disk import full_after
from ran import Ran
from safetensors.torch import load_file, save_file

from merge.errors import RequestError, ScoreError, WriteError
from merge.score import ModelScores, Score, Scores, Suite, Task, score_models, table
from merge.score.models import weight_bytes
from merge.shipped import shipped

BASE = shipped("evals/zoo/base")
ADAPTER = "zoo:adapters/roman-attention"


@pytest.fixture(scope="module")
def scores() -> Scores:
    suite = Suite.named("quickstart")
    return score_models([BASE, BASE], suite, labels=["one", "other"], limit=8)


def test_equal_models_score_equally_and_as_lm_eval_counts(scores: Scores) -> None:
    one, other = scores.models
    assert one.tasks == other.tasks
    assert one.tasks.keys() == {task.name for task in scores.suite.tasks}
    for score in one.tasks.values():
        assert score.documents == 8
        assert score.value * 8 == pytest.approx(round(score.value * 8))
        # the standard error of a mean of n zeros and ones
        expected = math.sqrt(score.value * (1 - score.value) / 7)
        assert score.stderr == pytest.approx(expected)


def test_mean_and_its_standard_error() -> None:
    model = ModelScores("m", {"a": Score(0.2, 0.03, 10), "b": Score(0.6, 0.04, 10)})
    assert model.mean == pytest.approx(0.4)
    assert model.mean_stderr == pytest.approx(0.025)


def test_the_table_names_models_and_tasks_and_marks_the_best() -> None:
    suite = Suite("s", Path(), (Task("s_x", "m", True), Task("s_y", "m", True)), 1)
    better = ModelScores("better", {"s_x": Score(0.5, 0.01, 9), "s_y": Score(0.7, math.nan, 9)})
    worse = ModelScores("worse", {"s_x": Score(0.5, 0.01, 9), "s_y": Score(0.1, 0.01, 9)})
    lines = table(Scores(suite, (worse, better))).splitlines()
    assert lines[0].split() == ["model", "x", "y", "mean"]
    assert lines[2].startswith("worse")
    assert not lines[2].endswith("*")
    assert lines[3].startswith("better")
    assert lines[3].endswith("*")
    assert "9 documents" in lines[4]


@pytest.mark.parametrize(
    ("metric", "full", "value", "shown"),
    [
        ("acc,none", 1, 0.231, "23.1"),
        ("eqbench,none", 100, 0.231, "23.1"),
        ("eqbench,none", 1, 23.1, "23.100"),
        ("bleu_max,none", 1, 0.5, "0.500"),
        ("chrf++,none", 1, 0.5, "0.500"),
        ("bleu_acc,none", 1, 0.5, "50.0"),
        ("never_heard_of,none", 1, 23.1, "23.100"),
    ],
)
def test_per_cent_are_shown_of_what_is_a_share(
    metric: str, full: float, value: float, shown: str
) -> None:
    suite = Suite("s", Path(), (Task("x", metric, True, full=full),), 1)
    told = table(Scores(suite, (ModelScores("a", {"x": Score(value, math.nan, 9)}),)))
    assert told.splitlines()[2].split()[1] == shown


def test_json_has_no_nan() -> None:
    suite = Suite("s", Path(), (Task("x", "m", True),), 1)
    score = Score(0.5, math.nan, 9, metrics={"m": 0.5, "m_stderr": math.nan, "other": math.inf})
    told = json.loads(
        json.dumps(Scores(suite, (ModelScores("a", {"x": score}),)).as_json(), allow_nan=False)
    )
    (model,) = told["models"]
    assert (model["mean"], model["mean_stderr"], model["tasks"]["x"]["stderr"]) == (0.5, None, None)
    assert model["tasks"]["x"]["metrics"] == {"m": 0.5, "m_stderr": None, "other": None}


def test_splits_are_different_tasks() -> None:
    held = {t.name for t in Suite.named("quickstart").tasks}
    search = {t.name for t in Suite.named("quickstart", split="search").tasks}
    assert held
    assert search
    assert not held & search


def test_an_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"no suite 'nonsense'.*quickstart"):
        Suite.named("nonsense")


def test_a_suite_in_any_folder_is_found(tmp_path: Path) -> None:
    shutil.copytree(shipped("evals/suites/quickstart"), tmp_path / "mine")
    suite = Suite.named(str(tmp_path / "mine"))
    (model,) = score_models([BASE], suite, labels=["base"], limit=2).models
    assert len(model.tasks) == len(suite.tasks)


def test_nan_weights_are_not_scored(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ScoreError, match="damaged: its logits are not finite"):
        score_models([tmp_path / "damaged"], Suite.named("quickstart"), labels=["damaged"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"model_type": "no-such-architecture"}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
        ("model.safetensors", b"\x08"),
        ("tokenizer.json", b"[]"),
    ],
)
def test_a_folder_that_does_not_load_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copytree(BASE, tmp_path / "broken")
    (tmp_path / "broken" / name).write_bytes(content)
    with pytest.raises(ScoreError, match="broken: cannot be loaded for scoring") as error:
        score_models([tmp_path / "broken"], Suite.named("quickstart"), labels=["broken"])
    assert "\n" not in str(error.value)


def test_weights_of_pytorch_count_where_there_are_no_others(tmp_path: Path) -> None:
    for name, size in (
        ("pytorch_model-1-of-2.bin", 5),
        ("pytorch_model-2-of-2.bin", 3),
        ("training_args.bin", 9),
    ):
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 8
    (tmp_path / "model.safetensors").write_bytes(bytes(4))
    assert weight_bytes(tmp_path) == 4


def test_samples_on_a_full_disk_are_one_line(tmp_path: Path) -> None:
    suite, samples = Suite.named("quickstart"), tmp_path / "samples.jsonl"
    with full_after(100), pytest.raises(WriteError, match="File too large"):
        score_models([BASE], suite, labels=["base"], limit=1, samples=samples)


def test_the_command_prints_one_json_document(command: Callable[..., Ran]) -> None:
    ran = command("score", "zoo:base", "--limit", 2, "--json")
    assert ran.code == 0
    data = json.loads(ran.out)
    assert [m["model"] for m in data["models"]] == ["zoo:base"]
    assert ran.err == ""


def test_an_adapter_is_not_scored_and_refused_before_it_is_written(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        "merge_method: passthrough\nbase_model: zoo:base\nadapter: {}\n"
        f"models: [{{model: '{ADAPTER}'}}]\n"
    )
    ran = command("run", "r.yaml", "-o", "out", "--score")
    assert ran.code == 2
    assert "r.yaml: --score: the result is an adapter" in ran.error
    assert not list(tmp_path.glob("out*"))


def test_run_scores_the_result_beside_its_parents(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nmodels:\n- model: zoo:base\n  parameters: {weight: 1}\n"
        "score: {suite: quickstart, limit: 2}\n"
    )
    ran = command("run", "r.yaml", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    result, parent = json.loads(ran.out)["scores"]["models"]
    assert (result["model"], parent["model"]) == ("out", "zoo:base")
    assert result["tasks"] == parent["tasks"]  # a merge of one model is that model
