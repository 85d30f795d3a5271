"""Killed at any moment, as often as one likes, a search comes to the end that it would have come to."""

import random
from pathlib import Path

import pytest
from forks import die_at, is_killed
from tiny_search import check_whole, facts, searched, written
from tiny_suite import tiny_suite

from merge.search.ledger import Candidate
from merge.search.outcome import Outcome

TRIALS, KILLS, SEED = 8, 20, 11
MOMENTS = 250  # at most between two kills: about what two candidates have

pytestmark = pytest.mark.usefixtures("one_thread")


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
        moment = drawn.randrange(1, MOMENTS)

        def doomed(moment: int = moment) -> None:
            die_at(moment)
            searched(file, tmp_path / "study", lambda c, s: _note(scored, c))

        assert is_killed(doomed), number
    before = scored.read_text().split()
    found, end = searched(file, tmp_path / "study")
    assert facts(found) == facts(candidates)
    assert end.as_json() == outcome.as_json()
    check_whole(found, TRIALS)
    assert len(before) == len(set(before)) >= 3, "what had ended was scored again"


def _note(scored: Path, candidate: Candidate) -> None:
    with scored.open("a") as file:
        file.write(f"{candidate.number}\n")
