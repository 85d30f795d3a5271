"""Several workers of one study: nothing is tried twice, and whoever dies is done without."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ran import Ran
from tiny_search import BASELINES, check_whole, searched, written
from tiny_suite import tiny_suite

from merge.errors import RequestError, RunError
from merge.search.ledger import ENDED, RUNNING, Candidate, Ledger
from merge.search.opening import open_study
from merge.search.study import Study, Told
from merge.search.workers import Process, forked, shared_out, watch

ROOT = Path(__file__).parents[2]
TRIALS = 6


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_suite(tmp_path_factory.mktemp("suites") / "tiny")


def killing(workers_killed: int, workers: int = 4) -> Callable[[Study, Told], None]:
    """Workers of which some are killed while they try a candidate, once another has come to its end."""

    def place(study: Study, tell: Told) -> None:
        with forked(shared_out(study.setup, workers), workers) as processes:

            def kill(candidate: Candidate, study: Study) -> None:
                busy = [p for p in processes if p.name in at_work(study.ledger)]
                for process in busy[: workers_killed - len(killed)]:
                    assert process.pid is not None
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process)

            killed: list[Process] = []
            watch(study, processes, kill)

    return place


def at_work(ledger: Ledger) -> set[str]:
    return {candidate.worker for candidate in ledger.all() if candidate.state == RUNNING}


def test_four_workers_one_killed_finish_what_was_asked_for(tmp_path: Path, suite: Path) -> None:
    file = written(tmp_path, suite, TRIALS)
    with open_study(file, tmp_path / "study") as study:
        outcome = study.run(placing=killing(1))
        candidates = study.ledger.all()
        assert study.notes == ["lost 1 of 4 workers (signal 9); the others went on"]
    check_whole(candidates, TRIALS)
    assert len({candidate.worker for candidate in candidates}) > 1
    assert outcome.winner in candidates
    file.write_text(file.read_text().replace(f"trials: {TRIALS}", f"trials: {TRIALS + 1}"))
    longer, _ = searched(file, tmp_path / "study")
    check_whole(longer, TRIALS + 1)
    assert longer[: len(candidates)] == candidates, "one process goes on from several"


def test_where_all_workers_die_the_error_says_so_and_the_next_run_goes_on(
    tmp_path: Path, suite: Path
) -> None:
    file = written(tmp_path, suite, 3)
    with (
        open_study(file, tmp_path / "study") as study,
        pytest.raises(RunError, match=r"lost 2 of 2 workers \(signal 9\); the same command"),
    ):
        study.run(placing=killing(2, workers=2))
    candidates, _ = searched(file, tmp_path / "study")
    check_whole(candidates, 3)


def test_who_is_interrupted_leaves_no_worker_behind(tmp_path: Path, suite: Path) -> None:
    """Ctrl-C reaches all of them; only the one who placed the others minds."""
    pids: list[int] = []

    def place(study: Study, tell: Told) -> None:
        with forked(shared_out(study.setup, 2), 2) as processes:

            def interrupt(candidate: Candidate, study: Study) -> None:
                if pids:
                    raise KeyboardInterrupt
                pids.extend(process.pid for process in processes if process.pid)
                for pid in pids:
                    os.kill(pid, signal.SIGINT)

            watch(study, processes, interrupt)

    with open_study(written(tmp_path, suite, 3), tmp_path / "study") as study:
        with pytest.raises(KeyboardInterrupt):
            study.run(placing=place)
        assert sum(candidate.state in ENDED for candidate in study.ledger.all()) >= 2
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_end_with_the_command_that_placed_them(tmp_path: Path, suite: Path) -> None:
    file, mark = written(tmp_path, suite, 40), f"STUDY_MARK={tmp_path}"
    command = [sys.executable, "-m", "merge.cli", "evolve", str(file), "-o", "study"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    running = subprocess.Popen(
        [*command, "--workers", "2"],
        cwd=tmp_path,
        env=environment | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_until(lambda: _ended(tmp_path / "study") >= 2, running)
    assert len(_marked(mark)) >= 3
    running.kill()
    running.communicate()
    _wait_until(lambda: not _marked(mark))
    tried = _ended(tmp_path / "study") - BASELINES
    file.write_text(file.read_text().replace("trials: 40", f"trials: {max(1, tried) + 2}"))
    candidates, _ = searched(file, tmp_path / "study")
    check_whole(candidates, len(candidates) - BASELINES)


def _ended(folder: Path) -> int:
    if not (folder / "study.db").exists():
        return 0
    try:
        ledger = Ledger.existing(f"sqlite:///{folder}/study.db", "study")
    except RequestError:  # it is being made
        return 0
    return sum(candidate.state in ENDED for candidate in ledger.all())


def _marked(mark: str) -> list[int]:
    """Processes with that in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def _wait_until(true: Callable[[], bool], running: "subprocess.Popen[str] | None" = None) -> None:
    for _ in range(3000):
        if true():
            return
        assert running is None or running.poll() is None, running.communicate()
        time.sleep(0.1)
    raise AssertionError("it never came to that")


def test_workers_share_the_memory_cap(command: Callable[..., Ran], suite: Path) -> None:
    written(Path(), suite, 2)
    told = command("evolve", "search.yaml", "--workers", 8, "--memory", "512MiB").error
    assert "--memory 64MiB is too small" in told
    assert told.rstrip().endswith("each of 8 workers has its part of --memory 512MiB")
