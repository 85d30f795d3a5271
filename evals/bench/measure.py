"""One command, run to its end: wall and processor time, peak memory of its process tree."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02  # seconds between two looks at the process tree
PAGE = os.sysconf("SC_PAGE_SIZE")


class BenchError(Exception):
    """A command failed, or the machine cannot hold the benchmark."""


@dataclass(frozen=True)
class Usage:
    """`wall` and `cpu` (user and system of all processes) in seconds, `peak` resident bytes.

    peak: the larger of the sampled sum over all processes of the tree and of what the system tells
    of its largest process; mapped pages of files count, as they do for `top`.
    """

    wall: float
    cpu: float
    peak: int


def run_measured(command: Sequence[str], env: Mapping[str, str], log: Path) -> Usage:
    """Runs `command` with its output in `log`; raises BenchError with the end of it."""
    with log.open("wb") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        sampler = _Sampler(process.pid)
        try:
            _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        except BaseException:
            process.kill()
            raise
        finally:
            sampled = sampler.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"{Path(command[0]).name} failed ({process.returncode}): {_end_of(log)}")
    return Usage(wall, used.ru_utime + used.ru_stime, max(sampled, used.ru_maxrss * 1024))


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " / ".join(line.strip() for line in lines[-3:]) or "without a word"


class _Sampler:
    """A thread that keeps the largest sum of resident memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._done = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The largest sum in bytes."""
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._peak = max(self._peak, sum(_resident(pid) for pid in _tree(self._pid)))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):  # ended meanwhile, or a kernel without these files
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0
