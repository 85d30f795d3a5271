"""Workers on a Ray cluster of several nodes: a node that dies takes nothing with it."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ran import Ran
from tiny_search import check_whole, written
from tiny_suite import tiny_suite

from merge.search.cluster import on_ray
from merge.search.ledger import Candidate
from merge.search.opening import open_study
from merge.search.study import Study, Told

ROOT = Path(__file__).parents[2]
TRIALS = 8

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs mergetool[ray]")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of two processors each, as Ray runs them on one machine."""
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{before}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@needs_ray
def test_four_workers_on_two_nodes_one_node_dies(tmp_path: Path, cluster: Any) -> None:
    file = written(tmp_path, tiny_suite(tmp_path / "suite"), TRIALS)
    killed: list[Candidate] = []

    def kill_a_node(candidate: Candidate, study: Study) -> None:
        if not killed:
            killed.append(candidate)
            (second,) = cluster.worker_nodes
            cluster.remove_node(second, allow_graceful=False)

    def place(study: Study, tell: Told) -> None:
        on_ray(cluster.address, 4)(study, kill_a_node)

    with open_study(file, tmp_path / "study") as study:
        outcome = study.run(placing=place)
        candidates = study.ledger.all()
    assert study.notes
    assert " of 4 workers (" in study.notes[0]
    check_whole(candidates, TRIALS)
    assert len({candidate.worker for candidate in candidates}) > 1
    assert outcome.winner in candidates


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_a_cluster_that_is_not_there_is_one_line(
    tmp_path: Path, command: Callable[..., Ran], address: str
) -> None:
    written(tmp_path, tiny_suite(tmp_path / "suite"), 1)
    told = command("evolve", "search.yaml", "--ray", address)
    assert told.code == 2
    assert f"--ray {address}: no cluster could be reached" in told.error


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is there")
def test_without_ray_the_command_says_what_to_install(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    written(tmp_path, tiny_suite(tmp_path / "suite"), 1)
    assert "install mergetool[ray]" in command("evolve", "search.yaml", "--ray").error
