"""Searches of seconds over two tiny specialists, and what must be the same of two that are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from merge.search.ledger import Candidate
from merge.search.opening import open_study
from merge.search.outcome import Outcome
from merge.search.study import Study

SPECIALISTS = ("zoo:reverser", "zoo:sorter")
BASELINES = 3  # two parents and their average


def written(folder: Path, suite: Path, trials: int = 4, **recipe: Any) -> Path:
    """A search over the weights of two task vectors, or over what is given."""
    weights = {"weight": {"search": [0.2, 1.5]}}
    plain = {
        "base_model": "zoo:base",
        "merge_method": "ties",
        "models": [{"model": model, "parameters": weights} for model in SPECIALISTS],
        "parameters": {"density": {"search": [0.1, 0.9]}},
    }
    study = {"suite": str(suite), "trials": trials, "seed": 5, "limit": 4, "top": 2}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump((recipe or plain) | {"study": study}, sort_keys=False))
    return file


def searched(
    file: Path,
    folder: Path | None = None,
    tell: Callable[[Candidate, Study], None] = lambda c, s: None,
) -> tuple[list[Candidate], Outcome]:
    """folder: of the study; by default `study` beside the recipe."""
    with open_study(file, folder or file.parent / "study") as study:
        outcome = study.run(tell)
        return study.ledger.all(), outcome


def facts(candidates: list[Candidate]) -> list[tuple[Any, ...]]:
    """What must be the same whenever a search was cut off; not the seconds."""
    return [(c.number, c.origin, c.recipe, c.asked, c.state, c.ended, c.scores) for c in candidates]


def check_whole(candidates: list[Candidate], trials: int) -> None:
    """As many as were asked for, each scored, none twice."""
    assert [c.number for c in candidates] == list(range(BASELINES + trials))
    assert sorted(c.ended for c in candidates if c.ended is not None) == list(
        range(len(candidates))
    )
    assert {c.state for c in candidates} == {"done"}
    assert len({c.digest for c in candidates}) == len(candidates)
