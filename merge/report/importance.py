"""How much of the spread of the scores each searched value accounts for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from merge.report.study import Entry, Search
from merge.search.space import Choice, Dimension, Real

LEAST = 8  # candidates, below which shares of the spread say nothing
FEW = 10  # candidates a dimension, below which they say little
# candidates of trees, which take 4 s for 500 and 11 s for 1000 (5000: more than 5 minutes)
MOST = 500


@dataclass(frozen=True)
class Importance:
    """`shares`: of each objective, by dimension; they add up to 1. `how`: by which method. `candidates`: how
    many there are; `taken`: how many the shares are of. `why_not`: why there are none."""

    shares: Mapping[str, Mapping[str, float]]
    how: str
    candidates: int
    taken: int = 0
    why_not: str = ""


def importance_of(search: Search) -> Importance:
    """By Optuna's fANOVA, or PED-ANOVA where scikit-learn is missing, from what was scored on dev."""
    common = _common(search)
    entries = _asked(search)
    if find_spec("optuna") is None:
        return Importance(
            {}, "", len(entries), why_not="it needs optuna; install mergetool[search]"
        )
    if len(entries) < LEAST:
        return Importance(
            {}, "", len(entries), why_not=f"fewer than {LEAST} candidates were scored"
        )
    if len(common) < 2:
        what = "fewer than two values vary in every candidate"
        return Importance({}, "", len(entries), why_not=what)
    named = search.objectives if search.own else ("mean",)
    taken = _spread(entries)
    found = {name: _shares(common, taken, i, search.own) for i, name in enumerate(named)}
    shares = {name: each for name, each in found.items() if each}
    why_not = "" if shares else "all candidates have the same score"
    return Importance(shares, _method()[0], len(entries), len(taken), why_not)


def _spread(entries: Sequence[Entry]) -> list[Entry]:
    """All of few; of many as many as trees can take, from the first asked for to the last."""
    ordered = sorted(entries, key=lambda entry: entry.number)
    count = min(MOST, len(ordered))
    return [ordered[i * len(ordered) // count] for i in range(count)]


def _asked(search: Search) -> list[Entry]:
    """Scored candidates whose values an optimiser asked for; recipes that a study began with are none."""
    return [entry for entry in search.searched if entry.asked]


def _common(search: Search) -> list[Dimension]:
    """What every candidate was asked for."""
    asked = [set(entry.asked) for entry in _asked(search)]
    known = set.intersection(*asked) if asked else set()
    return [dimension for dimension in search.dimensions if dimension.name in known]


def _method() -> tuple[str, Any]:
    import optuna

    if find_spec("sklearn") is None:
        return "PED-ANOVA", optuna.importance.PedAnovaImportanceEvaluator()
    return "fANOVA", optuna.importance.FanovaImportanceEvaluator(seed=0)


def _shares(
    dimensions: Sequence[Dimension], entries: Sequence[Entry], objective: int, own: bool
) -> dict[str, float]:
    """Shares of one objective, the largest first; none where all candidates have the same."""
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {dimension.name: _distribution(dimension) for dimension in dimensions}
    study = optuna.create_study(direction="maximize")
    for entry in entries:
        value = entry.objectives[objective] if own else entry.splits["dev"].mean
        params = {name: _kept(entry.asked[name], d) for name, d in distributions.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=value)
        )
    if len({trial.value for trial in study.trials}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is experimental
        found = optuna.importance.get_param_importances(study, evaluator=_method()[1])
    total = math.fsum(found.values())
    return {name: share / total for name, share in found.items()} if total > 0 else {}


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    if isinstance(dimension, Choice):
        return distributions.CategoricalDistribution(tuple(range(dimension.count)))
    kind = (
        distributions.FloatDistribution
        if isinstance(dimension, Real)
        else distributions.IntDistribution
    )
    return kind(dimension.low, dimension.high, log=dimension.log)


def _kept(value: float, distribution: Any) -> float:
    whole = type(distribution).__name__ != "FloatDistribution"
    return int(value) if whole else float(value)
