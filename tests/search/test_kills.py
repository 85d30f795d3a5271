"""Killed at any moment, as often as one likes, a search comes to the end that it would have come to."""

import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch
from tiny_search import check_whole, facts, searched, written
from tiny_suite import tiny_suite

from merge.search.ledger import Candidate
from merge.search.live import LiveModel
from merge.search.outcome import Outcome
from merge.search.panel import Panel

TRIALS, KILLS, SEED = 8, 20, 11
MOMENTS = 250  # at most between two kills: about what two candidates have


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a process that is forked from one with others waits for them
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Candidate], Outcome]:
    folder = tmp_path_factory.mktemp("whole")
    file = written(folder, tiny_suite(folder / "suite"), TRIALS)
    return (file, *searched(file, folder / "study"))


def test_twenty_kills_change_nothing(
    tmp_path: Path, whole: tuple[Path, list[Candidate], Outcome]
) -> None:
    """At statements of the database and around its commits, while a model is written and while it is asked;
    each kill is a SIGKILL of the process that searches."""
    file, candidates, outcome = whole
    drawn, scored = random.Random(SEED), tmp_path / "scored"
    for number in range(KILLS):
        assert _killed(file, tmp_path / "study", drawn.randrange(1, MOMENTS), scored), number
    before = scored.read_text().split()
    found, end = searched(file, tmp_path / "study")
    assert facts(found) == facts(candidates)
    assert end.as_json() == outcome.as_json()
    check_whole(found, TRIALS)
    assert len(before) == len(set(before)) >= 3, "what had ended was scored again"


def _killed(file: Path, folder: Path, moment: int, scored: Path) -> bool:
    """Whether the search was killed at its moment-th moment; False: it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            announce(moment)
            searched(file, folder, lambda c, s: _note(scored, c))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _note(scored: Path, candidate: Candidate) -> None:
    with scored.open("a") as file:
        file.write(f"{candidate.number}\n")


class _Moments:
    """Counts, and kills its process at the last one."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def announce(last: int) -> None:
    """Has whatever a search does announce itself before and after it was done; the last one kills."""
    moment = _Moments(last)
    for event in ("before_cursor_execute", "after_cursor_execute", "commit"):
        sqlalchemy.event.listen(sqlalchemy.Engine, event, moment)
    LiveModel.write = _around(LiveModel.write, moment)  # type: ignore[method-assign]
    Panel.marks = _around(Panel.marks, moment)  # type: ignore[method-assign]


def _around(done: Callable[..., Any], moment: _Moments) -> Callable[..., Any]:
    def announced(*arguments: Any) -> Any:
        moment()
        result = done(*arguments)
        moment()
        return result

    return announced
