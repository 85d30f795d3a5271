"""Several workers of one study, each a process of this machine with a live model of its own.

They share nothing but the ledger, as workers on other machines do (cluster.py). Whoever placed them watches
them: what one was at that died is let go of at once, and another takes it.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from typing import Protocol

from merge.errors import MergetoolError, PlanError, RunError
from merge.printing import counted
from merge.search.ledger import ENDED
from merge.search.opening import joined
from merge.search.signs import PAUSE, own_name
from merge.search.study import Placing, Setup, Study, Told
from merge.sections import parse_size

LOADED = (  # once, by the process that workers are forked from
    "merge.search.opening",
    "torch",
    "transformers",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
    "optuna",
)

End = (
    str | MergetoolError
)  # of a worker: nothing was left (""), how it was lost, or what all would meet


class Worker(Protocol):
    """One that was placed somewhere. `name`: in the ledger."""

    name: str

    def ended(self) -> End | None:
        """How it came to its end; None while it is at work."""


def on_this_machine(count: int) -> Placing:
    """So many processes of this machine, which share its memory cap and threads."""

    def place(study: Study, tell: Told) -> None:
        share = shared_out(study.setup, count)
        try:
            study.check_share(share)
        except PlanError as error:
            told = f"each of {count} workers has its part of --memory {study.setup.memory}"
            raise PlanError(f"{error}; {told}") from None
        with forked(share, count) as workers:
            watch(study, workers, tell)

    return place


def shared_out(setup: Setup, count: int) -> Setup:
    """What each of `count` workers on one machine opens the study with."""
    memory = parse_size(setup.memory) // count
    threads = max(1, (setup.threads or len(os.sched_getaffinity(0))) // count)
    return replace(setup, memory=f"{memory >> 20}MiB", threads=threads)


def watch(study: Study, workers: Sequence[Worker], tell: Told) -> None:
    """Waits until all workers have come to their end, and tells what they tried.

    Raises what a worker met that all would meet, and RunError where all of them are lost.
    """
    known = {c.number for c in study.ledger.all() if c.state in ENDED}
    at_work, lost = list(workers), list[str]()
    while at_work:
        time.sleep(PAUSE)
        for worker in list(at_work):
            end = worker.ended()
            if isinstance(end, MergetoolError):
                raise end
            if end is not None:
                at_work.remove(worker)
            if end:
                lost.append(end)
                study.ledger.release(worker.name, died=True)
        for candidate in study.ledger.all():
            if candidate.state in ENDED and candidate.number not in known:
                known.add(candidate.number)
                tell(candidate, study)
    if lost:
        how = ", ".join(dict.fromkeys(lost))
        told = f"lost {len(lost)} of {counted(len(workers), 'worker')} ({how})"
        if len(lost) == len(workers):
            raise RunError(f"{study.file}: {told}; the same command goes on from there")
        study.notes.append(f"{told}; the others went on")


def worked(setup: Setup, name: str, number: int = 0) -> End:
    """Is a worker of the study until nothing is left to try. number: among those of this machine."""
    import torch

    try:
        os.chdir(setup.place)
        if setup.threads:
            torch.set_num_threads(setup.threads)
        if torch.cuda.is_available():
            torch.cuda.set_device(number % torch.cuda.device_count())
        joined(setup).work(name)
    except MergetoolError as error:
        return error
    except Exception as error:
        return RunError(f"worker {name}: unexpected {type(error).__name__}: {error}")
    return ""


# -- processes -----------------------------------------------------------------------------------------


@contextmanager
def forked(setup: Setup, count: int) -> Iterator[list["Process"]]:
    """Workers forked from a process that has loaded the libraries and has no threads; none outlives this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    with _safe_path():
        forkserver.ensure_running()
    workers = list[Process]()
    try:
        for number in range(count):
            workers.append(Process(context, setup, number))
        yield workers
    finally:
        for worker in workers:
            worker.stop()


class Process:
    """A worker in a process of its own."""

    def __init__(self, context: ForkServerContext, setup: Setup, number: int) -> None:
        self.name = own_name()
        self._end, end = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(setup, self.name, number, end))
        self._process.start()
        end.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def ended(self) -> End | None:
        if not self._end.poll():
            return None
        try:
            end: End = self._end.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            return f"signal {-code}" if code < 0 else f"exit code {code}"
        return end

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _work(setup: Setup, name: str, number: int, end: "connection.Connection") -> None:
    """The whole life of a worker's process; who waits for it decides when it is interrupted."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which who is killed leaves behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    end.send(worked(setup, name, number))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _safe_path() -> Iterator[None]:
    """What is started meanwhile loads no code of the current folder."""
    name = "PYTHONSAFEPATH"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
