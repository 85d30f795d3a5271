"""What a search has tried: one row for each candidate, in a file of SQLite.

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

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
ENDED = (DONE, FAILED)
STALE = 60.0  # seconds without a sign of life after which a worker counts as gone

TABLES = sql.MetaData()
STUDY = sql.Table(
    "mergetool_study",
    TABLES,
    sql.Column("name", sql.String(200), primary_key=True),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("facts", sql.Text, nullable=False),
)
CANDIDATES = sql.Table(
    "mergetool_candidates",
    TABLES,
    sql.Column("study", sql.String(200), primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("origin", sql.Text, nullable=False),
    sql.Column("recipe", sql.Text, nullable=False),
    sql.Column("asked", sql.Text, nullable=False),
    sql.Column("after", sql.Integer, nullable=False),  # how many had ended when it was asked for
    sql.Column("state", sql.String(10), nullable=False),
    sql.Column("ended", sql.Integer),  # in which place it came to an end
    sql.Column("scores", sql.Text),
    sql.Column("answers", sql.Text),  # apart: they are many
    sql.Column("reason", sql.Text),
    sql.Column("worker", sql.String(100)),
    sql.Column("beat", sql.Float),
    sql.Column("seconds", sql.Float),
    sql.UniqueConstraint("study", "digest"),
    sql.UniqueConstraint("study", "ended"),
)
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

    def __init__(self, engine: Engine, study: str) -> None:
        self._engine, self.study = engine, study

    @classmethod
    def open(cls, url: str, study: str, digest: str, facts: Mapping[str, Any]) -> "Ledger":
        """The study of that name, made where there is none; RequestError where it is another search.

        url: sqlite:///FILE; digest: stands for what is searched and how it is scored.
        """
        try:
            engine = sql.create_engine(url)
            if engine.dialect.name == "sqlite":
                sql.event.listen(engine, "connect", _patient)
            TABLES.create_all(engine)
            with engine.begin() as connection:
                _enter(connection, study, digest, facts)
        except (sql.exc.SQLAlchemyError, ImportError) as error:
            raise RequestError(f"{_without_password(url)}: {_reason(error)}") from None
        return cls(engine, study)

    @classmethod
    def existing(cls, url: str, study: str) -> "Ledger":
        """A study that is there already; raises RequestError."""
        try:
            engine = sql.create_engine(url)
            if engine.dialect.name == "sqlite":
                sql.event.listen(engine, "connect", _patient)
            with engine.begin() as connection:
                known = connection.execute(sql.select(STUDY.c.name)).scalars().all()
        except (sql.exc.SQLAlchemyError, ImportError) as error:
            raise RequestError(f"{_without_password(url)}: {_reason(error)}") from None
        if study not in known:
            names = ", ".join(known) or "none"
            raise RequestError(
                f"{_without_password(url)}: has no study {study!r}; there is {names}"
            )
        return cls(engine, study)

    def facts(self) -> dict[str, Any]:
        """What the study was begun with."""
        with self._begun() as connection:
            chosen = sql.select(STUDY.c.facts).where(STUDY.c.name == self.study)
            found: dict[str, Any] = json.loads(connection.execute(chosen).scalar_one())
            return found

    def all(self) -> list[Candidate]:
        """Every candidate, by number."""
        with self._begun() as connection:
            return list(map(_candidate, connection.execute(self._query().order_by(NUMBER))))

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
            connection.execute(
                CANDIDATES.insert().values(
                    study=self.study,
                    number=candidate.number,
                    digest=candidate.digest,
                    origin=candidate.origin,
                    recipe=json.dumps(candidate.recipe),
                    asked=json.dumps(candidate.asked),
                    after=candidate.after,
                    state=WAITING,
                )
            )

    def take(self, worker: str) -> Candidate | None:
        """The first candidate that waits, or whose worker is silent for too long; now it is this worker's."""
        with self._begun() as connection:
            late = sql.and_(CANDIDATES.c.state == RUNNING, CANDIDATES.c.beat < time.time() - STALE)
            free = sql.or_(CANDIDATES.c.state == WAITING, late)
            query = self._query().where(free).order_by(NUMBER)
            for row in connection.execute(query.with_for_update(skip_locked=True)).all():
                found = _candidate(row)
                if self._set(
                    connection, found.number, free, RUNNING, worker=worker, beat=time.time()
                ):
                    return found
        return None

    def beat(self, number: int, worker: str) -> bool:
        """Says that the worker is alive; False where the candidate is not its own any more."""
        with self._begun() as connection:
            return self._set(
                connection, number, CANDIDATES.c.worker == worker, RUNNING, beat=time.time()
            )

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
        others = CANDIDATES.alias()
        last = sql.select(sql.func.coalesce(sql.func.max(others.c.ended), -1) + 1)
        place = last.where(others.c.study == self.study).scalar_subquery()
        rest = {key: value for key, value in (scores or {}).items() if key != "answers"}
        told = {
            "scores": json.dumps(rest) if scores is not None else None,
            "answers": json.dumps(scores["answers"]) if scores and "answers" in scores else None,
        }
        while True:
            try:
                with self._engine.begin() as connection:
                    facts = {"reason": reason, "seconds": seconds, "ended": place}
                    return self._set(connection, number, own, state, **facts, **told)
            except sql.exc.IntegrityError:  # another ended in the same moment and has the place
                continue
            except sql.exc.SQLAlchemyError as error:
                raise RunError(f"study {self.study}: {_reason(error)}") from None

    def release(self, worker: str | None = None) -> None:
        """Lets go of what a worker of that name had begun, or every worker: it is gone."""
        whose = sql.true() if worker is None else CANDIDATES.c.worker == worker
        gone = sql.and_(whose, CANDIDATES.c.state == RUNNING)
        with self._begun() as connection:
            connection.execute(self._own(CANDIDATES.update().where(gone)).values(state=WAITING))

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

    @contextmanager
    def _begun(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sql.exc.SQLAlchemyError as error:
            raise RunError(f"study {self.study}: {_reason(error)}") from None


def _enter(connection: Connection, study: str, digest: str, facts: Mapping[str, Any]) -> None:
    chosen = sql.select(STUDY.c.digest).where(STUDY.c.name == study)
    known = connection.execute(chosen).scalar()
    if known is None:
        connection.execute(
            STUDY.insert().values(name=study, digest=digest, facts=json.dumps(facts))
        )
    elif known != digest:
        raise RequestError(
            f"study {study!r}: is another search (other recipe, suite or settings) than this one; choose "
            "another --output"
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


def _patient(connection: Any, _: Any) -> None:
    """SQLite: others may write meanwhile; what is entered is on the disk."""
    connection.execute("PRAGMA busy_timeout = 30000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300]


def _without_password(url: str) -> str:
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except sql.exc.SQLAlchemyError:
        return "the study's database"
