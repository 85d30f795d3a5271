"""What a search remembers, and who may take what."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from forks import die_at, is_killed

from merge.errors import RequestError
from merge.search.ledger import DONE, FAILED, LOST, RUNNING, WAITING, Candidate, Ledger, told


def ledger_in(folder: Path, digest: str = "d") -> Ledger:
    return Ledger.open(f"sqlite:///{folder}/study.db", "study", digest, {"study": {}})


def entered(ledger: Ledger, count: int) -> None:
    for number in range(count):
        ledger.add(
            Candidate(number, f"digest {number}", "search", {"n": number}, {"x": 0.5 * number})
        )


def test_what_is_entered_is_what_is_read(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    entered(ledger, 3)
    again = Ledger.existing(f"sqlite:///{tmp_path}/study.db", "study")
    assert [c.recipe for c in again.all()] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert again.all()[2].asked == {"x": 1.0}
    assert {c.state for c in again.all()} == {WAITING}


def test_every_candidate_is_taken_once(tmp_path: Path) -> None:
    entered(ledger_in(tmp_path), 40)

    def work(name: str) -> list[int]:
        own, found = ledger_in(tmp_path), []
        while candidate := own.take(name):
            found.append(candidate.number)
            assert own.end(candidate.number, name, DONE, scores={"mean": 1.0})
        return found

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(work, ["a", "b", "c", "d"]))
    assert sorted(number for found in taken for number in found) == list(range(40))
    ended = told(ledger_in(tmp_path).all())
    assert [c.ended for c in ended] == list(range(40))


def test_a_worker_that_is_gone_gives_back_what_it_had(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    entered(ledger, 1)
    assert ledger.take("gone")
    assert ledger.take("other") is None
    ledger.release("gone")
    assert ledger.take("other")
    assert not ledger.end(0, "gone", DONE, scores={"mean": 1.0}), "it is another's by now"
    assert ledger.end(0, "other", FAILED, reason="why")
    assert ledger.all()[0].reason == "why"


def test_a_worker_without_a_sign_of_life_loses_its_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_in(tmp_path)
    entered(ledger, 1)
    assert ledger.take("slow")
    monkeypatch.setattr("merge.search.ledger.STALE", -1.0)
    assert ledger.take("other")
    assert ledger.all()[0].state == RUNNING
    assert not ledger.end(0, "slow", DONE, scores={"mean": 1.0})


def test_another_search_of_the_same_name_is_refused(tmp_path: Path) -> None:
    ledger_in(tmp_path)
    with pytest.raises(RequestError, match="is another search"):
        ledger_in(tmp_path, digest="other")
    with pytest.raises(RequestError, match="has no study 'none'; there is study"):
        Ledger.existing(f"sqlite:///{tmp_path}/study.db", "none")


def test_a_candidate_that_kills_its_workers_fails(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    entered(ledger, 2)
    for number in range(LOST):
        found = ledger.take(f"worker {number}")
        assert found is not None
        assert found.number == 0
        ledger.release(f"worker {number}", died=True)
    first, second = ledger.all()
    assert (first.state, first.reason) == (FAILED, f"{LOST} workers died while they tried it")
    assert (first.ended, second.state) == (0, WAITING)


@pytest.mark.parametrize("died", [LOST - 2, LOST - 1])
def test_who_lets_go_of_a_candidate_and_is_killed_leaves_nothing_half_done(
    tmp_path: Path, died: int
) -> None:
    """Cut off at any moment, it is its worker's still, or has failed where it has cost too many."""
    seen = set()
    for moment in range(1, 40):
        folder = tmp_path / str(moment)
        folder.mkdir()
        ledger = ledger_in(folder)
        entered(ledger, 1)
        for number in range(died):
            ledger.take(f"worker {number}")
            ledger.release(f"worker {number}", died=True)
        ledger.take("last")

        def doomed(moment: int = moment, folder: Path = folder) -> None:
            own = ledger_in(folder)
            die_at(moment)
            own.release("last", died=True)

        killed = is_killed(doomed)
        (candidate,) = ledger.all()
        seen.add(candidate.state)
        if not killed:
            break
    assert not killed
    assert seen == {RUNNING, FAILED if died == LOST - 1 else WAITING}


def test_what_is_cut_off_is_no_fault_of_the_candidate(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    entered(ledger, 1)
    for name in [None, "worker"] * LOST:
        assert ledger.take("worker")
        assert ledger.workers() == {"worker"}
        ledger.release(name)
    assert ledger.workers() == set()
    assert ledger.all()[0].state == WAITING


def test_each_split_is_looked_at_once_for_a_candidate(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    assert ledger.begin_look(3, "val", "a")
    assert not ledger.begin_look(3, "val", "b")
    assert ledger.begin_look(3, "test", "b")
    assert ledger.looks("val") == {}
    ledger.end_look(3, "val", "a", {"mean": 0.5, "answers": {"task": ["long"]}})
    assert ledger.looks("val") == {3: {"mean": 0.5}}
    ledger.release("b")
    assert ledger.begin_look(3, "test", "c"), "b was lost before it had looked"
    assert not ledger.begin_look(3, "val", "c")


def test_one_is_alone_at_a_time(tmp_path: Path) -> None:
    ledger_in(tmp_path)
    inside: list[int] = []

    def enter(_: int) -> None:
        with ledger_in(tmp_path).alone() as ledger:
            inside.append(1)
            number = len(ledger.all())
            ledger.add(Candidate(number, f"digest {number}", "search", {}, {}))
            assert inside == [1]
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(24)))
    assert [c.number for c in ledger_in(tmp_path).all()] == list(range(24))


def test_one_asks_for_a_candidate_at_a_time_and_the_database_is_free_meanwhile(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path)
    entered(ledger, 1)
    assert not ledger.begin_asking(0, "a"), "it is there"
    assert ledger.begin_asking(1, "a")
    assert not ledger.begin_asking(1, "b")
    assert ledger.workers() == {"a"}
    taken = ledger.take("b")
    assert taken is not None
    assert ledger.end(0, "b", DONE, scores={"mean": 1.0})
    found = Candidate(1, "digest 1", "search", {"n": 1}, {})
    assert not ledger.end_asking(1, "b", found), "it is not b's turn"
    assert ledger.end_asking(1, "a", found)
    assert not ledger.begin_asking(1, "b")
    assert ledger.begin_asking(2, "b")
    assert ledger.end_asking(2, "b"), "who found nothing"
    assert ledger.begin_asking(2, "c")
    assert [(c.worker, c.state) for c in ledger.all()] == [("b", DONE), ("a", RUNNING)]


def test_who_asks_and_is_silent_loses_the_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_in(tmp_path)
    assert ledger.begin_asking(0, "slow")
    monkeypatch.setattr("merge.search.ledger.STALE", -1.0)
    assert ledger.begin_asking(0, "other")
    assert not ledger.end_asking(0, "slow", Candidate(0, "slow", "search", {}, {}))
    assert ledger.end_asking(0, "other", Candidate(0, "other", "search", {}, {}))
    assert [c.digest for c in ledger.all()] == ["other"]
    assert ledger.begin_asking(1, "gone")
    ledger.release("gone", died=True)
    assert ledger.workers() == {"other"}


def test_who_has_read_and_who_closes_leave_nothing_open(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    with closing(ledger_in(tmp_path)) as ledger:
        entered(ledger, 1)
        assert Ledger.names(url) == ["study"]
    links = [str(file.resolve()) for file in Path("/proc/self/fd").iterdir()]
    assert not [link for link in links if link.startswith(str(tmp_path))]
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]
    assert len(ledger.all()) == 1, "it opens again"


def test_what_is_only_read_is_left_as_it_is(tmp_path: Path) -> None:
    absent = tmp_path / "typo.db"
    for ask in (Ledger.names, lambda url: Ledger.existing(url, "study")):
        with pytest.raises(RequestError, match=r"typo\.db: no such file"):
            ask(f"sqlite:///{absent}")
    assert not absent.exists()
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a)")
    before = other.read_bytes()
    with pytest.raises(RequestError, match="no such table"):
        Ledger.names(f"sqlite:///{other}")
    assert other.read_bytes() == before


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@127.0.0.1:1/db",
        "postgresql+psycopg://me@127.0.0.1:1/db?password=secret",
        "mysql://me:secret@127.0.0.1/db",
        "sqlite://",
        "secret",
    ],
)
def test_a_database_that_cannot_be_used_is_one_line_without_its_password(url: str) -> None:
    with pytest.raises(RequestError) as caught:
        Ledger.open(url, "study", "d", {})
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
