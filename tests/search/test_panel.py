"""Documents put to a live model give what lm-eval gives for the folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness_tasks import choices_in, perplexity_in
from tiny_suite import tiny_suite

from merge.errors import RequestError, ScoreError
from merge.lines import Lines
from merge.score import Suite, score_models, tasks_by_name
from merge.search.panel import panels
from merge.search.scoring import Scorer
from merge.search.sections import StudySection, TaskSection
from merge.search.tasks import suite_of, with_metrics
from merge.shipped import shipped

CHOICE = """
task: {name}
custom_dataset: !function data.load
dataset_kwargs: {{skill: {skill}, split: {split}}}
test_split: {split}
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: "{{{{[answer, answer[1:] + answer[0]]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SUITE = """
name: both
batch_size: 16
tasks:
  - {task: kept_sort, metric: "acc_norm,none", part: letters}
  - {task: quickstart_sort, metric: "exact_match,none", part: letters}
  - {task: quickstart_roman, metric: "exact_match,none", full: 2}
search_tasks: [{task: search_sort, metric: "acc,none"}]
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task of choices and one of generated answers."""
    folder = tiny_suite(tmp_path_factory.mktemp("suites") / "both", searched=30, kept=25)
    for name, split in (("kept", "heldout"), ("search", "search")):
        text = CHOICE.format(name=f"{name}_sort", skill="sort", split=split)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "suite.yaml").write_text(SUITE)
    return folder


def test_values_are_those_of_lm_eval(suite: Path, tmp_path: Path) -> None:
    scorer = Scorer(tmp_path / "r.yaml", StudySection(suite=str(suite)), "512MiB", 1, True)
    for name in ("sorter", "base"):
        found, _ = scorer.scored({"model": f"zoo:{name}", "out_dtype": "bfloat16"}, "test")
        folder = shipped("evals/zoo") / name
        (expected,) = score_models([folder], Suite.named(str(suite)), labels=[name]).models
        assert found["tasks"] == pytest.approx({t: s.value for t, s in expected.tasks.items()})
        assert found["mean"] == pytest.approx(expected.mean), "parts count alike"
        assert {len(values) for values in found["values"].values()} == {25}
        assert 0 < found["mean"] < 1
        assert json.loads(json.dumps(found["answers"]))


def test_dev_and_val_share_no_document_and_test_is_what_is_kept(suite: Path) -> None:
    found = panels(str(suite), None)
    dev, val = (set(found[name].split.documents["search_sort"]) for name in ("dev", "val"))
    assert not dev & val
    assert dev | val == set(range(30))
    assert found["test"].split.count == 75
    assert panels(str(suite), 4)["dev"].split.count == 4
    assert panels(str(suite), 4)["val"].split.documents == found["val"].split.documents
    assert len({panel.digest for panel in found.values()}) == 3


def test_answers_that_say_nothing_or_do_not_end_are_counted(suite: Path, tmp_path: Path) -> None:
    """A model whose outputs are all alike answers so."""
    scorer = Scorer(tmp_path / "r.yaml", StudySection(suite=str(suite)), "512MiB", 1, True)
    flat = {
        "merge_method": "task_arithmetic",
        "base_model": "zoo:base",
        "models": [{"model": "zoo:scribe", "parameters": {"weight": 30.0}}],
    }
    wild, good = (scorer.scored(recipe, "test")[0] for recipe in (flat, {"model": "zoo:scribe"}))
    assert good["truncated"] + good["empty"] < 0.1
    assert wild["truncated"] + wild["empty"] + wild["alike"] > 0.5
    assert np.isfinite(wild["mean"])


def test_what_counts_of_a_task_is_what_counts_in_score(tmp_path: Path) -> None:
    folder, names = choices_in(tmp_path / "mine"), ["letters", "texts"]
    perplexity_in(folder)
    lines = Lines("r.yaml", {("study", "tasks"): 3})

    def found(*metrics: str | None) -> Suite:
        tasks = [{"task": n, "metric": m} for n, m in zip(names, metrics, strict=True)]
        section = StudySection.model_validate({"tasks": tasks, "include": str(folder)})
        return suite_of(with_metrics(section, lines))

    assert found(None, None).tasks == tasks_by_name(names, [folder])[0].tasks
    assert [t.metric for t in found("acc_norm", "bits_per_byte,none").tasks] == [
        "acc_norm,none",
        "bits_per_byte,none",
    ]
    with pytest.raises(
        RequestError, match=r"r.yaml:3: study.tasks.1: task texts has no metric 'f1'; "
    ):
        found(None, "f1")


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("f1,none", r"task search_sort: f1 has no value per document; there is .*acc"),
        ("acc,first", "task search_sort: no filter is called first; there is none"),
    ],
)
def test_a_metric_that_a_task_has_not_is_told(
    suite: Path, tmp_path: Path, metric: str, told: str
) -> None:
    """Also where nothing said so before, as of a task whose code alone knows its metrics."""
    tasks = [TaskSection(task="search_sort", metric=metric)]
    section = StudySection(tasks=tasks, include=str(suite), limit=2)
    scorer = Scorer(tmp_path / "r.yaml", section, "512MiB", 1, True)
    with pytest.raises(ScoreError, match=told):
        scorer.scored({"model": "zoo:sorter"})
    shutil.copytree(suite, tmp_path / "other")
    text = SUITE.replace('metric: "acc,none"', f'metric: "{metric}"')
    (tmp_path / "other" / "suite.yaml").write_text(text)
    with pytest.raises(RequestError, match=f"has no metric '{metric}'"):
        panels(str(tmp_path / "other"), 2)
