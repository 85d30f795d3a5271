"""A search from its beginning to the comparison at its end: ask -> score -> tell, remembered in a ledger."""

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from merge.agreement import canonical
from merge.ancestry import ancestry_notes
from merge.errors import MergetoolError, OutputError, RequestError, RunError
from merge.lines import Lines, load_documents, nearest
from merge.pipeline import budget_of
from merge.score import check_installed
from merge.search.asking import Asker, sampler_for
from merge.search.automerger import expanded
from merge.search.front import front_of, objectives_of, unknown_tasks, values_of
from merge.search.genome import converted, layers_of
from merge.search.ledger import DONE, ENDED, FAILED, PRUNED, Candidate, Ledger
from merge.search.parents import check_parents, parents_facts
from merge.search.pruning import bar_for
from merge.search.scoring import Scorer
from merge.search.sections import OF_SEVERAL, StudySection
from merge.search.signs import PAUSE, beating, is_gone, own_name
from merge.search.space import Space, varying
from merge.search.starts import (
    check_starts,
    ends,
    is_searched,
    start_recipes,
    with_recipes,
)
from merge.search.tried import baselines, digest_of, parents_of
from merge.search.verdict import Verdict, compared, error_of
from merge.sections import read_section
from merge.sources.model import Model
from merge.write import writing

DATABASE, LOCK = "study.db", "study.lock"
NAME = "study"  # in a database of its own: it may be moved
LONGER = {"trials", "minutes", "documents", "top"}  # what a study may go on with otherwise
ASKED_BY = ("optuna", "cmaes")

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
    way that people should know."""

    setup: Setup
    space: Space
    section: StudySection
    ledger: Ledger
    scorer: Scorer
    notes: list[str] = field(default_factory=list)

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
        self._enter_baselines()
        if placing:
            placing(self, tell)
        else:
            self.work(own_name(), tell)
        return self.outcome()

    def check_share(self, share: Setup) -> None:
        """Raises PlanError where a part of the memory is too small for a candidate."""
        _check_plans(self.space, self.scorer, share.memory, share.threads)

    def work(self, worker: str, tell: Told = lambda candidate, study: None) -> None:
        """Tries candidates, as others may beside it, until there is none left to try."""
        asker = Asker(self.space, self.section)
        begun_with = self.ledger.facts().get("begun_with", "")
        asker.repeat(self.ledger.all(), begun_with, to_the_end=False)
        with beating(self.ledger, worker):
            for candidate in self._candidates(asker, begun_with, worker):
                tried = self._tried(candidate, worker)
                if tried.state in ENDED:  # else it is another's by now
                    tell(tried, self)

    def _candidates(self, asker: Asker, begun_with: str, worker: str) -> Iterator[Candidate]:
        """What nobody else is at, or the next one asked for; waits for others, who may be lost."""
        used_up = False
        while True:
            if found := self.ledger.take(worker):
                yield found
                continue
            every = self.ledger.all()
            if not used_up and not self._is_over(every):
                asked = self._asked(asker, begun_with, worker)
                used_up = asked is None
                yield from filter(None, [asked])
            elif all(candidate.state in ENDED for candidate in every):
                return
            else:
                time.sleep(PAUSE)

    def left(self) -> int:
        """Candidates that are still to be tried."""
        tried = sum(is_searched(c.origin) and c.state in ENDED for c in self.ledger.all())
        return max(0, self.section.trials - tried)

    def _enter_baselines(self) -> None:
        """Those that are not there yet: a run may have been cut off between two."""
        with self.ledger.alone() as ledger:
            known = {candidate.digest for candidate in ledger.all()}
            first = baselines(self.space.data) if self.section.baselines else ()
            for origin, recipe in chain(first, start_recipes(self.section)):
                if (digest := digest_of(recipe)) not in known:
                    ledger.add(Candidate(len(known), digest, origin, recipe, {}))
                    known.add(digest)

    def _asked(self, asker: Asker, begun_with: str, worker: str) -> Candidate | None:
        """The next candidate, entered as this worker's; None where there is none. One worker asks at a time,
        and knows what all others were told."""
        with self.ledger.alone() as ledger:
            every = ledger.all()
            if self._is_over(every):
                return None
            asker.repeat(every, begun_with)
            found = asker.ask(len(every))
            if found is None:
                return None
            recipe, asked = found
            candidate = Candidate(
                len(every), digest_of(recipe), "search", recipe, asked, after=asker.told
            )
            ledger.add(candidate, worker)
        return candidate

    def _is_over(self, every: Sequence[Candidate]) -> bool:
        """Trials and documents count over all runs of the study, minutes for this one."""
        section, until = self.section, self.setup.until
        if sum(is_searched(candidate.origin) for candidate in every) >= section.trials:
            return True
        scores = [candidate.scores for candidate in every if candidate.scores]
        documents = sum(len(v) for found in scores for v in found["values"].values())
        over = section.documents is not None and documents >= section.documents
        return over or (until is not None and time.time() >= until)

    def _tried(self, candidate: Candidate, worker: str) -> Candidate:
        """A candidate scored, or failed with its reason."""
        try:
            bar = bar_for(candidate, self.ledger.all(), self.section)
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
            reason = next(
                (c.reason for c in every if is_searched(c.origin) and c.reason), "none ended"
            )
            raise RunError(f"{self.file}: no candidate could be scored: {reason}")
        rivals = [c for c in done if not is_searched(c.origin)]
        again = self._looked_at([*found, *rivals], "val")

        def best(of: list[Candidate]) -> Candidate:
            return max(of, key=lambda c: (_mean(self.section, again[c.number]), -c.number))

        winner = best(found)
        parents = [c for c in rivals if c.origin.startswith("parent")]
        test = self._looked_at([winner, *rivals], "test")
        winners = sum(is_searched(every[number].origin) for number in self.ledger.looks("test"))
        verdict = None
        if parents:
            rival = best(parents)
            ours, theirs = (self._compared_on(test[c.number]) for c in (winner, rival))
            name = rival.origin.removeprefix("parent ")
            verdict = compared(f"candidate {winner.number}", name, ours, theirs)
        failed = {c.number: c.reason for c in every if c.state == FAILED}
        kin = {c.number: tuple(ancestry_notes(self.scorer.plan(c.recipe))) for c in found}
        saved = {c.number: self.scorer.saved(c.scores or {}) for c in every if c.state == PRUNED}
        rest = (again, test, verdict, failed, winners, self.section, kin, saved)
        return Outcome(winner, tuple(found), tuple(rivals), *rest)

    def _found(self, done: list[Candidate]) -> list[Candidate]:
        """The best of the search on dev, the best mean of objectives first; of several objectives, all that
        nothing beats in all of them, a parent neither."""
        searched = sorted(
            (c for c in done if is_searched(c.origin)), key=lambda c: _rank(c, self.section)
        )
        if len(self.section.objectives) < 2:
            return searched[: self.section.top]
        return [c for c in searched if c in front_of(done, self.section)] or searched[:1]

    def _compared_on(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Values by task, of those that the objectives name where `scores` has them all, else of all."""
        values = _arrays(scores)
        named = [task for tasks in objectives_of(self.section).values() for task in tasks]
        if not named or any(task not in values for task in named):
            return values
        return {task: values[task] for task in dict.fromkeys(named)}

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


def _rank(candidate: Candidate, section: StudySection) -> tuple[float, int]:
    value = -_mean(section, candidate.scores) if candidate.scores else float("inf")
    return (value, candidate.number)


def _mean(section: StudySection, scores: Mapping[str, Any]) -> float:
    """Of the objectives."""
    values = values_of(section, scores)
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Outcome:
    """`top`: the best on dev, best first; `rivals`: parents and average. `val`, `test`: what came of them
    there, by number. `verdict`: None where no parent could be scored. `failed`: reasons by number. `winners`:
    how many different ones test has been looked at for, this one included.

    Of several objectives `top` is the front, and the winner has the best mean of them on val. `kin`: what is
    told of the ancestors that models of a candidate share, by number. `saved`: documents that those were not
    asked that were given up, by number.
    """

    winner: Candidate
    top: tuple[Candidate, ...]
    rivals: tuple[Candidate, ...]
    val: Mapping[int, Mapping[str, Any]]
    test: Mapping[int, Mapping[str, Any]]
    verdict: Verdict | None
    failed: Mapping[int, str]
    winners: int = 1
    section: StudySection = field(default_factory=StudySection)
    kin: Mapping[int, Sequence[str]] = field(default_factory=dict)
    saved: Mapping[int, int] = field(default_factory=dict)

    @property
    def average_is_as_good(self) -> bool:
        """Whether the average, which nobody had to search for, has as high a mean on test."""
        means = [self.test[c.number]["mean"] for c in self.rivals if c.origin == "average"]
        return any(mean >= self.test[self.winner.number]["mean"] for mean in means)

    def as_json(self) -> dict[str, Any]:
        """What came out, as JSON can tell it."""
        verdict = self.verdict
        return {
            "winner": self._told(self.winner),
            "top": [self._told(candidate) for candidate in self.top],
            "rivals": [self._told(candidate) for candidate in self.rivals],
            "failed": {str(number): reason for number, reason in self.failed.items()},
            "saved": {str(number): count for number, count in self.saved.items()},
            "average_is_as_good": self.average_is_as_good,
            "winners_tested": self.winners,
            "verdict": asdict(verdict) | {"words": verdict.words} if verdict else None,
        }

    def _told(self, candidate: Candidate) -> dict[str, Any]:
        number = candidate.number
        splits = {
            "dev": candidate.scores,
            "val": self.val.get(number),
            "test": self.test.get(number),
        }
        return {
            "number": number,
            "origin": candidate.origin,
            "recipe": candidate.recipe,
            **({"kin": list(kin)} if (kin := self.kin.get(number)) else {}),
            **{name: self._figures(scores) for name, scores in splits.items() if scores},
        }

    def _figures(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        shares = {key: scores[key] for key in ("truncated", "empty", "alike")}
        figures = {"mean": scores["mean"], "stderr": errors_of(scores), **shares}
        objectives = self.objectives(scores)
        return figures | ({"objectives": objectives} if objectives else {})

    def objectives(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """What a candidate reaches in each; {} where there are none, or the split has other tasks."""
        objectives = objectives_of(self.section)
        if any(task not in scores["tasks"] for tasks in objectives.values() for task in tasks):
            return {}
        return dict(zip(objectives, values_of(self.section, scores), strict=bool(objectives)))

    def save(self, folder: Path) -> None:
        """Writes outcome.json and recipes/candidate-N.yaml of the best; raises WriteError."""
        place = folder / "recipes"
        with writing(folder):
            place.mkdir(parents=True, exist_ok=True)
            for former in place.glob("candidate-*.yaml"):
                former.unlink(missing_ok=True)  # two runs of one study may save the same
            for candidate in self.top:
                text = yaml.safe_dump(dict(candidate.recipe), sort_keys=False, allow_unicode=True)
                file = place / f"candidate-{candidate.number}.yaml"
                file.write_text(text, encoding="utf-8")
            text = json.dumps(self.as_json(), indent=1, ensure_ascii=False)
            (folder / "outcome.json").write_text(text + "\n", encoding="utf-8")


def errors_of(scores: Mapping[str, Any]) -> float:
    """Standard error of a candidate's mean."""
    return error_of(_arrays(scores))


def _arrays(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {task: np.array(values, np.float64) for task, values in scores["values"].items()}


@contextmanager
def open_study(
    file: Path,
    folder: Path,
    *,
    memory: str = "512MiB",
    threads: int | None = None,
    offline: bool = False,
    changes: Mapping[str, Any] | None = None,
    sampler: str | None = None,
    url: str | None = None,
) -> Iterator[Study]:
    """The study of a recipe that may vary, in `folder` alone as long as it is open; raises RequestError.

    folder: keeps its database, and is made once the recipe is known to be right. changes: to its `study`
    section. sampler: where that names none; None: one that suits what varies. url: of a database that runs on
    this machine and others share, in the place of the folder's.
    """
    here = f"sqlite:///{folder.absolute() / DATABASE}"
    setup = Setup(
        file, changes or {}, sampler, memory, threads, offline, url or here, url is not None, Path.cwd()
    )  # fmt: skip
    prepared = _prepared(setup)
    with nullcontext() if url else _alone(folder):
        yield _entered(setup, *prepared)


def joined(setup: Setup) -> Study:
    """The same study, opened by one of its workers; raises RequestError where it is another one here."""
    return _entered(setup, *_prepared(setup))


def _prepared(setup: Setup) -> tuple[Space, StudySection, Scorer]:
    """Everything that can be wrong with a search is found here; nothing is written."""
    space, section = read_space(setup.file, setup.changes, setup.sampler, offline=setup.offline)
    _check_search_installed()
    scorer = Scorer(setup.file, section, setup.memory, setup.threads, setup.offline)
    _check_objectives(section, scorer, space.lines)
    _check_plans(space, scorer, setup.memory, setup.threads)
    return space, section, scorer


def _entered(setup: Setup, space: Space, section: StudySection, scorer: Scorer) -> Study:
    """The study with its ledger; raises RequestError where that is of another search, or of other parents."""
    kept = section.model_dump(mode="json", exclude=LONGER)
    documents = {name: panel.digest for name, panel in scorer.panels.items()}
    facts = {"recipe": space.data, "study": kept, "documents": documents}
    digest = hashlib.sha256(canonical(facts).encode()).hexdigest()
    name = f"{setup.file.stem[:100]}-{digest[:12]}" if setup.shared else NAME
    ledger = Ledger.open(setup.url, name, digest, facts | {"begun_with": _versions()})
    models = _parents(space, scorer)
    if "parents" not in ledger.facts():
        ledger.remember(parents_facts(models))
    check_parents(models, ledger.facts(), f"study {name!r}")
    return Study(setup, space, section, ledger, scorer)


def _parents(space: Space, scorer: Scorer) -> dict[str, Model]:
    """The models that are merged, by label; one that cannot be opened will fail as a candidate."""
    for label in parents_of(space.data):
        with suppress(RequestError):
            scorer.plan({"model": label})
    return dict(scorer.opened)


def read_space(
    file: Path, changes: Mapping[str, Any], sampler: str | None, *, offline: bool = False
) -> tuple[Space, StudySection]:
    """What of a recipe varies, and its `study` section with these changes; raises RequestError."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise RequestError(f"{file}: cannot be read: {reason}") from None
    (data, lines), *more = load_documents(text, str(file))
    if more:
        raise RequestError(f"{file}: has several documents; a search is one")
    if "preset" in data:
        data = expanded(data, lines)
    if "genome" in data:
        data = converted(data, lines, partial(layers_of, beside=file.parent, offline=offline))
    given = data.pop("study", None)
    if given is not None and not isinstance(given, dict):
        raise lines.error(("study",), "study must be a table of keys")
    section = read_section(StudySection, {**(given or {}), **changes}, lines, ("study",))
    if varying(data) is None:
        what = "nothing in it may vary; put {search: [low, high]} in the place of a value"
        raise lines.error((), what)
    space = Space(data, lines)
    dimensions = {dimension.name: dimension for dimension in space.dimensions()}
    section = with_recipes(section, file, lines)
    check_starts(section, dimensions, lines)
    several = len(section.objectives)
    chosen = section.sampler or sampler or sampler_for(space, several)
    if several > 1 and section.prune:
        what = "prune and several objectives are both given; worse in one may be better in another"
        raise lines.error(("study", "prune"), what)
    if several > 1 and chosen not in OF_SEVERAL:
        what = f"sampler is {chosen}, which knows one objective; with several it must be one of"
        raise lines.error(("study", "sampler"), f"{what} {', '.join(OF_SEVERAL)}")
    return space, section.model_copy(update={"sampler": chosen})


def _check_objectives(section: StudySection, scorer: Scorer, lines: Lines) -> None:
    known = list(scorer.panels["dev"].metrics)
    for i, task in unknown_tasks(section, known):
        what = f"the suite has no task {task!r} that is searched on{nearest(task, known)}"
        allowed = f"there are {', '.join(known)}"
        raise lines.error(("study", "objectives", i), f"objectives: {what}; {allowed}")


def _check_plans(space: Space, scorer: Scorer, memory: str, threads: int | None) -> None:
    """Raises what is wrong with all candidates: with the lowest values of everything and with the highest."""
    for _, recipe in start_recipes(scorer.section):
        scorer.plan(recipe)
    first: RequestError | None = None
    for end in (0, 1):
        try:
            recipe = space.filled(lambda dimension, end=end: ends(dimension)[end])  # type: ignore[misc]
            budget_of(scorer.plan(recipe), memory, threads)
            return
        except RequestError as error:
            first = first or error
    assert first
    raise first


def _check_search_installed() -> None:
    """Raises RequestError where a library is missing."""
    for name in (*ASKED_BY, "sqlalchemy"):
        if find_spec(name) is None:
            raise RequestError(f"a search needs {name}; install mergetool[search,eval]")
    check_installed()


def _versions() -> str:
    found = []
    for name in ASKED_BY:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(name)
    return ", ".join(found)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock; raises OutputError where another run has it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        what = "another run searches there; wait for it or choose another --output"
        raise OutputError(f"{folder}: {what}") from None
    finally:
        os.close(lock)
