"""A search from its beginning to the comparison at its end: ask -> score -> tell, remembered in a ledger."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from merge.agreement import canonical
from merge.errors import MergetoolError, OutputError, RequestError, RunError
from merge.lines import Lines, load_documents
from merge.score import check_installed
from merge.search.asking import Asker, sampler_for, value_of
from merge.search.ledger import DONE, ENDED, FAILED, Candidate, Ledger
from merge.search.scoring import Scorer
from merge.search.sections import StudySection
from merge.search.space import Choice, Dimension, Space, varying
from merge.search.tried import baselines, digest_of
from merge.search.verdict import Verdict, compared, error_of
from merge.sections import read_section
from merge.write import writing

DATABASE, LOCK = "study.db", "study.lock"
NAME = "study"  # in its database: it may be moved
WORKER = "here"
LONGER = {"trials", "minutes", "documents", "top"}  # what a study may go on with otherwise
ASKED_BY = ("optuna", "cmaes")

Told = Callable[[Candidate, "Study"], None]


@dataclass
class Study:
    """What is searched and how: a space, its settings, the candidates so far."""

    file: Path
    space: Space
    section: StudySection
    ledger: Ledger
    scorer: Scorer

    def run(self, tell: Told = lambda candidate, study: None) -> "Outcome":
        """Tries candidates until the study is at its end, then compares the best; goes on where it stopped.

        tell(candidate, study): is called with every candidate that came to an end.
        """
        started = time.monotonic()
        self.ledger.release()
        self._enter_baselines()
        asker = Asker(self.space, self.section)
        asker.repeat(self.ledger.all(), self.ledger.facts().get("begun_with", ""))
        while True:
            candidate = self.ledger.take(WORKER)
            if candidate is None:
                if self._is_over(started) or not self._asked(asker):
                    break
                continue
            ended = self._tried(candidate)
            asker.tell(ended)
            tell(ended, self)
        return self.outcome()

    def left(self) -> int:
        """Candidates that are still to be tried."""
        tried = sum(c.origin == "search" and c.state in ENDED for c in self.ledger.all())
        return max(0, self.section.trials - tried)

    def _enter_baselines(self) -> None:
        """Those that are not there yet: a run may have been cut off between two."""
        known = {candidate.digest for candidate in self.ledger.all()}
        for origin, recipe in baselines(self.space.data) if self.section.baselines else ():
            if (digest := digest_of(recipe)) not in known:
                self.ledger.add(Candidate(len(known), digest, origin, recipe, {}))
                known.add(digest)

    def _asked(self, asker: Asker) -> bool:
        """Enters the next candidate; False where there is none."""
        number = len(self.ledger.all())
        found = asker.ask(number)
        if found is None:
            return False
        recipe, asked = found
        self.ledger.add(
            Candidate(number, digest_of(recipe), "search", recipe, asked, after=asker.told)
        )
        return True

    def _is_over(self, started: float) -> bool:
        """Trials and documents count over all runs of the study, minutes for this one."""
        section = self.section
        if not self.left():
            return True
        scores = [candidate.scores for candidate in self.ledger.all() if candidate.scores]
        documents = sum(len(v) for found in scores for v in found["values"].values())
        over = section.documents is not None and documents >= section.documents
        return over or (
            section.minutes is not None and time.monotonic() - started >= 60 * section.minutes
        )

    def _tried(self, candidate: Candidate) -> Candidate:
        """A candidate scored, or failed with its reason."""
        try:
            scores, seconds = self.scorer.scored(candidate.recipe)
            self.ledger.end(candidate.number, WORKER, DONE, scores=scores, seconds=seconds)
        except MergetoolError as error:
            self.ledger.end(candidate.number, WORKER, FAILED, reason=str(error))
        return self.ledger.one(candidate.number)

    def outcome(self) -> "Outcome":
        """The best of the study, scored again on documents that the search did not see; raises RunError."""
        every = self.ledger.all()
        done = [c for c in every if c.state == DONE]
        found = sorted((c for c in done if c.origin == "search"), key=_rank)[: self.section.top]
        if not found:
            reason = next(
                (c.reason for c in every if c.origin == "search" and c.reason), "none ended"
            )
            raise RunError(f"{self.file}: no candidate could be scored: {reason}")
        rivals = [c for c in done if c.origin != "search"]
        again = {c.number: self._again(c, "val") for c in [*found, *rivals]}

        def best(of: list[Candidate]) -> Candidate:
            return max(of, key=lambda c: (again[c.number]["mean"], -c.number))

        winner = best(found)
        parents = [c for c in rivals if c.origin.startswith("parent")]
        test = {c.number: self._again(c, "test") for c in (winner, *rivals)}
        verdict = None
        if parents:
            rival = best(parents)
            ours, theirs = (_arrays(test[c.number]) for c in (winner, rival))
            name = rival.origin.removeprefix("parent ")
            verdict = compared(f"candidate {winner.number}", name, ours, theirs)
        failed = {c.number: c.reason for c in every if c.state == FAILED}
        return Outcome(winner, tuple(found), tuple(rivals), again, test, verdict, failed)

    def _again(self, candidate: Candidate, split: str) -> dict[str, Any]:
        return self.scorer.scored(candidate.recipe, split)[0]


def _rank(candidate: Candidate) -> tuple[float, int]:
    value = value_of(candidate)
    return (float("inf") if value is None else -value, candidate.number)


@dataclass(frozen=True)
class Outcome:
    """`top`: the best on dev, best first; `rivals`: parents and average. `val`, `test`: what came of them
    there, by number. `verdict`: None where no parent could be scored. `failed`: reasons by number."""

    winner: Candidate
    top: tuple[Candidate, ...]
    rivals: tuple[Candidate, ...]
    val: Mapping[int, Mapping[str, Any]]
    test: Mapping[int, Mapping[str, Any]]
    verdict: Verdict | None
    failed: Mapping[int, str]

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
            "average_is_as_good": self.average_is_as_good,
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
            **{name: _figures(scores) for name, scores in splits.items() if scores},
        }

    def save(self, folder: Path) -> None:
        """Writes outcome.json and recipes/candidate-N.yaml of the best; raises WriteError."""
        place = folder / "recipes"
        with writing(folder):
            place.mkdir(parents=True, exist_ok=True)
            for former in place.glob("candidate-*.yaml"):
                former.unlink()
            for candidate in self.top:
                text = yaml.safe_dump(dict(candidate.recipe), sort_keys=False, allow_unicode=True)
                file = place / f"candidate-{candidate.number}.yaml"
                file.write_text(text, encoding="utf-8")
            text = json.dumps(self.as_json(), indent=1, ensure_ascii=False)
            (folder / "outcome.json").write_text(text + "\n", encoding="utf-8")


def _figures(scores: Mapping[str, Any]) -> dict[str, float]:
    shares = {key: scores[key] for key in ("truncated", "empty", "alike")}
    return {"mean": scores["mean"], "stderr": errors_of(scores), **shares}


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
) -> Iterator[Study]:
    """The study of a recipe that may vary, in `folder` alone as long as it is open; raises RequestError.

    folder: keeps its database, and is made once the recipe is known to be right. changes: to its `study`
    section. sampler: where that names none; None: one that suits what varies.
    """
    space, section = read_space(file, changes or {}, sampler)
    _check_search_installed()
    scorer = Scorer(file, section, memory, threads, offline)
    _check_plans(space, scorer)
    kept = section.model_dump(mode="json", exclude=LONGER)
    documents = {name: panel.digest for name, panel in scorer.panels.items()}
    facts = {"recipe": space.data, "study": kept, "documents": documents}
    digest = hashlib.sha256(canonical(facts).encode()).hexdigest()
    with _alone(folder):
        begun = facts | {"begun_with": _versions()}
        ledger = Ledger.open(f"sqlite:///{folder / DATABASE}", NAME, digest, begun)
        yield Study(file, space, section, ledger, scorer)


def read_space(
    file: Path, changes: Mapping[str, Any], sampler: str | None
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
    given = data.pop("study", None)
    if given is not None and not isinstance(given, dict):
        raise lines.error(("study",), "study must be a table of keys")
    section = read_section(StudySection, {**(given or {}), **changes}, lines, ("study",))
    if varying(data) is None:
        what = "nothing in it may vary; put {search: [low, high]} in the place of a value"
        raise lines.error((), what)
    space = Space(data, lines)
    dimensions = {dimension.name: dimension for dimension in space.dimensions()}
    for i, values in enumerate(section.start):
        _check_start(values, dimensions, lines, i)
    chosen = section.sampler or sampler or sampler_for(space)
    return space, section.model_copy(update={"sampler": chosen})


def _check_start(
    values: Mapping[str, float], dimensions: Mapping[str, Dimension], lines: Lines, i: int
) -> None:
    for name, value in values.items():
        at = ("study", "start", i, name)
        if name not in dimensions:
            raise lines.error(
                at, f"start: nothing is called {name!r}; there is {', '.join(dimensions)}"
            )
        low, high = _ends(dimensions[name])
        if not low <= value <= high:
            raise lines.error(at, f"start: {name} is {value}; it must be from {low} to {high}")


def _ends(dimension: Dimension) -> tuple[float, float]:
    if isinstance(dimension, Choice):
        return 0, dimension.count - 1
    return dimension.low, dimension.high


def _check_plans(space: Space, scorer: Scorer) -> None:
    """Raises what is wrong with all candidates: with the lowest values of everything and with the highest."""
    first: RequestError | None = None
    for end in (0, 1):
        try:
            scorer.plan(space.filled(lambda dimension, end=end: _ends(dimension)[end]))  # type: ignore[misc]
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
