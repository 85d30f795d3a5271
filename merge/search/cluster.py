"""Workers of a study on the machines of a Ray cluster: the same loop, placed elsewhere.

The ledger must be where all of them reach it, and so must the recipe, the models and the suite, under the
same names as here.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from merge.errors import RequestError
from merge.search.signs import own_name
from merge.search.study import Placing, Setup, Study, Told
from merge.search.workers import End, watch, worked

TIMEOUT = 10.0  # seconds for the head of a cluster to answer


def on_ray(address: str, count: int | None) -> Placing:
    """So many workers on the cluster at `address`: auto (the one that this machine belongs to), local, or
    HOST:PORT; by default one for each GPU, or where there are none, for each machine. Raises RequestError."""
    if find_spec("ray") is None:
        raise RequestError("--ray needs Ray; install mergetool[ray]")

    def place(study: Study, tell: Told) -> None:
        with _connected(address) as ray:
            _check_reachable(ray, study.setup)
            with _placed(ray, study.setup, count) as workers:
                watch(study, workers, tell)

    return place


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, which another program may have begun in this process already; raises RequestError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # its coming default, told at length
    import ray

    mine = not ray.is_initialized()
    try:
        if mine:
            _check_there(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"--ray {address}: no cluster could be reached: {reason}") from None
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


def _check_there(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray waits for minutes, then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=TIMEOUT).close()


def _check_reachable(ray: Any, setup: Setup) -> None:
    """Raises RequestError where the ledger is a file and the cluster has several machines."""
    places = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(places) > 1 and setup.url.startswith("sqlite"):
        raise RequestError(
            f"--ray: the cluster has {len(places)} machines, and they cannot share a file of SQLite; give "
            "--study postgresql://USER@HOST/DATABASE"
        )


@contextmanager
def _placed(ray: Any, setup: Setup, count: int | None) -> Iterator[list["_Task"]]:
    """Workers spread over the machines; none outlives this."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    workers = count or gpus or len(nodes)
    share = max(1, cpus // workers)
    setup = replace(setup, threads=setup.threads or share, place=setup.place.absolute())
    run = ray.remote(worked).options(
        num_cpus=min(share, *(int(node.get("CPU", 1)) or 1 for node in nodes)),
        num_gpus=min(1.0, gpus / workers),
        max_retries=0,
        scheduling_strategy="SPREAD",
    )
    tasks = [_Task(ray, run, setup) for _ in range(workers)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.stop()


class _Task:
    """A worker as a task of Ray's."""

    def __init__(self, ray: Any, run: Any, setup: Setup) -> None:
        self.name = own_name()
        self._ray = ray
        self._found = run.remote(setup, self.name)

    def ended(self) -> End | None:
        if not self._ray.wait([self._found], timeout=0)[0]:
            return None
        try:
            end: End = self._ray.get(self._found)
        except self._ray.exceptions.RayError as error:
            return type(error).__name__
        return end

    def stop(self) -> None:
        self._ray.cancel(self._found, force=True)
