"""A recipe -> what came of its model, in memory: plan, run into a live model, put the documents to it."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from merge.budget import keep_freed_memory
from merge.errors import RequestError
from merge.pipeline import budget_of, plan_parsed
from merge.plan import Plan
from merge.recipe import Recipe, parse_recipe
from merge.score import (
    check_logits,
    few_threads,
    lm_of,
    quiet_libraries,
    scoring_dtype,
)
from merge.search.live import LiveModel, Shells
from merge.search.panel import Marks, Panel, panels
from merge.search.pruning import Bar, blocks_of, marks_until
from merge.search.sections import StudySection
from merge.search.tasks import suite_of
from merge.sources.model import Model

NOT_SEARCHED = ("adapter", "experts", "mixture")


@dataclass
class Scorer:
    """Scores candidates one after another; models that they share stay open, live models are used again."""

    file: Path
    section: StudySection
    memory: str
    threads: int | None
    offline: bool
    opened: dict[str, Model] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        suite = suite_of(self.section)
        self._batch_size = suite.batch_size
        with quiet_libraries():
            self.panels: dict[str, Panel] = panels(
                suite if self.section.tasks else self.section.suite,
                self.section.limit,
                self.section.objectives,
            )
            self._blocks = blocks_of(self.panels["dev"]) if self.section.prune else []
            self._shells = Shells(*scoring_dtype())
        keep_freed_memory()

    def parsed(self, recipe: Mapping[str, Any]) -> Recipe:
        """A candidate as its text says it; raises RequestError."""
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        parsed = parse_recipe(text, str(self.file))
        for key in NOT_SEARCHED:
            if getattr(parsed.sections, key):
                todo = "search without it, then add it to the best recipe"
                raise RequestError(f"{self.file}: {key}: is not searched over; {todo}")
        return parsed

    def plan(self, recipe: Mapping[str, Any]) -> Plan:
        """The plan of a candidate; raises RequestError."""
        return plan_parsed(
            self.parsed(recipe), memory=self.memory, offline=self.offline, opened=self.opened
        )

    def live(self, plan: Plan) -> LiveModel:
        """The model of a plan, in memory; raises RunError where an input is not finite or unreadable."""
        shell = self._shells.of(plan)
        shell.become(plan, budget_of(plan, self.memory, self.threads))
        return shell

    def scored(
        self, recipe: Mapping[str, Any], split: str = "dev", bar: Bar | None = None
    ) -> tuple[dict[str, Any], float]:
        """What came of a candidate on a split (see Marks), and seconds; raises MergetoolError.

        bar: what it must not fall short of; else what came of the documents until then.
        """
        started = time.monotonic()
        plan = self.plan(recipe)
        with quiet_libraries(), few_threads(plan.write_bytes):
            live = self.live(plan)
            check_logits(live.model, live.tokenizer, "the candidate")
            lm = lm_of(live.model, live.tokenizer, self._batch_size)
            marks = self._marks(split, lm, bar)
        return marks.as_json(), time.monotonic() - started

    def saved(self, scores: Mapping[str, Any]) -> int:
        """Documents of dev that a candidate with these scores was not asked."""
        return self.panels["dev"].split.count - sum(map(len, scores["values"].values()))

    def _marks(self, split: str, lm: Any, bar: Bar | None) -> Marks:
        """Where candidates may be given up, all are asked in the same blocks: what is in a batch together
        changes the last bits of an answer."""
        panel = self.panels[split]
        if split == "dev" and self._blocks:
            return marks_until(panel, self._blocks, lm, bar)
        return panel.marks(lm)
