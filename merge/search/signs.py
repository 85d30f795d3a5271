"""Signs of life: who is at work on a study says so, and is known by its name."""

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from secrets import token_hex

from merge.errors import RunError
from merge.search.ledger import Ledger

BEAT = 10.0  # seconds between two signs of life; a worker counts as gone after ledger.STALE
PAUSE = 0.2  # seconds between two looks at what others are at
SOON = 0.02  # seconds until who waits to ask looks again whether it may


def own_name() -> str:
    """A name that no other worker has, and that says which process of which machine it is or belongs to."""
    return f"{socket.gethostname()[:40]} {_machine()} {os.getpid()} {token_hex(4)}"


def is_gone(worker: str) -> bool:
    """Whether a worker's process was one of this machine and has ended; of others nothing is known."""
    *_, machine, process, _ = worker.split(" ")
    return machine == _machine() and not Path("/proc", process).exists()


@cache
def _machine() -> str:
    """The same for processes that know each other by their numbers."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text()
        numbered = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux: nobody is known
        return token_hex(4)
    return hashlib.sha256(f"{booted}{numbered}".encode()).hexdigest()[:8]


@contextmanager
def beating(ledger: Ledger, worker: str) -> Iterator[None]:
    """Says every BEAT seconds that the worker is alive."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            try:
                ledger.beat(worker)
            except RunError:  # the next change of the ledger tells it
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
