"""Optuna's samplers, asked for candidates in an order that can be repeated."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge.errors import RunError
from merge.search.front import values_of
from merge.search.ledger import DONE, PRUNED, Candidate, told
from merge.search.sections import StudySection
from merge.search.space import Choice, Dimension, Real, Space
from merge.search.starts import start_values
from merge.search.tried import digest_of

AGAIN = 200  # times that a sampler may propose what is known before the space counts as used up
STEPS = 5  # values of a number in a grid


class Asker:
    """Proposes candidates; what came of them is told in the order in which they ended.

    Two askers of one seed that are asked and told the same propose the same: that is how a search goes on.
    begun_with: versions of the libraries that asked first. `used_up`: whether nothing new is left.
    """

    def __init__(self, space: Space, section: StudySection, begun_with: str = "") -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._section, self._begun_with = space, section, begun_with
        self._failed = optuna.trial.TrialState.FAIL
        directions = ["maximize"] * max(1, len(section.objectives))
        self._study = optuna.create_study(directions=directions, sampler=_sampler(space, section))
        self._drawn = _by_shares(space) if section.sampler == "random" else {}
        starts = start_values(section)
        for values in starts:
            self._study.enqueue_trial(self._placed(values))
        self._queued = len(starts)  # that the optimiser takes before a point of a grid
        self._grid = _grid(space) if section.sampler == "grid" else None
        self._open: dict[int, Any] = {}
        self._known: dict[str, tuple[float, ...] | None] = {}
        self.told = self._repeated = 0
        self.used_up = False

    def repeat(self, candidates: Sequence[Candidate], *, to_the_end: bool = True) -> None:
        """Is asked and told what was before and it has not heard of yet; RunError where it would have asked
        something else.

        to_the_end: also what came to an end after the last question; who asks next must have heard it, and
        others only once they know that nobody will ask before them.
        """
        ended = told(candidates)
        for candidate in candidates[self._repeated :]:
            for earlier in ended[self.told : candidate.after]:
                self.tell(earlier)
            self._repeated = candidate.number + 1
            if candidate.origin != "search":
                self._known.setdefault(candidate.digest, None)
                continue
            found = self.ask(candidate.number)
            if found is None or digest_of(found[0]) != candidate.digest:
                then = f": {self._begun_with}" if self._begun_with else ""
                raise RunError(
                    f"candidate {candidate.number} would be another one today; begin a new study, or go on "
                    f"with the versions that it was begun with{then}"
                )
        for earlier in ended[self.told :] if to_the_end else ():
            self.tell(earlier)

    def ask(self, number: int) -> tuple[dict[str, Any], dict[str, float]] | None:
        """The recipe of candidate `number` and the answers that made it; None where nothing new is left."""
        for _ in self._attempts():
            trial = self._study.ask()
            asked: dict[str, float] = {}

            def answer(dimension: Dimension, trial: Any = trial, asked: Any = asked) -> float:
                asked[dimension.name] = self._suggested(trial, dimension)
                return float(asked[dimension.name])

            recipe = self._space.filled(answer)
            digest = digest_of(recipe)
            if digest not in self._known:
                self._known[digest], self._open[number] = None, trial
                self._repeated = number + 1
                return recipe, asked
            self._tell(trial, self._known[digest])
        self.used_up = True
        return None

    def tell(self, candidate: Candidate) -> None:
        """What came of a candidate; those that failed are told as failed."""
        self.told += 1
        values = reached(candidate, self._section)
        self._known[candidate.digest] = values
        trial = self._open.pop(candidate.number, None)
        if trial is not None:
            self._tell(trial, values)

    def _attempts(self) -> Iterator[None]:
        """As many as there may be; each readies the next point of a grid."""
        if self._grid is None:
            yield from itertools.repeat(None, AGAIN)
            return
        while self._queued:
            self._queued -= 1
            yield
        for values in self._grid:
            self._study.enqueue_trial(values)
            yield

    def _tell(self, trial: Any, values: tuple[float, ...] | None) -> None:
        if values is None:
            self._study.tell(trial, state=self._failed)
        else:
            self._study.tell(trial, list(values))

    def _suggested(self, trial: Any, dimension: Dimension) -> float:
        name = dimension.name
        if isinstance(dimension, Choice):
            if name in self._drawn:
                return dimension.at(trial.suggest_float(name, 0.0, 1.0))
            return int(trial.suggest_categorical(name, list(range(dimension.count))))
        if isinstance(dimension, Real):
            low, high = dimension.low, dimension.high
            return float(trial.suggest_float(name, low, high, log=dimension.log))
        return int(trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log))

    def _placed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values to begin with as they are suggested."""
        whole = {name: int(v) if float(v).is_integer() else v for name, v in values.items()}
        middles = {
            name: choice.middle(int(whole[name]))
            for name, choice in self._drawn.items()
            if name in whole
        }
        return whole | middles


def reached(candidate: Candidate, section: StudySection) -> tuple[float, ...] | None:
    """What is maximised, of a candidate that was scored, also of one that was given up; None of one that
    failed."""
    if candidate.state not in (DONE, PRUNED) or candidate.scores is None:
        return None
    return values_of(section, candidate.scores)


def sampler_for(space: Space, objectives: int = 0) -> str:
    """NSGA-II for several objectives; CMA-ES where numbers vary and nothing else, which it knows nothing of;
    else TPE."""
    if objectives > 1:
        return "nsga-ii"
    dimensions = space.dimensions()
    only_numbers = all(isinstance(dimension, Real) for dimension in dimensions)
    return "cma-es" if only_numbers and len(dimensions) > 1 else "tpe"


def _by_shares(space: Space) -> dict[str, Choice]:
    """Choices that are drawn by their shares, by name."""
    choices = (d for d in space.dimensions() if isinstance(d, Choice) and d.shares)
    return {choice.name: choice for choice in choices}


def _sampler(space: Space, section: StudySection) -> Any:
    import warnings

    import optuna

    samplers, seed = optuna.samplers, section.seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = section.sampler or sampler_for(space, len(section.objectives))
        if sampler == "cma-es":
            return samplers.CmaEsSampler(seed=seed)
        if sampler == "tpe":
            return samplers.TPESampler(seed=seed, multivariate=True)
        if sampler == "nsga-ii":
            return samplers.NSGAIISampler(seed=seed, population_size=section.population)
        return samplers.RandomSampler(seed=seed)


def _grid(space: Space) -> Iterator[dict[str, float]]:
    """Every combination of choices, whole numbers and STEPS values of each number, the last ones first."""
    dimensions = space.dimensions()
    for values in itertools.product(*map(_points, dimensions)):
        yield {d.name: value for d, value in zip(dimensions, values, strict=True)}


def _points(dimension: Dimension) -> Sequence[float]:
    if isinstance(dimension, Choice):
        return range(dimension.count)
    low, high, parts = dimension.low, dimension.high, STEPS - 1
    if not isinstance(dimension, Real):
        return range(int(low), int(high) + 1)
    if dimension.log:
        return [min(low * (high / low) ** (i / parts), high) for i in range(STEPS)]
    return [min(low + (high - low) * i / parts, high) for i in range(STEPS)]
