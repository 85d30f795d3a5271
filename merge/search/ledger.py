"""What a search has tried: one row for each candidate, in a file of SQLite or on a PostgreSQL server.

The ledger and not the optimiser is the memory of a search: whoever goes on tells a new optimiser the same
values in the same order, and so is asked the same questions.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection, Engine

from merge.errors import RequestError, RunError
from merge.search.database import engine_of, opened, reason_of, storable, without_password
from merge.search.tables import CANDIDATES, LOOKS, STUDY, TABLES, enter

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
PRUNED = "pruned"  # given up before all documents were scored
ENDED = (DONE, FAILED, PRUNED)
STALE = 60.0  # seconds without a sign of life after which a worker counts as gone
LOST = 3  # workers that may be lost over a candidate before it counts as failed
ASKING = "asking"  # in the place of a split: whose turn it is to ask for that candidate
NUMBER = CANDIDATES.c.number


@dataclass(frozen=True)
class Candidate:
    """A recipe with values. `asked`: the answers that made it, by the names of their dimensions.
    `origin`: what asked for it, when `after` others had ended. `scores`: once it is done, what came of it
    (see Marks), less its answers. `ended`: its place among those that came to an end."""

    number: int
    digest: str
    origin: str
    recipe: Mapping[str, Any]
    asked: Mapping[str, float]
    after: int = 0
    state: str = WAITING
    ended: int | None = None
    scores: Mapping[str, Any] | None = None
    reason: str = ""
    seconds: float | None = None
    worker: str = ""


class Ledger:
    """The candidates of one study. Processes on any machine may share it."""

    def __init__(self, engine: Engine, study: str, within: Connection | None = None) -> None:
        self._engine, self.study, self._within = engine, study, within
        self._ended: dict[int, Candidate] = {}  # by place: they change no more

    @classmethod
    def open(cls, url: str, study: str, digest: str, facts: Mapping[str, Any]) -> "Ledger":
        """The study of that name, made where there is none; RequestError where it is another search.

        url: sqlite:///FILE or postgresql://USER@HOST/DATABASE; digest: stands for what is searched and how
        it is scored.
        """
        engine = engine_of(url)

        def made() -> None:
            TABLES.create_all(engine)
            with engine.begin() as connection:
                enter(connection, study, digest, facts)

        opened(url, made)
        return cls(engine, study)

    @classmethod
    def existing(cls, url: str, study: str) -> "Ledger":
        """A study that is there already; raises RequestError."""
        known = cls.names(url)
        if study not in known:
            raise RequestError(
                f"{without_password(url)}: has no study {study!r}; there is {', '.join(known) or 'none'}"
            )
        return cls(engine_of(url, reading=True), study)

    @staticmethod
    def names(url: str) -> list[str]:
        """Of all studies in a database; raises RequestError."""
        engine = engine_of(url, reading=True)

        def names() -> list[str]:
            with engine.begin() as connection:
                return list(connection.execute(sql.select(STUDY.c.name)).scalars())

        try:
            return opened(url, names)
        finally:
            engine.dispose()

    def close(self) -> None:
        """Lets go of the database; whoever asks again opens it anew."""
        self._engine.dispose()

    @contextmanager
    def alone(self) -> Iterator["Ledger"]:
        """The same ledger in one change, for which everybody else who wants to be alone waits."""
        with self._begun() as connection:
            mine = STUDY.c.name == self.study
            connection.execute(STUDY.update().where(mine).values(name=STUDY.c.name))
            inner = Ledger(self._engine, self.study, connection)
            inner._ended = self._ended
            yield inner

    def facts(self) -> dict[str, Any]:
        """What the study was begun with."""
        with self._begun() as connection:
            chosen = sql.select(STUDY.c.facts).where(STUDY.c.name == self.study)
            found: dict[str, Any] = json.loads(connection.execute(chosen).scalar_one())
            return found

    def remember(self, facts: Mapping[str, Any]) -> None:
        """Adds to what the study was begun with; what is there already stays."""
        with self.alone() as ledger, ledger._begun() as connection:
            text = json.dumps({**facts, **ledger.facts()})
            mine = STUDY.c.name == self.study
            connection.execute(STUDY.update().where(mine).values(facts=text))

    def all(self) -> list[Candidate]:
        """Every candidate, by number."""
        known = len(self._ended)
        new = sql.or_(CANDIDATES.c.ended.is_(None), CANDIDATES.c.ended >= known)
        with self._begun() as connection:
            found = [_candidate(row) for row in connection.execute(self._query().where(new))]
        before = [self._ended[place] for place in range(known)]
        self._ended.update({c.ended: c for c in found if c.ended is not None})
        return sorted([*before, *found], key=lambda candidate: candidate.number)

    def one(self, number: int) -> Candidate:
        """The candidate of that number."""
        with self._begun() as connection:
            return _candidate(
                connection.execute(self._query().where(CANDIDATES.c.number == number)).one()
            )

    def answers(self, number: int) -> dict[str, list[Any]] | None:
        """What the model of a candidate answered, by task; None where it was not scored."""
        chosen = self._own(sql.select(CANDIDATES.c.answers)).where(CANDIDATES.c.number == number)
        with self._begun() as connection:
            text = connection.execute(chosen).scalar_one()
        return dict(json.loads(text)) if text else None

    def add(self, candidate: Candidate) -> None:
        """Enters a new candidate; its number and digest must be new."""
        with self._begun() as connection:
            connection.execute(_new(self.study, candidate, state=WAITING))

    def take(self, worker: str) -> Candidate | None:
        """The first candidate that waits, or whose worker is silent for too long; now it is this worker's."""
        self._give_up_the_silent()
        free = CANDIDATES.c.state == WAITING
        with self._begun() as connection:
            query = self._query().where(free).order_by(NUMBER)
            for row in connection.execute(query.with_for_update(skip_locked=True)).all():
                found = _candidate(row)
                owner = {"worker": worker, "beat": self._now()}
                if self._set(connection, found.number, free, RUNNING, **owner):
                    return found
        return None

    def begin_asking(self, number: int, worker: str) -> bool:
        """Whether it is this worker's turn to ask for the candidate of that number: nobody has, and nobody is
        at it. Others may use the ledger meanwhile."""
        if not self.begin_look(number, ASKING, worker):
            return False
        with self._begun() as connection:
            entered = self._own(sql.select(NUMBER)).where(CANDIDATES.c.number == number)
            if connection.execute(entered).first() is None:
                return True
        self.end_asking(number, worker)
        return False

    def end_asking(self, number: int, worker: str, found: Candidate | None = None) -> bool:
        """Ends that turn, and enters what was `found` as the worker's; False where another has the turn by
        now, who will enter it."""
        with self._begun() as connection:
            turn = self._look(number, ASKING, worker)
            if not connection.execute(LOOKS.delete().where(turn)).rowcount:
                return False
            if found:
                owner = {"worker": worker, "beat": self._now()}
                connection.execute(_new(self.study, found, state=RUNNING, **owner))
        return True

    def beat(self, worker: str) -> None:
        """Says that the worker is alive."""
        with self._begun() as connection:
            for table, busy in (
                (CANDIDATES, CANDIDATES.c.state == RUNNING),
                (LOOKS, LOOKS.c.scores.is_(None)),
            ):
                own = sql.and_(table.c.study == self.study, table.c.worker == worker, busy)
                connection.execute(table.update().where(own).values(beat=self._now()))

    def end(
        self,
        number: int,
        worker: str,
        state: str,
        *,
        scores: Mapping[str, Any] | None = None,
        reason: str = "",
        seconds: float | None = None,
    ) -> bool:
        """Enters how a candidate came out; False where another worker has it by now."""
        own = sql.and_(CANDIDATES.c.worker == worker, CANDIDATES.c.state == RUNNING)
        rest = {key: value for key, value in (scores or {}).items() if key != "answers"}
        told = {
            "scores": json.dumps(rest) if scores is not None else None,
            "answers": json.dumps(scores["answers"]) if scores and "answers" in scores else None,
        }
        facts = {"reason": storable(reason), "seconds": seconds, **told}
        return self._ended_with(number, own, state, facts)

    def workers(self) -> set[str]:
        """Those who are at something, or were when they were cut off."""
        running = self._own(sql.select(CANDIDATES.c.worker)).where(CANDIDATES.c.state == RUNNING)
        mine = sql.and_(LOOKS.c.study == self.study, LOOKS.c.scores.is_(None))
        with self._begun() as connection:
            found = [*connection.execute(running).scalars()]
            return {*found, *connection.execute(sql.select(LOOKS.c.worker).where(mine)).scalars()}

    def release(self, worker: str | None = None, *, died: bool = False) -> None:
        """Lets go of what a worker of that name was at, or everybody.

        died: it was seen to die, and not only cut off; a candidate over which LOST workers died has failed.
        """
        whose = CANDIDATES.c.worker == worker if worker else sql.true()
        self._let_go(sql.and_(CANDIDATES.c.state == RUNNING, whose), died=died)
        looks = sql.and_(LOOKS.c.study == self.study, LOOKS.c.scores.is_(None))
        whose = LOOKS.c.worker == worker if worker else sql.true()
        with self._begun() as connection:
            connection.execute(LOOKS.delete().where(looks, whose))

    # -- looks at what the search did not see ----------------------------------------------------------

    def looks(self, split: str) -> dict[int, dict[str, Any]]:
        """What came of candidates on that split, by number."""
        chosen = sql.select(LOOKS.c.number, LOOKS.c.scores).where(
            LOOKS.c.study == self.study, LOOKS.c.split == split, LOOKS.c.scores.is_not(None)
        )
        with self._begun() as connection:
            return {number: json.loads(scores) for number, scores in connection.execute(chosen)}

    def begin_look(self, number: int, split: str, worker: str) -> bool:
        """Whether this worker is to score the candidate there: nobody has, and nobody is at it."""
        place = {"study": self.study, "number": number, "split": split}
        silent = sql.and_(
            *(LOOKS.c[key] == value for key, value in place.items()),
            LOOKS.c.scores.is_(None),
            LOOKS.c.beat < self._now() - STALE,
        )
        try:
            with self._engine.begin() as connection:
                connection.execute(LOOKS.delete().where(silent))
                connection.execute(LOOKS.insert().values(**place, worker=worker, beat=self._now()))
        except sql.exc.IntegrityError:
            return False
        except sql.exc.SQLAlchemyError as error:
            raise self._error(error) from None
        return True

    def end_look(self, number: int, split: str, worker: str, scores: Mapping[str, Any]) -> None:
        """Enters what came of a candidate on that split."""
        rest = {key: value for key, value in scores.items() if key != "answers"}
        own = self._look(number, split, worker)
        with self._begun() as connection:
            connection.execute(LOOKS.update().where(own).values(scores=json.dumps(rest)))

    # -- how ---------------------------------------------------------------------------------------------

    def _look(self, number: int, split: str, worker: str) -> Any:
        place = {"study": self.study, "number": number, "split": split, "worker": worker}
        return sql.and_(*(LOOKS.c[key] == value for key, value in place.items()))

    def _give_up_the_silent(self) -> None:
        silent = CANDIDATES.c.beat < self._now() - STALE
        self._let_go(sql.and_(CANDIDATES.c.state == RUNNING, silent))

    def _let_go(self, gone: Any, *, died: bool = False) -> None:
        """Candidates whose worker is gone wait again, or have failed; each by one change, so that whoever is
        cut off here leaves none that waits though LOST workers died."""
        with self._begun() as connection:
            found = connection.execute(self._own(sql.select(NUMBER)).where(gone)).scalars().all()
        once_more = {"lost": CANDIDATES.c.lost + int(died)}
        last = sql.and_(gone, CANDIDATES.c.lost >= LOST - 1)
        why = {"reason": f"{LOST} workers died while they tried it"}
        for number in found:
            if died and self._ended_with(number, last, FAILED, once_more | why):
                continue
            with self._begun() as connection:
                self._set(connection, number, gone, WAITING, **once_more)

    def _ended_with(self, number: int, when: Any, state: str, facts: Mapping[str, Any]) -> bool:
        """Gives a candidate its place among those that ended; False where `when` does not hold any more."""
        others = CANDIDATES.alias()
        last = sql.select(sql.func.coalesce(sql.func.max(others.c.ended), -1) + 1)
        place = last.where(others.c.study == self.study).scalar_subquery()
        while True:
            try:
                with self._engine.begin() as connection:
                    return self._set(connection, number, when, state, ended=place, **facts)
            except sql.exc.IntegrityError:  # another ended in the same moment and has the place
                continue
            except sql.exc.SQLAlchemyError as error:
                raise self._error(error) from None

    def _set(
        self, connection: Connection, number: int, when: Any, state: str, **values: Any
    ) -> bool:
        change = self._own(CANDIDATES.update().where(CANDIDATES.c.number == number, when))
        return bool(connection.execute(change.values(state=state, **values)).rowcount)

    def _query(self) -> Any:
        """Every column but the answers."""
        return self._own(sql.select(*(c for c in CANDIDATES.c if c.name != "answers")))

    def _own(self, query: Any) -> Any:
        return query.where(CANDIDATES.c.study == self.study)

    def _now(self) -> Any:
        """Seconds by the clock that all who share the ledger have: a server's, or this machine's."""
        if self._engine.dialect.name == "sqlite":
            return time.time()
        return sql.cast(sql.extract("epoch", sql.func.clock_timestamp()), sql.Float)

    @contextmanager
    def _begun(self) -> Iterator[Connection]:
        if self._within is not None:
            yield self._within
            return
        try:
            with self._engine.begin() as connection:
                yield connection
        except sql.exc.SQLAlchemyError as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> RunError:
        return RunError(f"study {self.study}: {reason_of(error)}")


def _new(study: str, candidate: Candidate, **rest: Any) -> Any:
    """The change that enters a candidate."""
    return CANDIDATES.insert().values(
        study=study,
        number=candidate.number,
        digest=candidate.digest,
        origin=candidate.origin,
        recipe=json.dumps(candidate.recipe),
        asked=json.dumps(candidate.asked),
        after=candidate.after,
        **rest,
    )


def _candidate(row: Any) -> Candidate:
    scores = json.loads(row.scores) if row.scores else None
    return Candidate(
        row.number, row.digest, row.origin, json.loads(row.recipe), json.loads(row.asked), row.after,
        row.state, row.ended, scores, row.reason or "", row.seconds, row.worker or "",
    )  # fmt: skip


def told(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that came to an end, in the order in which they did."""
    return sorted((c for c in candidates if c.ended is not None), key=lambda c: c.ended or 0)
