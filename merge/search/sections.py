"""The keys of a recipe about a search."""

from typing import Any, Literal

from pydantic import Field, StrictInt, field_validator, model_validator

from merge.fields import Label, Strict
from merge.lines import first_twice

Sampler = Literal["cma-es", "tpe", "nsga-ii", "random", "grid"]
OF_SEVERAL = (
    "nsga-ii",
    "tpe",
    "random",
    "grid",
)  # that can look for the best in several objectives


class ObjectiveSection(Strict):
    """The mean over some tasks of the suite, by weights where they are given (`{task: weight}`)."""

    name: str = Field(min_length=1)
    tasks: dict[str, float] = Field(min_length=1)

    @field_validator("tasks", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(set(map(str, value))) < len(value):
            raise ValueError("must name each task once")
        return dict.fromkeys(map(str, value), 1.0)

    @field_validator("tasks", mode="after")
    @classmethod
    def _above_zero(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(0 < weight < float("inf") for weight in value.values()):
            raise ValueError("must have weights above 0")
        return value


class TaskSection(Strict):
    """A task of lm-eval and the metric of it that counts: without one the first that the task lists, and
    without a direction that which the harness knows."""

    task: str = Field(min_length=1)
    metric: str | None = Field(default=None, min_length=1)
    higher_is_better: bool | None = None


class GenomeTask(Strict):
    """A task as mergekit-evolve's files name it; with a weight below 0, less is better."""

    name: str = Field(min_length=1)
    weight: float = 1.0
    metric: str = Field(default="acc,none", min_length=1)

    @field_validator("weight", mode="after")
    @classmethod
    def _some(cls, value: float) -> float:
        if not 0 < abs(value) < float("inf"):
            raise ValueError("must be a number other than 0")
        return value


class GenomeSection(Strict):
    """What may vary, as mergekit-evolve's files say it. `layer_granularity`: layers that share their values;
    0: all do."""

    models: list[Label] = Field(min_length=1)
    merge_method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare_ties"]
    base_model: Label | None = None
    tokenizer_source: str | None = None
    layer_granularity: StrictInt = Field(default=0, ge=0)
    normalize: bool | None = None
    allow_negative_weights: bool = False
    smooth: bool = False
    filters: list[str] | None = None


class StudySection(Strict):
    """`trials`, `minutes`, `documents`: when the search ends, whichever comes first: candidates that were
    tried beside the baselines, time, documents that were put to candidates and baselines on dev. `limit`: of
    documents of each task that are searched on; what the best are compared on is not limited. `top`: how
    many of the best are scored again on what the search did not see. `tasks`: of lm-eval, in the place of a
    suite; `include`: a folder with files of tasks. `start`: what is tried first: values by dimension,
    recipes, names of their files or of shipped ones. `baselines`: every parent, those of such recipes too,
    and the plain average of what the search itself may merge are candidates too. `objectives`: tasks, or
    means of some, each of which shall be as high as it can; with none it is the mean over all. `population`:
    candidates of a generation of nsga-ii. `prune`: candidates that are clearly worse than the best so far
    are not asked all documents."""

    suite: str = "quickstart"
    tasks: list[TaskSection] | None = Field(default=None, min_length=1)
    include: str | None = Field(default=None, min_length=1)
    sampler: Sampler | None = None
    trials: StrictInt = Field(default=60, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    documents: StrictInt | None = Field(default=None, ge=1)
    seed: StrictInt = 0
    limit: StrictInt | None = Field(default=None, ge=1)
    top: StrictInt = Field(default=5, ge=1)
    start: list[str | dict[str, Any]] = []
    baselines: bool = True
    objectives: list[ObjectiveSection] = []
    population: StrictInt = Field(default=20, ge=4)
    prune: bool = False

    @model_validator(mode="after")
    def _one(self) -> "StudySection":
        if self.tasks and "suite" in self.model_fields_set:
            raise ValueError("has both suite and tasks; keep one")
        if self.include and not self.tasks:
            raise ValueError("has include without tasks, which it is for")
        return self

    @field_validator("tasks", mode="after")
    @classmethod
    def _each_once(cls, value: list[TaskSection] | None) -> list[TaskSection] | None:
        if (twice := first_twice([each.task for each in value or ()])) is not None:
            raise ValueError(f"must name each task once; {twice} is there twice")
        return value

    @field_validator("objectives", mode="before")
    @classmethod
    def _of_one_task(cls, value: Any) -> Any:
        """A task's name alone is the objective of that name."""
        if not isinstance(value, list):
            return value
        return [{"name": e, "tasks": [e]} if isinstance(e, str) else e for e in value]

    @field_validator("objectives", mode="after")
    @classmethod
    def _named_once(cls, value: list[ObjectiveSection]) -> list[ObjectiveSection]:
        names = [each.name for each in value]
        if len(set(names)) < len(names):
            raise ValueError("each must have a name of its own")
        return value
