"""Who is given up is worse beyond chance, and the rest of a search is as if nobody had been."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon
from tiny_search import searched
from tiny_suite import tiny_suite

from merge.errors import RequestError
from merge.search.ledger import DONE, PRUNED, Candidate
from merge.search.opening import open_study
from merge.search.panel import panels
from merge.search.pruning import (
    BLOCKS,
    EXACT,
    bar_for,
    blocks_of,
    chance_of_less,
    is_hopeless,
)
from merge.search.workers import on_this_machine

SPECIALISTS = ("zoo:reverser", "zoo:sorter", "zoo:chemist", "zoo:scribe")


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_chance_is_that_of_all_signs_counted(differences: list[int]) -> None:
    """By the definition: of all ways to put signs before the ranks, the share with as little above 0."""
    found = np.array([d for d in differences if d], np.float64)
    sizes = np.abs(found)
    ranks = [(sizes < s).sum() + ((sizes == s).sum() + 1) / 2 for s in sizes]
    above = sum(rank for rank, d in zip(ranks, found, strict=True) if d > 0)
    ways = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in product((0, 1), repeat=len(ranks))
    ]
    expected = sum(way <= above for way in ways) / len(ways)
    assert chance_of_less(np.array(differences, np.float64)) == pytest.approx(expected)


@pytest.mark.parametrize("better", [5, 15, 25, 30])
@pytest.mark.parametrize("more", [1, 30])
def test_many_documents_are_judged_by_the_normal_law(better: int, more: int) -> None:
    """As scipy does, with as many of another size; where counting gives way nothing jumps."""
    few = np.array([1.0] * better + [-1.0] * (EXACT - better))
    many = np.concatenate([few, [0.5] * (more // 2), [-0.5] * (more - more // 2)])
    how = {"alternative": "less", "method": "asymptotic", "correction": False}
    assert chance_of_less(many) == pytest.approx(wilcoxon(many, **how).pvalue)
    assert wilcoxon(few, **how).pvalue == pytest.approx(chance_of_less(few), rel=0.5, abs=1e-8)


def test_equal_or_better_ones_are_never_given_up() -> None:
    same, one = {"a": [1.0] * 30, "b": [0.0] * 30}, {"a": 1.0}
    assert not is_hopeless(same, same, {"a": 1.0, "b": 1.0})
    assert not is_hopeless({"a": [1.0] * 30}, {"a": [0.0] * 30}, one)
    assert is_hopeless({"a": [0.0] * 30}, {"a": [1.0] * 30}, one)
    few = {"a": [0.0] * 3}
    assert not is_hopeless(few, {"a": [1.0] * 3}, one), "three documents say little"
    ours, theirs = {"a": [0.0] * 40, "b": [0.4] * 2}, {"a": [0.1] * 40, "b": [0.0] * 2}
    assert is_hopeless(ours, theirs, {"a": 1.0, "b": 0.1})
    assert not is_hopeless(ours, theirs, {"a": 1.0, "b": 1.0}), "its mean is higher"


def test_one_in_a_hundred_equally_good_ones_is_given_up_at_one_look() -> None:
    draw = np.random.default_rng(0)
    looks = [
        chance_of_less(draw.integers(0, 2, 60) - draw.integers(0, 2, 60).astype(np.float64)) < 0.01
        for _ in range(4000)
    ]
    assert 0.004 < sum(looks) / 4000 < 0.016


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_suite(tmp_path_factory.mktemp("suites") / "tiny", searched=60, kept=6)


def test_blocks_are_all_documents_once_with_some_of_every_task(suite: Path) -> None:
    panel = panels(str(suite), None)["dev"]
    blocks = blocks_of(panel)
    assert len(blocks) == BLOCKS
    for task, numbers in panel.split.documents.items():
        parts = [block.split.documents[task] for block in blocks]
        assert all(parts)
        assert sorted(number for part in parts for number in part) == list(numbers)
    requests = [r for block in blocks for task in block.tasks.values() for r in task.instances]
    assert len(requests) == sum(len(task.instances) for task in panel.tasks.values())


def written(folder: Path, suite: Path, trials: int, **study: Any) -> Path:
    weights = {"weight": {"search": [-0.4, 1.2]}}
    data = {
        "base_model": "zoo:base",
        "merge_method": "task_arithmetic",
        "models": [{"model": model, "parameters": weights} for model in SPECIALISTS],
        "study": {"suite": str(suite), "trials": trials, "seed": 2, "top": 2, **study},
    }
    folder.mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return folder / "r.yaml"


def facts(candidates: list[Candidate]) -> list[tuple[Any, ...]]:
    return [(c.number, c.recipe, c.state, c.ended, c.scores) for c in candidates]


def test_hopeless_candidates_are_given_up_and_a_search_that_goes_on_gives_up_the_same(
    tmp_path: Path, suite: Path
) -> None:
    whole, outcome = searched(written(tmp_path / "whole", suite, 10, prune=True))
    pruned = [c for c in whole if c.state == PRUNED]
    assert pruned
    assert {c.origin for c in pruned} == {"search"}
    assert {c.state for c in whole} == {DONE, PRUNED}
    full = sum(map(len, whole[0].scores["values"].values()))  # type: ignore[index]
    for candidate in pruned:
        assert candidate.scores is not None
        asked = sum(map(len, candidate.scores["values"].values()))
        assert outcome.saved[candidate.number] == full - asked > 0
        done = [c for c in whole[: candidate.number] if c.state == DONE and c.scores]
        assert candidate.scores["mean"] < max(c.scores["mean"] for c in done if c.scores)
    assert outcome.winner not in pruned
    searched(written(tmp_path / "cut", suite, 4, prune=True))
    longer, same = searched(written(tmp_path / "cut", suite, 10, prune=True))
    assert facts(longer) == facts(whole)
    once = {"winners_tested": 1}  # the shorter search had a winner of its own
    assert same.as_json() | once == outcome.as_json()


def test_what_was_given_up_is_what_it_would_have_been_until_then(
    tmp_path: Path, suite: Path
) -> None:
    """Its documents have the values that they have when all are asked."""
    with open_study(written(tmp_path, suite, 6, prune=True), tmp_path / "study") as study:
        study.run()
        (candidate, *_) = [c for c in study.ledger.all() if c.state == PRUNED]
        whole, _ = study.scorer.scored(candidate.recipe)
        blocks = blocks_of(study.scorer.panels["dev"])
        assert candidate.scores is not None
        for task, values in candidate.scores["values"].items():
            numbers = study.scorer.panels["dev"].split.documents[task]
            order = [number for block in blocks for number in block.split.documents[task]]
            asked = sorted(order[: len(values)])
            assert values == [whole["values"][task][numbers.index(number)] for number in asked]


def test_several_objectives_and_giving_up_are_refused_together(tmp_path: Path, suite: Path) -> None:
    objectives = ["quickstart_search_sort", "quickstart_search_reverse"]
    file = written(tmp_path, suite, 4, prune=True, objectives=objectives)
    with (
        pytest.raises(RequestError, match="prune and several objectives"),
        open_study(file, tmp_path / "study"),
    ):
        pass


def test_one_objective_and_giving_up_are_refused_together(tmp_path: Path, suite: Path) -> None:
    """All tasks count alike where candidates are given up."""
    file = written(tmp_path, suite, 4, prune=True, objectives=["quickstart_search_sort"])
    with (
        pytest.raises(RequestError, match="prune and objectives are both given"),
        open_study(file, tmp_path / "study"),
    ):
        pass


def test_whoever_tries_a_candidate_measures_it_against_the_same(
    tmp_path: Path, suite: Path
) -> None:
    """Of two workers, neither depends on what the other is at: tried again, each comes to the same end."""
    with open_study(written(tmp_path, suite, 6, prune=True), tmp_path / "study") as study:
        study.run(placing=on_this_machine(2))
        every = study.ledger.all()
        bars = [bar_for(candidate, every, study.section) for candidate in every]
        assert any(bar is not None for bar in bars)
        for candidate, bar in zip(every, bars, strict=True):
            again, _ = study.scorer.scored(candidate.recipe, bar=bar)
            assert again["values"] == candidate.scores["values"]  # type: ignore[index]
