"""A search: ask -> score -> tell, remembered in a ledger, and the comparison at its end."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from merge.ancestry import ancestry_notes
from merge.errors import MergetoolError, RunError
from merge.search.asking import Asker
from merge.search.checks import check_plans, notes_on_candidates
from merge.search.front import MEAN, front_of
from merge.search.ledger import DONE, ENDED, FAILED, PRUNED, Candidate, Ledger
from merge.search.outcome import Outcome, arrays_of, shares_in
from merge.search.pruning import bar_for
from merge.search.scoring import Scorer
from merge.search.sections import StudySection
from merge.search.signs import PAUSE, SOON, beating, is_gone, own_name
from merge.search.space import Space
from merge.search.starts import baselines_of, is_searched, start_recipes
from merge.search.tried import digest_of
from merge.search.verdict import compared

Told = Callable[[Candidate, "Study"], None]
Placing = Callable[["Study", Told], None]  # has workers somewhere try candidates until none is left


@dataclass(frozen=True)
class Setup:
    """What each worker of a study opens it with. `changes`: to the recipe's `study` section. `sampler`: where
    that names none. `url`: of the ledger, which may be `shared` with other runs. `place`: where relative
    names start from. `until`: seconds since 1970 from which nothing new is asked for."""

    file: Path
    changes: Mapping[str, Any]
    sampler: str | None
    memory: str
    threads: int | None
    offline: bool
    url: str
    shared: bool
    place: Path
    until: float | None = None


@dataclass
class Study:
    """What is searched and how: a space, its settings, the candidates so far. `notes`: what happened on the
    way that people should know. `used_up`: nothing new was left to try before the study was over."""

    setup: Setup
    space: Space
    section: StudySection
    ledger: Ledger
    scorer: Scorer
    notes: list[str] = field(default_factory=list)
    used_up: bool = False

    @property
    def file(self) -> Path:
        return self.setup.file

    def run(
        self, tell: Told = lambda candidate, study: None, placing: Placing | None = None
    ) -> "Outcome":
        """Tries candidates until the study is at its end, then compares the best; goes on where it stopped.

        tell(candidate, study): is called with every candidate that came to an end. placing: has others try
        them, not this process.
        """
        if self.section.minutes is not None:
            self.setup = replace(self.setup, until=time.time() + 60 * self.section.minutes)
        for worker in self.ledger.workers():
            if not self.setup.shared or is_gone(worker):
                self.ledger.release(worker)
        self.notes += notes_on_candidates(self.space, self.scorer)
        before = _count_searched(self.ledger.all())
        if before > self.section.trials:
            what = f"{before} candidates were tried before, and trials is {self.section.trials}"
            self.notes.append(f"{what}: none is added, and the best of all are compared")
        self._enter_baselines()
        if placing:
            placing(self, tell)
        else:
            self.work(own_name(), tell)
        every = self.ledger.all()
        if not self._is_over(every):
            self.used_up = True
            what = f"after {_count_searched(every)} of {self.section.trials} candidates nothing new is left"
            self.notes.append(f"{what} to try: there are no others, or the sampler proposes none")
        return self.outcome()

    def check_share(self, share: Setup) -> None:
        """Raises PlanError where a part of the memory is too small for a candidate."""
        check_plans(self.space, self.scorer, share.memory, share.threads)

    def work(self, worker: str, tell: Told = lambda candidate, study: None) -> None:
        """Tries candidates, as others may beside it, until there is none left to try."""
        with beating(self.ledger, worker):
            for candidate in self._candidates(worker):
                tried = self._tried(candidate, worker)
                if tried.state in ENDED:  # else it is another's by now
                    tell(tried, self)

    def _candidates(self, worker: str) -> Iterator[Candidate]:
        """What nobody else is at, or the next one asked for; waits for others, who may be lost."""
        asker = self._asker()
        while True:
            if found := self.ledger.take(worker):
                yield found
                continue
            every = self.ledger.all()
            if asker.used_up or self._is_over(every):
                if all(candidate.state in ENDED for candidate in every):
                    return
                time.sleep(PAUSE)
            elif not self.ledger.begin_asking(len(every), worker):
                time.sleep(SOON)
            elif asked := self._asked(asker, len(every), worker):
                yield asked
            elif not asker.used_up:  # the turn is another's by now: this one has asked in vain
                asker = self._asker()

    def minutes_left(self, pace: float) -> float:
        """Until the study is over, where so many candidates end in a minute."""
        tried = sum(is_searched(c.origin) and c.state in ENDED for c in self.ledger.all())
        left = max(0, self.section.trials - tried) / pace
        until = self.setup.until
        return left if until is None else min(left, max(0.0, until - time.time()) / 60)

    def _enter_baselines(self) -> None:
        """Those that are not there yet: a run may have been cut off between two."""
        with self.ledger.alone() as ledger:
            known = {candidate.digest for candidate in ledger.all()}
            first = baselines_of(self.space.data, self.section)
            for origin, recipe in chain(first, start_recipes(self.section)):
                if (digest := digest_of(recipe)) not in known:
                    ledger.add(Candidate(len(known), digest, origin, recipe, {}))
                    known.add(digest)

    def _asker(self) -> Asker:
        """One that was asked and told what others were so far."""
        asker = Asker(self.space, self.section, self.ledger.facts().get("begun_with", ""))
        asker.repeat(self.ledger.all(), to_the_end=False)
        return asker

    def _asked(self, asker: Asker, number: int, worker: str) -> Candidate | None:
        """The next candidate, entered as this worker's, in its turn; None where there is none, or where it
        has lost its turn.

        One worker asks at a time, told what all others were, so that any of them can repeat it. Optimisers
        may take long: no change of the database is open meanwhile, and others go on with what they are at.
        """
        try:
            asker.repeat(self.ledger.all())
            if (found := asker.ask(number)) is None:
                self.ledger.end_asking(number, worker)
                return None
        except BaseException:
            self.ledger.release(worker)
            raise
        recipe, asked = found
        digest = digest_of(recipe)
        candidate = Candidate(number, digest, "search", recipe, asked, after=asker.told)
        return candidate if self.ledger.end_asking(number, worker, candidate) else None

    def _is_over(self, every: Sequence[Candidate]) -> bool:
        """Trials and documents count over all runs of the study, minutes for this one."""
        section, until = self.section, self.setup.until
        if _count_searched(every) >= section.trials:
            return True
        scores = [candidate.scores for candidate in every if candidate.scores]
        documents = sum(len(v) for found in scores for v in found["values"].values())
        over = section.documents is not None and documents >= section.documents
        return over or (until is not None and time.time() >= until)

    def _tried(self, candidate: Candidate, worker: str) -> Candidate:
        """A candidate scored, or failed with its reason."""
        bar = bar_for(candidate, self.ledger.all(), self.section)
        try:
            scores, seconds = self.scorer.scored(candidate.recipe, bar=bar)
        except Exception as error:  # of a library too: one candidate is no reason to end a search
            known = isinstance(error, MergetoolError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            self.ledger.end(candidate.number, worker, FAILED, reason=reason)
        else:
            state = PRUNED if self.scorer.saved(scores) else DONE
            self.ledger.end(candidate.number, worker, state, scores=scores, seconds=seconds)
        return self.ledger.one(candidate.number)

    def outcome(self) -> "Outcome":
        """The best of the study, scored again on documents that the search did not see; raises RunError."""
        every = self.ledger.all()
        done = [c for c in every if c.state == DONE]
        given_up = [c for c in every if c.state == PRUNED]
        found = self._found(done) or self._found(given_up)
        if not found:
            reasons = (c.reason for c in every if is_searched(c.origin) and c.reason)
            reason = next(
                reasons, "the search was over before the first; give it more minutes or documents"
            )
            raise RunError(f"{self.file}: no candidate could be scored: {reason}")
        rivals = [c for c in done if not is_searched(c.origin)]
        again = self._looked_at([*found, *rivals], "val")

        def best(of: list[Candidate]) -> Candidate:
            return max(of, key=lambda c: (again[c.number][MEAN], -c.number))

        winner = best(found)
        parents = [c for c in rivals if c.origin.startswith("parent")]
        test = self._looked_at([winner, *rivals], "test")
        looks = self.ledger.looks("test")  # of other runs too, which may have asked for more by now
        winners = sum(is_searched(c.origin) and c.number in looks for c in self.ledger.all())
        verdict = None
        if parents:
            rival = best(parents)
            ours, theirs = (arrays_of(test[c.number]) for c in (winner, rival))
            name, shares = rival.origin.removeprefix("parent "), shares_in(test[winner.number])
            verdict = compared(f"candidate {winner.number}", name, ours, theirs, shares)
        failed = {c.number: c.reason for c in every if c.state == FAILED}
        kin = {c.number: tuple(ancestry_notes(self.scorer.plan(c.recipe))) for c in found}
        saved = {c.number: self.scorer.saved(c.scores or {}) for c in every if c.state == PRUNED}
        rest = (again, test, verdict, failed, winners, self.section, kin, saved, self.file.parent)
        return Outcome(winner, tuple(found), tuple(rivals), *rest, used_up=self.used_up)

    def _found(self, done: list[Candidate]) -> list[Candidate]:
        """The best of the search on dev, the best mean first; of several objectives, all that
        nothing beats in all of them, a parent neither."""
        searched = sorted((c for c in done if is_searched(c.origin)), key=_rank)
        if len(self.section.objectives) < 2:
            return searched[: self.section.top]
        front = {c.number for c in front_of(done, self.section)}
        return [c for c in searched if c.number in front] or searched[:1]

    def _looked_at(self, candidates: Sequence[Candidate], split: str) -> dict[int, dict[str, Any]]:
        """What came of candidates on a split, by number: each is scored there once, whoever comes first."""
        worker, wanted = own_name(), {candidate.number: candidate for candidate in candidates}
        with beating(self.ledger, worker):
            while True:
                known = self.ledger.looks(split)
                left = [candidate for number, candidate in wanted.items() if number not in known]
                if not left:
                    return {number: known[number] for number in wanted}
                begun = (c for c in left if self.ledger.begin_look(c.number, split, worker))
                if mine := next(begun, None):
                    self._look(mine, split, worker)
                else:
                    time.sleep(PAUSE)

    def _look(self, candidate: Candidate, split: str, worker: str) -> None:
        try:
            scores, _ = self.scorer.scored(candidate.recipe, split)
        except BaseException:
            self.ledger.release(worker)
            raise
        self.ledger.end_look(candidate.number, split, worker, scores)


def _count_searched(every: Sequence[Candidate]) -> int:
    return sum(is_searched(candidate.origin) for candidate in every)


def _rank(candidate: Candidate) -> tuple[float, int]:
    value = -candidate.scores[MEAN] if candidate.scores else float("inf")
    return (value, candidate.number)
