"""Models judged over real HTTP by models whose replies are known."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judges import Served, questions_in
from ran import Ran

from merge.judge.answering import identity_of
from merge.score.models import candidate
from merge.shipped import shipped

Command = Callable[..., Ran]
TURNS = [("roman 12", "roman 7"), ("roman 3", "roman 12"), ("roman 99", "roman 5")]
PAIR = ("zoo:clerk", "zoo:mirror")


@pytest.fixture
def asked(command: Command, served: Served, tmp_path: Path) -> Callable[..., Ran]:
    """`mergetool judge` of models by one of the judges, on three questions."""
    questions_in(tmp_path / "q.jsonl", TURNS)

    def run(judge: str, *models: object) -> Ran:
        return command(
            "judge", *models, "--judge-url", served.url, "--judge-model", served.judges[judge],
            "--questions", "q.jsonl", "--max-tokens", 24, "--output", "kept", "--json",
        )  # fmt: skip

    return run


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def result(ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    (found,) = json.loads(ran.out)["results"]
    return dict(found)


def test_every_answer_gets_the_grade_that_the_judge_gives(
    asked: Callable[..., Ran], served: Served, tmp_path: Path
) -> None:
    before = served.requests
    found = result(asked("seven", "zoo:clerk"))
    assert found["grade"] == {"mean": 7, "stderr": 0, "count": 3}
    assert found["grades"] == {f"q{i}": [7, 7] for i in range(3)}
    assert (found["asked"], found["asked_again"], found["unreadable"]) == (6, 0, 0)
    assert served.requests - before == 6
    answers = rows(tmp_path / "kept" / "answers.jsonl")
    assert answers[0]["answer"]["text"] == "XII"  # its own template was used
    assert not any(row["answer"]["cut"] for row in answers)
    replies = [row["answer"] for row in rows(tmp_path / "kept" / "grades.jsonl")]
    assert replies == [{"text": "Grade: 7", "ended": "stop"}] * 6
    # all of it is kept: the same again asks nobody
    assert result(asked("seven", "zoo:clerk")) == found
    assert served.requests - before == 6


def test_what_cannot_be_read_is_asked_for_once_more(
    asked: Callable[..., Ran], served: Served
) -> None:
    before = served.requests
    found = result(asked("slow", "zoo:clerk"))
    assert found["grade"]["mean"] == 7
    assert (found["asked"], found["asked_again"], found["unreadable"]) == (6, 6, 0)
    assert served.requests - before == 12


def test_where_nothing_can_be_read_there_is_no_grade(
    asked: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = asked("mumbler", "zoo:clerk")
    assert ran.code == 1
    assert "none of its 6 replies could be read; they are in kept/grades.jsonl" in ran.error
    assert len(rows(tmp_path / "kept" / "grades.jsonl")) == 12


def test_a_reply_that_was_cut_off_is_no_grade(
    command: Command, served: Served, tmp_path: Path
) -> None:
    """The judge may say as much as `Grade: 7`, and it is not known that it is not 75."""
    questions_in(tmp_path / "q.jsonl", TURNS[:1])
    ran = command(
        "judge", "zoo:clerk", "--questions", "q.jsonl", "--max-tokens", 8, "--output", "kept",
        "--judge-url", served.url, "--judge-model", served.judges["seven"],
    )  # fmt: skip
    assert ran.code == 1
    assert (
        "none of its 2 replies could be read (2 cut off at --max-tokens or filtered)" in ran.error
    )
    replies = [row["answer"] for row in rows(tmp_path / "kept" / "grades.jsonl")]
    assert replies == [{"text": "Grade: 7", "ended": "length"}] * 4


def test_one_wins_a_question_where_both_orders_say_so(asked: Callable[..., Ran]) -> None:
    """XII is in the answers of clerk to the first question, in those of mirror to the second (XXIII), and in
    nobody's to the third, about which this judge says nothing that can be read."""
    ours, theirs = (result(asked("fair", *models)) for models in (PAIR, PAIR[::-1]))
    assert ours["verdicts"] == {"q0": ["A", "B"], "q1": ["B", "A"], "q2": [None, None]}
    assert theirs["verdicts"] == {"q0": ["B", "A"], "q1": ["A", "B"], "q2": [None, None]}
    for found in (ours, theirs):
        assert (found["wins"], found["ties"], found["losses"]) == (1, 0, 1)
        assert found["win_rate"]["count"] == 2
        assert found["first_place"]["mean"] == 0.5
        assert found["inconsistent"] == 0
        assert (found["unreadable"], found["asked"], found["asked_again"]) == (2, 6, 2)


def test_a_judge_who_looks_at_the_order_alone_is_found_out(asked: Callable[..., Ran]) -> None:
    found = result(asked("first", *PAIR))
    assert (found["wins"], found["ties"], found["losses"]) == (0, 3, 0)
    assert found["inconsistent"] == 3
    assert found["first_place"]["mean"] == 1
    assert found["win_rate"]["mean"] == 0.5


def test_two_models_are_graded_one_by_one_where_that_is_wanted(
    command: Command, served: Served, tmp_path: Path
) -> None:
    questions_in(tmp_path / "q.jsonl", TURNS[:1])
    ran = command(
        "judge", "zoo:clerk", "zoo:mirror", "--single", "--questions", "q.jsonl", "--max-tokens", 24,
        "--judge-url", served.url, "--judge-model", served.judges["seven"],
    )  # fmt: skip
    assert ran.out.splitlines() == [
        "zoo:clerk: 7.00 of 10 on 1 question",
        "zoo:mirror: 7.00 of 10 on 1 question",
    ]


def test_a_model_without_a_template_is_refused(asked: Callable[..., Ran], tmp_path: Path) -> None:
    ran = asked("seven", "zoo:base")
    assert ran.code == 2
    assert "zoo:base: has no chat template" in ran.error
    assert not (tmp_path / "kept").exists()


def test_killed_in_the_middle_it_asks_nothing_twice(served: Served, tmp_path: Path) -> None:
    questions_in(tmp_path / "q.jsonl", [(f"roman {i}", f"roman {i + 50}") for i in range(1, 13)])
    line = [
        sys.executable, "-m", "merge.cli", "judge", "zoo:clerk", "--judge-url", served.url, "--judge-model",
        served.judges["seven"], "--questions", "q.jsonl", "--max-tokens", "24", "--output", "kept", "--json",
        "--parallel", "1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    grades, before = tmp_path / "kept" / "grades.jsonl", served.requests
    running = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while running.poll() is None and (
        not grades.exists() or len(grades.read_bytes().splitlines()) < 5
    ):
        time.sleep(0.01)  # fmt: skip
    running.send_signal(signal.SIGKILL)
    running.wait()
    with grades.open("ab") as file:  # as if it had been killed while it wrote
        file.write(b'{"key": "half')
    kept = len(grades.read_bytes().splitlines()) - 1
    assert 5 <= kept < 24
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["results"]
    assert found["grade"] == {"mean": 7, "stderr": 0, "count": 12}
    keys = [row["key"] for row in rows(grades)]
    assert len(keys) == len(set(keys)) == 24
    answers = [row["key"] for row in rows(tmp_path / "kept" / "answers.jsonl")]
    assert len(answers) == len(set(answers)) == 24
    # the one whose reply was not written down yet may have been asked for again
    assert served.requests - before <= 25


def test_another_template_beside_an_adapted_model_is_another_model(tmp_path: Path) -> None:
    base = shutil.copytree(shipped("evals/zoo/base"), tmp_path / "base")
    found = candidate(f"{base}+zoo:adapters/roman-attention")
    before = identity_of(found)
    assert identity_of(found) == before
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert identity_of(candidate(f"{base}+zoo:adapters/roman-attention")) != before
