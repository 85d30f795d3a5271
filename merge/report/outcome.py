"""What outcome.json tells of the end of a search, checked: it may be damaged, or of another search."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from merge.errors import RequestError

if TYPE_CHECKING:
    from merge.search.ledger import Candidate

OUTCOME = "outcome.json"
ANEW = "run the search again, which goes on to the same end"


@dataclass(frozen=True)
class Figures:
    """What a candidate reached on one split. `mean`: over tasks, with its standard error, NaN where it has
    none. `truncated`, `empty`, `alike`: shares of its answers, see search.panel.Marks. `objectives`: what it
    reached in each of the study, none where the split has other tasks."""

    mean: float
    stderr: float
    truncated: float
    empty: float
    alike: float
    objectives: Mapping[str, float]


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True)


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


class Split(_Read):
    """What is told of a candidate on one split."""

    mean: FiniteFloat
    stderr: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, BeforeValidator(_or_none)
    ]
    truncated: FiniteFloat
    empty: FiniteFloat
    alike: FiniteFloat
    objectives: dict[str, FiniteFloat] = {}

    @property
    def figures(self) -> Figures:
        error = math.nan if self.stderr is None else self.stderr
        return Figures(self.mean, error, self.truncated, self.empty, self.alike, self.objectives)


class Told(_Read):
    """One of the best or of their rivals. `kin`: what is told of the ancestors that its models share."""

    number: int
    recipe: dict[str, Any]
    kin: list[str] = []
    dev: Split | None = None
    val: Split | None = None
    test: Split | None = None

    @property
    def later(self) -> dict[str, Figures]:
        """What it reached on what the search did not see."""
        splits = {"val": self.val, "test": self.test}
        return {name: split.figures for name, split in splits.items() if split}


class Verdict(_Read):
    """The paired test of the winner against the best parent, as search.verdict has it."""

    winner: str
    rival: str
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    p: FiniteFloat
    test: str
    documents: int
    words: str


class Outcome(_Read):
    """`used_up`: whether the search ended because nothing new was left to try. `told`: everything as it
    stands in the file."""

    winner: Told
    top: list[Told]
    rivals: list[Told]
    verdict: Verdict | None = None
    winners_tested: int = 1
    used_up: bool = False
    told: dict[str, Any]

    @property
    def every(self) -> list[Told]:
        """All that it tells of, the winner first."""
        return [self.winner, *self.top, *self.rivals]


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome that lies in a folder; None where there is none. Raises RequestError."""
    file = folder / OUTCOME
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # as the report will repeat it
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{file}: not readable as JSON ({error})") from None
    try:
        return Outcome.model_validate({**data, "told": data})
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise RequestError(f"{file}: damaged at {place}; {ANEW}") from None
    except TypeError:
        raise RequestError(f"{file}: damaged, it holds no table; {ANEW}") from None


def check_belongs(
    outcome: Outcome, candidates: Iterable["Candidate"], study: str, folder: Path
) -> None:
    """Raises RequestError where the outcome tells of other candidates or scores than the study has."""
    known = {candidate.number: candidate for candidate in candidates}
    for told in outcome.every:
        if told.number not in known or not _is(told, known[told.number]):
            raise RequestError(
                f"{folder / OUTCOME}: is of another search: its candidate {told.number} is not that of study "
                f"{study!r}; give the folder of a run of this one, or move the file away"
            )


def _is(told: Told, candidate: "Candidate") -> bool:
    scores: Mapping[str, Any] = candidate.scores or {}
    same_scores = told.dev is None or told.dev.mean == scores.get("mean")
    return same_scores and told.recipe == candidate.recipe
