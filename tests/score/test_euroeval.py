"""EuroEval as a program in an environment of its own: what it is asked, and what it writes.

The tests that need the program look for it where the command does, and are skipped where it is not.
"""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ran import Ran

from merge.score import ModelScores, Scores, Suite, Task, table
from merge.score.euroeval import command_line, read_results
from merge.shipped import shipped

PROGRAM = shutil.which(os.environ.get("MERGETOOL_EUROEVAL", "euroeval"))
installed = pytest.mark.skipif(PROGRAM is None, reason="no euroeval program")
# it would look for prices of hosted models
QUIET = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
# what its own classes write for ten iterations of two metrics
WRITING = """
from pathlib import Path
import math
from types import SimpleNamespace as Metric
from euroeval.data_models import BenchmarkResult
from euroeval.scores import log_scores
raw = [{"test_mcc": i / 100, "test_macro_f1": 0.5} for i in range(10)]
percent = lambda x: (100 * x, f"{x:.2%}")
metrics = [Metric(name=n, pretty_name=n, postprocessing_fn=percent) for n in ("mcc", "macro_f1")]
total = log_scores("d", metrics, raw, "m", "main", None)
BenchmarkResult(
    dataset="germeval", task="ner", languages=["de"], model="m", results=total, num_model_parameters=1,
    max_sequence_length=64, vocabulary_size=69, merge=False, generative=True, generative_type="base",
    few_shot=True, validation_split=False,
).append_to_results(Path("written.jsonl"))
"""


def test_results_are_read_as_shares_with_standard_errors() -> None:
    row = {
        "dataset": "scala-de",
        "results": {
            "raw": [{"test_mcc": 0.5}, {"test_mcc": 0.3}],
            "total": {"test_mcc": 40.0, "test_mcc_se": 19.6, "test_f1": 60.0, "test_f1_se": 1.0},
        },
    }
    ((name, (metric, score)),) = read_results(["", json.dumps(row)]).items()
    assert (name, metric) == ("scala-de", "mcc")
    # its "_se" is 1.96 standard errors
    assert (score.value, score.stderr) == (0.4, pytest.approx(0.1))
    assert (score.documents, score.iterations) == (0, 2)
    assert score.metrics["test_f1"] == 60
    scores = Scores(
        Suite("s", Path(), (Task(name, metric, True),), 1), (ModelScores("m", {name: score}),)
    )
    assert table(scores).endswith("per cent and standard error, 2 iterations a task")


def test_where_it_is_not_there_it_is_said_what_to_do(command: Callable[..., Ran]) -> None:
    asked = ("score", "zoo:base", "--backend", "euroeval", "--euroeval", "no-such-program")
    ran = command(*asked, "--tasks", "scala-de")
    assert ran.code == 2
    assert "no-such-program: no such program; install euroeval into an environment" in ran.error
    assert "needs --tasks with names of its data sets" in command(*asked).error


@pytest.mark.parametrize(
    "option",
    ["--suite s", "--split search", "--limit 3", "--num-fewshot 0", "--apply-chat-template", "--batch-size 1",
     "--samples s.jsonl", "--include .", "--memory 512MiB", "--threads 1"],
)  # fmt: skip
def test_what_it_would_not_be_told_is_refused(command: Callable[..., Ran], option: str) -> None:
    tasks = () if option.startswith(("--suite", "--split")) else ("--tasks", "scala-de")
    ran = command("score", "zoo:base", "--backend", "euroeval", *tasks, *option.split())
    assert ran.code == 2
    assert ran.error.startswith(f"--backend euroeval: {option.split()[0]} is not for EuroEval")


def test_a_program_beside_that_is_cut_off_is_told_by_its_last_words(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    """Of its results only the first is whole. The tests that need the real program are below."""
    row = json.dumps({"dataset": "a", "results": {"raw": [1], "total": {"test_mcc": 1.0}}})
    program = tmp_path / "own" / "euroeval"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\nprintf '%s\\n%s' '{row}' '{row[:30]}' > euroeval_benchmark_results.jsonl\n"
        "echo no more memory >&2\nexit 137\n"
    )
    program.chmod(0o755)
    asked = ("score", "zoo:base", "--backend", "euroeval", "--euroeval", "own/euroeval")
    ran = command(*asked, "--tasks", "a, b")
    assert ran.code == 1
    assert ran.error == "zoo:base: euroeval: b has no result: no more memory"


@installed
def test_the_program_has_the_options_that_are_given() -> None:
    assert PROGRAM is not None
    line = command_line(PROGRAM, Path("model"), ["germeval", "scala-de"], "cuda:0", True)
    told = subprocess.run(
        [PROGRAM, "--help"], capture_output=True, text=True, env=QUIET, check=True
    ).stdout
    known = set(re.findall(r"--[a-z-]+", told))
    assert {part for part in line if part.startswith("--")} <= known
    assert line[line.index("--device") + 1] == "cuda"


@installed
def test_what_it_writes_is_read(tmp_path: Path) -> None:
    assert PROGRAM is not None
    python = Path(PROGRAM).parent / "python"
    subprocess.run(
        [python, "-c", WRITING], cwd=tmp_path, env=QUIET, check=True, capture_output=True
    )
    lines = (tmp_path / "written.jsonl").read_text().splitlines()
    metric, score = read_results(lines)["germeval"]
    assert metric == "mcc"
    assert score.value == pytest.approx(0.045)
    deviation = math.sqrt(sum((i / 100 - 0.045) ** 2 for i in range(10)) / 9)
    assert score.stderr == pytest.approx(deviation / math.sqrt(10))


@installed
def test_a_data_set_without_a_result_is_an_error(
    command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LITELLM_LOCAL_MODEL_COST_MAP", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, QUIET[name])
    model = str(shipped("evals/zoo/base"))
    ran = command("score", model, "--backend", "euroeval", "--tasks", "no-such-set")
    assert ran.code == 1
    assert "euroeval: no-such-set has no result" in ran.error
