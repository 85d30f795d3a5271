"""Databases of studies: how they are addressed, opened, and what they say when something is wrong."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy.engine import Engine

from merge.errors import RequestError

OPENERS = 20  # times that opening gives way to others who make the same tables
DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
GIVEN_UP = 60_000  # milliseconds after which a server forgets who fell silent within a change
Found = TypeVar("Found")


def engine_of(url: str, *, reading: bool = False) -> Engine:
    """The database at sqlite:///FILE or postgresql://USER@HOST/DATABASE; raises RequestError where nothing is
    known of such databases.

    reading: it must be there, and is left as it is.
    """
    try:
        parsed = sql.make_url(url)
        parsed = parsed.set(drivername=DRIVERS.get(parsed.drivername, parsed.drivername))
        kind = parsed.get_backend_name()
        if kind == "sqlite" and parsed.database not in (None, "", ":memory:"):
            if reading and not Path(str(parsed.database)).is_file():  # SQLite would make it
                shown = without_password(url)
                raise RequestError(f"{shown}: no such file; give the database of a study")
            engine = sql.create_engine(parsed)
            sql.event.listen(engine, "connect", _patient if reading else _lasting)
            return engine
        if kind == "postgresql":
            options = f"-c idle_in_transaction_session_timeout={GIVEN_UP}"
            return sql.create_engine(parsed, pool_pre_ping=True, connect_args={"options": options})
    except ImportError:
        todo = "install mergetool[postgres]"
        raise RequestError(f"{without_password(url)}: PostgreSQL needs psycopg; {todo}") from None
    except (sql.exc.SQLAlchemyError, ValueError):
        pass
    what = "must be sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    raise RequestError(f"{without_password(url)}: is no database for a study; it {what}")


def opened(url: str, attempt: Callable[[], Found]) -> Found:
    """What `attempt` gives; once more where another made the same in the same moment; raises RequestError."""
    for left in reversed(range(OPENERS)):
        try:
            return attempt()
        except sql.exc.SQLAlchemyError as error:
            clash = isinstance(error, sql.exc.IntegrityError) or any(
                words in str(error) for words in ("already exists", "is locked")
            )
            if not left or not clash:
                raise RequestError(f"{without_password(url)}: {reason_of(error)}") from None
            time.sleep(0.05)
    raise AssertionError


def file_of(url: str) -> Path | None:
    """The file of a database of SQLite, links followed; None of any other."""
    try:
        parsed = sql.make_url(url)
    except (sql.exc.SQLAlchemyError, ValueError):
        return None
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database
    return Path(str(parsed.database)).resolve() if is_file else None


def _patient(connection: Any, _: Any) -> None:
    """SQLite: others may write meanwhile."""
    connection.execute("PRAGMA busy_timeout = 30000")


def _lasting(connection: Any, _: Any) -> None:
    """SQLite: others may write meanwhile; what is entered is on the disk."""
    _patient(connection, _)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def reason_of(error: Exception) -> str:
    """Why a database refused something, in one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300]


def storable(text: str) -> str:
    """A server takes neither zero bytes nor halves of characters."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def without_password(url: str) -> str:
    """The address of a database as it may be shown: no password, none among its options either."""
    try:
        parsed = sql.make_url(url)
    except (sql.exc.SQLAlchemyError, ValueError):
        return "the study's database"
    return parsed.set(query={}).render_as_string(hide_password=True)
