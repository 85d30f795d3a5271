"""Runs that share a study through a database, a file or a real server: each tries what no other does."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import postgres_server
import pytest
from forks import die, die_at, ended, forked, is_killed
from ran import Ran
from tiny_search import check_whole, facts, searched, written
from tiny_suite import tiny_suite

from merge.errors import OutputError, RequestError
from merge.search.ledger import Candidate, Ledger
from merge.search.live import LiveModel
from merge.search.opening import open_study
from merge.search.study import Study

TRIALS, RUNS, KILLS, SEED = 8, 4, 20, 7
SILENT = 2.0  # seconds after which a killed run counts as gone here

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was killed counts as gone soon."""
    monkeypatch.setattr("merge.search.ledger.STALE", SILENT)
    monkeypatch.setattr("merge.search.signs.BEAT", SILENT / 8)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_suite(tmp_path_factory.mktemp("suites") / "tiny")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    programs = postgres_server.programs()
    if programs is None or find_spec("psycopg") is None:
        pytest.skip("needs psycopg, and PostgreSQL's programs in TEST_POSTGRES or on PATH")
    with postgres_server.running(programs) as address:
        yield address


@pytest.fixture
def server(address: str) -> str:
    return postgres_server.new_database(address)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("server"))
    return f"sqlite:///{tmp_path}/shared.db"


def run(file: Path, folder: Path, url: str) -> None:
    with open_study(file, folder, url=url) as study:
        study.run().save(folder)


@contextmanager
def looking(file: Path, folder: Path, url: str) -> Iterator[Ledger]:
    with open_study(file, folder, url=url) as study:
        yield study.ledger


def test_four_runs_one_killed_share_a_study(tmp_path: Path, suite: Path, url: str) -> None:
    """The same command four times, as on four machines; one dies in the middle of a candidate."""
    file = written(tmp_path, suite, TRIALS)
    folders = [tmp_path / f"run-{i}" for i in range(RUNS)]
    runs = [
        forked(lambda folder=folder: run(file, folder, url))  # type: ignore[misc]
        for folder in folders[1:]
    ]

    def half(candidate: Candidate, study: Study) -> None:
        LiveModel.write = die  # type: ignore[method-assign]

    def doomed() -> None:
        with open_study(file, folders[0], url=url) as study:
            study.run(half)

    assert is_killed(doomed)
    assert [ended(process) for process in runs] == [0, 0, 0]
    with looking(file, tmp_path / "look", url) as ledger:
        candidates = ledger.all()
        looks = [number for split in ("val", "test") for number in ledger.looks(split)]
    check_whole(candidates, TRIALS)
    assert len({candidate.worker for candidate in candidates}) > 1
    outcomes = [json.loads((folder / "outcome.json").read_text()) for folder in folders[1:]]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(looks) == (2 + 3) + (1 + 3), "parents, average, best: each once, by one of them"


def test_twenty_kills_on_a_server_change_nothing(tmp_path: Path, suite: Path, server: str) -> None:
    file = written(tmp_path, suite, TRIALS)
    candidates, outcome = searched(file, tmp_path / "whole")
    drawn = random.Random(SEED)
    for number in range(KILLS):
        moment = drawn.randrange(1, 250)

        def doomed(moment: int = moment) -> None:
            die_at(moment)
            run(file, tmp_path / "study", server)

        assert is_killed(doomed), number
    with open_study(file, tmp_path / "study", url=server) as study:
        end = study.run()
        found = study.ledger.all()
    assert facts(found) == facts(candidates)
    assert end.as_json() == outcome.as_json()


def test_who_has_another_search_does_not_join(tmp_path: Path, suite: Path, url: str) -> None:
    one = written(tmp_path / "one", suite, TRIALS, **_linear(0.9))
    other = written(tmp_path / "other", suite, TRIALS, **_linear(0.8))
    with (
        open_study(one, tmp_path / "a", url=url) as first,
        open_study(other, tmp_path / "b", url=url) as second,
        open_study(one, tmp_path / "c", url=url) as third,
    ):
        assert first.ledger.study == third.ledger.study != second.ledger.study
        assert first.ledger.study.startswith("search-")
        for file in (one, other):
            with (
                pytest.raises(OutputError, match="another run searches there"),
                open_study(file, tmp_path / "a", url=url),
            ):
                pass


def test_a_database_out_of_reach_leaves_no_folder(tmp_path: Path, suite: Path) -> None:
    url = f"sqlite:///{tmp_path}/absent/shared.db"
    file = written(tmp_path, suite, TRIALS, **_linear(0.9))
    with pytest.raises(RequestError), open_study(file, tmp_path / "a", url=url):
        pass
    assert not (tmp_path / "a").exists()


def test_a_folder_with_a_database_of_its_own_takes_no_other_search(
    tmp_path: Path, suite: Path
) -> None:
    file, folder = written(tmp_path, suite, TRIALS, **_linear(0.9)), tmp_path / "a"
    with open_study(file, folder):
        pass
    with (
        pytest.raises(OutputError, match="a: holds a search with a database of its own"),
        open_study(file, folder, url=f"sqlite:///{tmp_path}/shared.db"),
    ):
        pass
    assert not (tmp_path / "shared.db").exists()
    with open_study(file, folder, url=f"sqlite:///{folder}/study.db"):
        pass


def _linear(high: float) -> dict[str, Any]:
    models = [
        {"model": m, "parameters": {"weight": {"search": [0.1, high]}}}
        for m in ("zoo:reverser", "zoo:sorter")
    ]
    return {"merge_method": "linear", "models": models}


def test_the_command_joins_in_and_tells_no_password(
    tmp_path: Path, suite: Path, server: str, command: Callable[..., Ran]
) -> None:
    file = written(tmp_path, suite, 3, **_linear(0.7))
    other = forked(lambda: run(file, tmp_path / "other", server))
    ran = command("evolve", file, "-o", "mine", "--study", server)
    assert ended(other) == 0
    assert ran.code == 0
    mine, others = (json.loads(Path(n, "outcome.json").read_text()) for n in ("mine", "other"))
    assert mine == others
    wrong = command("evolve", file, "-o", "mine", "--study", server.replace("/empty", "/no"))
    assert wrong.code == 2
    assert "does not exist" in wrong.error
    told = "".join(path.read_text() for path in Path("mine").rglob("*") if path.is_file())
    for text in (ran.out, ran.err, wrong.err, told):
        assert postgres_server.PASSWORD not in text
