"""The keys of a recipe about a search."""

from typing import Literal

from pydantic import Field, StrictInt

from merge.fields import Strict

Sampler = Literal["cma-es", "tpe", "random", "grid"]


class StudySection(Strict):
    """`trials`, `minutes`, `documents`: when the search ends, whichever comes first: candidates that were
    tried beside the baselines, time, documents scored. `limit`: of documents of each task that are searched
    on; what the best are compared on is not limited. `top`: how many of the best are scored again on what the
    search did not see. `start`: values by dimension to begin with. `baselines`: every parent and their plain
    average are candidates too."""

    suite: str = "quickstart"
    sampler: Sampler | None = None
    trials: StrictInt = Field(default=60, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    documents: StrictInt | None = Field(default=None, ge=1)
    seed: StrictInt = 0
    limit: StrictInt | None = Field(default=None, ge=1)
    top: StrictInt = Field(default=5, ge=1)
    start: list[dict[str, float]] = []
    baselines: bool = True
