"""What a search remembers, and who may take what."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from merge.errors import RequestError
from merge.search.ledger import DONE, FAILED, RUNNING, WAITING, Candidate, Ledger, told


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
    assert not ledger.beat(0, "slow")


def test_another_search_of_the_same_name_is_refused(tmp_path: Path) -> None:
    ledger_in(tmp_path)
    with pytest.raises(RequestError, match="is another search"):
        ledger_in(tmp_path, digest="other")
    with pytest.raises(RequestError, match="has no study 'none'; there is study"):
        Ledger.existing(f"sqlite:///{tmp_path}/study.db", "none")
