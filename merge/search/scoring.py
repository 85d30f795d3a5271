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
from merge.recipe import parse_recipe
from merge.score import (
    Suite,
    check_logits,
    few_threads,
    lm_of,
    quiet_libraries,
    scoring_dtype,
)
from merge.search.live import LiveModel, Shells
from merge.search.panel import Panel, panels
from merge.search.sections import StudySection
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
        self._batch_size = Suite.named(self.section.suite).batch_size
        with quiet_libraries():
            self.panels: dict[str, Panel] = panels(self.section.suite, self.section.limit)
            self._shells = Shells(*scoring_dtype())
        keep_freed_memory()

    def plan(self, recipe: Mapping[str, Any]) -> Plan:
        """The plan of a candidate; raises RequestError."""
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        parsed = parse_recipe(text, str(self.file))
        for key in NOT_SEARCHED:
            if getattr(parsed.sections, key):
                todo = "search without it, then add it to the best recipe"
                raise RequestError(f"{self.file}: {key}: is not searched over; {todo}")
        return plan_parsed(parsed, memory=self.memory, offline=self.offline, opened=self.opened)

    def live(self, plan: Plan) -> LiveModel:
        """The model of a plan, in memory; raises RunError where an input is not finite or unreadable."""
        shell = self._shells.of(plan)
        shell.become(plan, budget_of(plan, self.memory, self.threads))
        return shell

    def scored(self, recipe: Mapping[str, Any], split: str = "dev") -> tuple[dict[str, Any], float]:
        """What came of a candidate on a split (see Marks), and seconds; raises MergetoolError."""
        started = time.monotonic()
        plan = self.plan(recipe)
        with quiet_libraries(), few_threads(plan.write_bytes):
            live = self.live(plan)
            check_logits(live.model, live.tokenizer, "the candidate")
            marks = self.panels[split].marks(lm_of(live.model, live.tokenizer, self._batch_size))
        return marks.as_json(), time.monotonic() - started
