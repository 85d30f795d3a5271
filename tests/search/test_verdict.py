"""The one comparison at the end of a search."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from merge.errors import RequestError
from merge.search.documents import check_sizes, identity, refuse_overlap, split_by_hash
from merge.search.verdict import as_good, compared, error_of, mean_of, words_on_baselines

NAMED = st.lists(st.tuples(st.text("abc", min_size=1), st.floats(0, 1)), max_size=4)


@given(st.floats(0, 1), NAMED)
def test_every_baseline_as_good_as_the_winner_is_named(
    mean: float, baselines: list[tuple[str, float]]
) -> None:
    found = as_good(mean, baselines)
    assert sorted(found) == sorted(each for each in baselines if each[1] >= mean - 1e-12)
    words = words_on_baselines("candidate 7", mean, baselines)
    assert bool(words) == bool(found)
    told = [f"{name} {100 * each:.1f}" for name, each in sorted(found, key=lambda e: -e[1])]
    assert (
        words.split(f"on test it has {100 * mean:.1f} points; others: ")[1:]
        == [", ".join(told)][: len(found)]
    )


ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


@given(ANSWERS)
def test_mcnemar_is_the_exact_binomial_test_of_what_differs(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = (np.array([pair[i] for pair in pairs], float) for i in (0, 1))
    found = compared("ours", "theirs", {"task": ours}, {"task": theirs}, {"task": 1.0})
    better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert found.p == pytest.approx(expected)
    assert found.difference == pytest.approx(float((ours - theirs).mean()))
    assert found.low <= found.difference + 1e-9
    assert found.high >= found.difference - 1e-9


def drawn_values(sizes: list[int], seed: int) -> dict[str, NDArray[np.float64]]:
    draw = np.random.default_rng(seed)
    return {f"t{i}": draw.integers(0, 2, size).astype(float) for i, size in enumerate(sizes)}


SIZES = st.lists(st.integers(2, 9), min_size=1, max_size=4)


@given(SIZES, st.integers(0, 99), st.data())
def test_what_is_compared_is_the_mean_that_was_chosen_by(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    """Whatever the shares of the tasks, in any unit; a task without one says nothing."""
    ours, theirs = drawn_values(sizes, seed), drawn_values(sizes, seed + 1000)
    counted = data.draw(st.lists(st.sampled_from(sorted(ours)), min_size=1, unique=True))
    shares = {task: data.draw(st.sampled_from([0.25, 1.0, 3.0])) for task in counted}
    found = compared("w", "p", ours, theirs, shares)
    expected = mean_of(ours, shares) - mean_of(theirs, shares)
    assert found.difference == pytest.approx(expected, abs=1e-12)
    assert found.low - 1e-9 <= found.difference <= found.high + 1e-9
    assert found.documents == sum(len(ours[task]) for task in counted)
    again = compared("w", "p", ours, theirs, {task: 4 * share for task, share in shares.items()})
    assert again == found
    each = {share / len(ours[task]) for task, share in shares.items()}
    assert (found.test == "McNemar's exact test") == (max(each) - min(each) < 1e-12)


def test_the_error_of_a_mean_is_that_of_a_weighted_sum() -> None:
    values, shares = drawn_values([40, 60], 3), {"t0": 3.0, "t1": 1.0}
    a, b = (v.var(ddof=1) / len(v) for v in values.values())
    expected = math.sqrt((0.75**2) * a + (0.25**2) * b)
    assert error_of(values, shares) == pytest.approx(expected)


ALIKE = {"a": 1.0, "b": 1.0}


def test_equal_answers_are_no_improvement() -> None:
    values = {"a": np.array([1.0, 0.0, 1.0]), "b": np.array([0.3, 0.2, 0.9, 1.0])}
    found = compared("winner", "parent", values, values, ALIKE)
    assert found.p == 1.0
    assert not found.significant
    assert "no significant improvement" in found.words


def test_a_clear_difference_is_significant_by_both_tests() -> None:
    better, worse = np.ones(40), np.zeros(40)
    exact = compared("w", "p", {"a": better}, {"a": worse}, {"a": 1.0})
    drawn = compared("w", "p", {"a": better * 0.9}, {"a": worse}, {"a": 1.0})
    lost = compared("w", "p", {"a": worse}, {"a": better}, {"a": 1.0})
    assert "no improvement: w is worse than p" in lost.words
    assert not lost.significant
    assert exact.significant
    assert drawn.significant
    assert {exact.test, drawn.test} == {"McNemar's exact test", "a paired bootstrap"}
    assert not compared("w", "p", {"a": worse}, {"a": better}, {"a": 1.0}).significant


@given(st.lists(st.text(), unique=True, min_size=1, max_size=50))
def test_a_document_is_in_one_split_wherever_it_stands(texts: list[str]) -> None:
    documents = [{"text": text} for text in texts]
    one = split_by_hash({"task": documents})
    other = split_by_hash({"task": documents[::-1]})

    def contents(splits: dict, order: list) -> dict[str, set[str]]:
        return {
            name: {identity(order[n]) for n in split.documents.get("task", ())}
            for name, split in splits.items()
        }

    assert contents(one, documents) == contents(other, documents[::-1])
    assert sum(split.count for split in one.values()) == len(texts)


def test_a_document_in_two_splits_is_refused() -> None:
    same = {"task": [{"question": "1+1"}]}
    with pytest.raises(RequestError, match="document 0 of task"):
        refuse_overlap([("search", same), ("test", {"other": [{"question": "1+1"}]})])


def test_a_task_without_documents_for_a_split_is_told_with_those_that_it_has() -> None:
    splits = split_by_hash({"task": [{"question": "1+1"}], "none": []})
    with pytest.raises(RequestError, match=r"task task has too few .*: .*1 for .*; each needs one"):
        check_sizes([*splits.values()])
    with pytest.raises(RequestError, match=r"task none has too few .*: 0 for dev"):
        check_sizes([split_by_hash({"none": []})["dev"]])
