"""The shipped suites name what the installed harness has; answers that loop are told from others."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge.errors import RequestError
from merge.score import ModelScores, Score, Suite, Task, check_tasks
from merge.score.answers import ends_in_loop
from merge.score.harness import harness_with, metrics_of, tasks_by_name
from merge.shipped import shipped

PUBLIC = sorted(file.stem for file in shipped("evals/suites").glob("*.yaml"))


@pytest.fixture(scope="module")
def harness() -> Any:
    return harness_with(["arc_easy"], [])


def test_there_are_the_suites_that_are_promised() -> None:
    assert PUBLIC == ["eq-bench", "german", "nous", "open-llm", "open-llm-2"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_task_metric_and_direction_is_the_harness_s(name: str, harness: Any) -> None:
    suite = Suite.named(name)
    assert suite.source
    assert len({task.name for task in suite.tasks}) == len(suite.tasks)
    check_tasks(suite, harness)
    for task in suite.tasks:
        assert metrics_of(task.name, harness)[task.metric] is task.higher_is_better


def test_the_check_finds_what_is_wrong(harness: Any) -> None:
    suite = Suite.named("german")
    first = suite.tasks[0]
    for wrong, what in (
        (replace(first, name="arc_dee"), r"'arc_dee' in lm-eval \(did you mean 'arc_"),
        (replace(first, metric="acc_nrm,none"), r"no metric 'acc_nrm,none' \(did you mean 'acc_norm,none'"),
        (replace(first, higher_is_better=False), "more is better by the harness"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=what):
            check_tasks(replace(suite, tasks=(wrong,)), harness)


def test_groups_and_tags_and_filters_are_found_by_name() -> None:
    names = ["mmlu", "ai2_arc", "gsm8k=exact_match:flexible-extract", "wikitext", "arc_d*"]
    suite, _ = tasks_by_name(names)
    found = {task.name: (task.metric, task.higher_is_better) for task in suite.tasks}
    assert found["mmlu"] == ("acc,none", True)
    assert found["ai2_arc"] == ("acc,none", True)
    assert found["gsm8k"] == ("exact_match,flexible-extract", True)
    assert found["wikitext"] == ("word_perplexity,none", False)
    assert {"arc_de", "arc_da"} <= found.keys()


def test_parts_count_alike_whatever_their_number_of_tasks() -> None:
    scores = {
        "a": Score(0.2, 0.01, 9, part="x"),
        "b": Score(0.4, 0.03, 9, part="x"),
        "c": Score(0.9, 0.02, 9, part="y"),
        "d": Score(0.6, 0.0, 9),
    }
    model = ModelScores("m", scores)
    assert model.mean == pytest.approx((0.3 + 0.9 + 0.6) / 3)
    variance = (0.01 / 6) ** 2 + (0.03 / 6) ** 2 + (0.02 / 3) ** 2
    assert model.mean_stderr == pytest.approx(variance**0.5)


def test_a_suite_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("tasks:\n- {task: eq_bench, metric: 'eqbench,none', full: 100}\n")
    assert Suite.named(str(file)).tasks == (Task("eq_bench", "eqbench,none", True, full=100),)


@pytest.mark.parametrize(
    ("batch_size", "more", "what"),
    [
        ("1", "metrik: acc", "metrik is no key of a task"),
        ("auto", "", "batch_size is 'auto'; it must be a whole number from 1"),
        ("0", "", "batch_size is 0"),
        ("true", "", "batch_size is True"),
        ("1", "full: 0", "full is 0; it must be a number above 0"),
        ("1", "full: .nan", "full is nan"),
        ("1", "full: ten", "full is 'ten'"),
        ("1", "num_fewshot: -1", "num_fewshot is -1; it must be a whole number from 0"),
        ("1", "num_fewshot: few", "num_fewshot is 'few'"),
        ("1", "higher_is_better: 'false'", "higher_is_better is 'false'; it must be true or false"),
    ],
)
def test_a_suite_that_is_none_is_told(
    tmp_path: Path, batch_size: str, more: str, what: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"batch_size: {batch_size}\ntasks:\n- {{task: eq_bench, metric: 'eqbench,none', {more}}}\n"
    )
    with pytest.raises(RequestError, match=f"mine.yaml: is no suite .*{re.escape(what)}"):
        Suite.named(str(file))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("taskz: []", "taskz is no key of a suite"),
        ("tasks: mine", "tasks must be a list of tables"),
        ("tasks: [{task: a, metric: m}, {task: a, metric: n}]", "tasks names a twice"),
    ],
)
def test_keys_and_tasks_of_a_suite_are_checked(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RequestError, match=what):
        Suite.named(str(file))


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("The answer is yes. " * 10, True),
        ("First we add." + "\nI am not sure." * 6, True),
        ("na" * 30, True),
        ("One, two, three. Then we add them up and get six, which is the answer.", False),
        ("It ends with dots" + "." * 30, False),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |", False),
        ("", False),
    ],
)
def test_what_ends_in_a_loop(text: str, loops: bool) -> None:
    assert ends_in_loop(text) is loops
