"""The one comparison at the end of a search."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from merge.errors import RequestError
from merge.search.documents import identity, refuse_overlap, split_by_hash
from merge.search.verdict import compared

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


@given(ANSWERS)
def test_mcnemar_is_the_exact_binomial_test_of_what_differs(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = (np.array([pair[i] for pair in pairs], float) for i in (0, 1))
    found = compared("ours", "theirs", {"task": ours}, {"task": theirs})
    better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert found.p == pytest.approx(expected)
    assert found.difference == pytest.approx(float((ours - theirs).mean()))
    assert found.low <= found.difference + 1e-9
    assert found.high >= found.difference - 1e-9


def test_equal_answers_are_no_improvement() -> None:
    values = {"a": np.array([1.0, 0.0, 1.0]), "b": np.array([0.3, 0.2, 0.9, 1.0])}
    found = compared("winner", "parent", values, values)
    assert found.p == 1.0
    assert not found.significant
    assert "no significant improvement" in found.words


def test_a_clear_difference_is_significant_by_both_tests() -> None:
    better, worse = np.ones(40), np.zeros(40)
    exact = compared("w", "p", {"a": better}, {"a": worse})
    drawn = compared("w", "p", {"a": better * 0.9}, {"a": worse})
    assert exact.significant
    assert drawn.significant
    assert {exact.test, drawn.test} == {"McNemar's exact test", "a paired bootstrap"}
    assert not compared("w", "p", {"a": worse}, {"a": better}).significant


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
