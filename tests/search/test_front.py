"""Several objectives: what a candidate reaches, and which candidates no other one beats."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from merge.search.front import non_dominated, objectives_of, unknown_tasks, values_of
from merge.search.sections import StudySection

VALUES = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 4), min_size=width, max_size=width), min_size=1, max_size=12
    )
)


def beats(one: list[int], other: list[int]) -> bool:
    """By the definition: nowhere worse, somewhere better."""
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


@given(VALUES)
def test_a_candidate_is_in_the_front_where_no_other_beats_it(values: list[list[int]]) -> None:
    expected = [not any(beats(other, one) for other in values) for one in values]
    assert non_dominated(np.array(values, np.float64)).tolist() == expected
    assert any(expected)


@given(VALUES, st.integers(1, 5))
def test_the_front_is_the_same_in_other_units(values: list[list[int]], factor: int) -> None:
    plain = non_dominated(np.array(values, np.float64))
    assert (non_dominated(factor * np.array(values, np.float64) + 3) == plain).all()
    both = non_dominated(np.array([*values, *values], np.float64))
    assert both.tolist() == [*plain, *plain], "equal ones are all in it"


def test_an_objective_is_the_mean_of_its_tasks_by_their_weights() -> None:
    words = {"name": "words", "tasks": ["a", "b"]}
    weighted = {"name": "w", "tasks": {"a": 3, "c": 1}}
    section = StudySection.model_validate({"objectives": ["c", words, weighted]})
    scores = {"mean": 0.5, "tasks": {"a": 0.2, "b": 0.4, "c": 0.9}}
    assert objectives_of(section) == {"c": ["c"], "words": ["a", "b"], "w": ["a", "c"]}
    assert values_of(section, scores) == pytest.approx((0.9, 0.3, (3 * 0.2 + 0.9) / 4))
    assert unknown_tasks(section, ["a", "c"]) == [(1, "b")]


def test_without_objectives_it_is_the_mean_over_all_tasks() -> None:
    assert objectives_of(StudySection()) == {}
    assert values_of(StudySection(), {"mean": 0.5, "tasks": {"a": 0.1}}) == (0.5,)


@pytest.mark.parametrize(
    "objectives",
    [
        ["a", "a"],
        [{"name": "a", "tasks": []}],
        [{"name": "a", "tasks": ["b", "b"]}],
        [{"name": "a", "tasks": {"b": 0}}],
        [{"name": "a", "tasks": {"b": math.inf}}],
        [{"tasks": ["b"]}],
    ],
)
def test_what_cannot_be_meant_is_refused(objectives: list[object]) -> None:
    with pytest.raises(ValidationError):
        StudySection.model_validate({"objectives": objectives})
