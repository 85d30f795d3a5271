"""An optimiser that is told the same again asks the same again."""

import random
from dataclasses import replace

import pytest

from merge.errors import RunError
from merge.lines import load_documents
from merge.search.asking import Asker, sampler_for
from merge.search.ledger import DONE, FAILED, Candidate
from merge.search.sections import StudySection
from merge.search.space import Space, ends
from merge.search.tried import digest_of

NUMBERS = "a: {search: [0.0, 1.0]}\nb: {search: [0.1, 2.0], log: true}\nc: {search: [-1.0, 1.0]}"
MIXED = "a: {search: [0.0, 1.0]}\nb: {choice: [x, y, {search: [1, 4], int: true}]}"
CHOICES = "a: {choice: [x, y]}\nb: {choice: [1, 2, 3]}"
SAMPLERS = ["cma-es", "tpe", "nsga-ii", "random", "grid"]
TWO = ["first", "second"]  # objectives that cannot both be had


def space_of(text: str) -> Space:
    ((data, lines),) = load_documents(text, "space.yaml")
    return Space(data, lines)


def asked(space: Space, section: StudySection, count: int) -> list[Candidate]:
    """Candidates as a search of `count` leaves them; every fourth failed."""
    asker, found = Asker(space, section), []
    for number in range(count):
        answer = asker.ask(number)
        if answer is None:
            break
        recipe, values = answer
        first, second = (-((values["a"] - ideal) ** 2) for ideal in (0.3, 0.8))
        scores = {"mean": first, "tasks": {"first": first, "second": second}}
        candidate = Candidate(
            number, digest_of(recipe), "search", recipe, values, asker.told, DONE, number, scores
        )
        if number % 4 == 3:
            candidate = replace(candidate, state=FAILED, scores=None, reason="why")
        asker.tell(candidate)
        found.append(candidate)
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("text", [NUMBERS, MIXED])
def test_who_repeats_what_was_asks_what_comes_next(sampler: str, text: str) -> None:
    space, section = space_of(text), StudySection(sampler=sampler, seed=3)
    whole = asked(space, section, 12)
    assert len({candidate.digest for candidate in whole}) == len(whole) == 12
    for cut in range(12):
        asker = Asker(space, section)
        asker.repeat(whole[:cut])
        found = asker.ask(cut)
        assert found is not None
        assert found[0] == whole[cut].recipe


@pytest.mark.parametrize("sampler", ["nsga-ii", "tpe", "random"])
def test_so_does_who_looks_for_the_best_in_several_objectives(sampler: str) -> None:
    space = space_of(NUMBERS)
    section = StudySection(sampler=sampler, seed=3, objectives=TWO, population=4)
    whole = asked(space, section, 18)
    assert len(whole) == 18
    for cut in range(0, 18, 3):
        asker = Asker(space, section)
        asker.repeat(whole[:cut])
        found = asker.ask(cut)
        assert found is not None
        assert found[0] == whole[cut].recipe


def test_several_objectives_are_followed_by_generations() -> None:
    """Of what cannot all be had, the later generations lie between the two ideals more than the first."""
    section = StudySection(sampler="nsga-ii", seed=1, objectives=TWO, population=8)
    found = [c.asked["a"] for c in asked(space_of(NUMBERS), section, 64)]
    between = [0.3 <= a <= 0.8 for a in found]
    assert sum(between[-24:]) > sum(between[:24])


def test_what_was_asked_but_not_answered_is_open_still() -> None:
    space, section = space_of(NUMBERS), StudySection(sampler="cma-es")
    whole = asked(space, section, 9)
    open_still = replace(whole[7], state="waiting", ended=None, scores=None, reason="")
    asker = Asker(space, section)
    asker.repeat([*whole[:7], open_still])
    asker.tell(whole[7])
    found = asker.ask(8)
    assert found is not None
    assert found[0] == whole[8].recipe


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_several_who_ask_in_turn_leave_what_one_can_repeat(sampler: str) -> None:
    """Each asks when all others have ended something that it has not heard of yet."""
    space, section = space_of(MIXED), StudySection(sampler=sampler, seed=3)
    drawn = random.Random(5)
    askers = [Asker(space, section) for _ in range(3)]
    found: list[Candidate] = []
    for number in range(16):
        running = [c for c in found if c.ended is None]
        for candidate in drawn.sample(running, drawn.randint(0, len(running))):
            ended = sum(c.ended is not None for c in found)
            scores = {"mean": candidate.asked["a"]}
            found[candidate.number] = replace(candidate, state=DONE, ended=ended, scores=scores)
        drawn.choice(askers).repeat(found, to_the_end=False)
        asker = drawn.choice(askers)
        asker.repeat(found)
        answer = asker.ask(number)
        assert answer is not None
        recipe, values = answer
        found.append(
            Candidate(number, digest_of(recipe), "search", recipe, values, after=asker.told)
        )
    assert len({candidate.digest for candidate in found}) == 16
    for asker in (*askers, Asker(space, section)):
        asker.repeat(found)
    questions = [asker.ask(16) for asker in askers]
    assert questions[0] == questions[1] == questions[2]


def test_other_questions_than_then_are_an_error() -> None:
    space = space_of(NUMBERS)
    whole = asked(space, StudySection(sampler="random", seed=3), 3)
    other = Asker(space, StudySection(sampler="random", seed=4), "optuna 1")
    with pytest.raises(RunError, match=r"candidate 0 would be another one .*: optuna 1"):
        other.repeat(whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_candidate_is_asked_for_twice_and_a_small_space_ends(sampler: str) -> None:
    space, section = space_of(CHOICES), StudySection(sampler=sampler)
    assert len(asked(space, section, 50)) == 6


def test_a_grid_has_every_combination_in_order() -> None:
    section = StudySection(sampler="grid")
    found = [c.recipe for c in asked(space_of(CHOICES), section, 50)]
    assert found == [{"a": a, "b": b} for a in "xy" for b in (1, 2, 3)]
    steps = asked(space_of("a: {search: [0.0, 1.0]}\nb: {choice: [x]}"), section, 50)
    assert [c.recipe["a"] for c in steps] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_values_to_begin_with_come_first() -> None:
    start = [{"a": 0.5, "b": 1.0, "c": 0.0}, {"a": 0.25, "b": 0.5, "c": 1.0}]
    section = StudySection(sampler="cma-es", start=start)
    assert [c.recipe for c in asked(space_of(NUMBERS), section, 3)][:2] == start


def test_a_random_search_draws_by_probabilities_and_begins_with_what_it_is_told() -> None:
    text = "a: {choice: [x, y, z], probabilities: [1, 2, 5]}\nb: {search: [0.0, 1.0]}"
    space = space_of(text)
    start = [{"a": number, "b": 0.5} for number in (2, 0, 1)]
    asker = Asker(space, StudySection(sampler="random", start=start))
    answers = [asker.ask(number) for number in range(403)]
    drawn = [answer[0]["a"] for answer in answers if answer]
    assert drawn[:3] == ["z", "x", "y"]
    shares = [drawn[3:].count(name) / 400 for name in "xyz"]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.07)


def test_the_optimiser_suits_what_varies() -> None:
    assert sampler_for(space_of(NUMBERS)) == "cma-es"
    assert sampler_for(space_of(MIXED)) == "tpe"
    assert sampler_for(space_of("a: {search: [0, 1]}")) == "tpe"
    assert sampler_for(space_of(NUMBERS), 2) == "nsga-ii"


@pytest.mark.parametrize("text", [NUMBERS, MIXED])
def test_a_grid_that_begins_with_values_still_has_every_combination(text: str) -> None:
    space = space_of(text)
    every = {c.digest for c in asked(space, StudySection(sampler="grid"), 10_000)}
    first = {d.name: float(ends(d)[1]) for d in space.dimensions()}
    found = asked(space, StudySection(sampler="grid", start=[first]), 10_000)
    assert {c.digest for c in found} >= every


def test_no_point_of_a_grid_is_above_the_highest() -> None:
    space = space_of("a: {search: [-0.1, 0.2]}")
    assert max(c.asked["a"] for c in asked(space, StudySection(sampler="grid"), 9)) == 0.2
