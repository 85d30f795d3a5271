"""The tables of studies: their candidates, and who looked at what the search did not see."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from merge.agreement import canonical
from merge.errors import RequestError

SHORT = 60  # characters of two values that are shown beside each other
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
    sql.Column("lost", sql.Integer, nullable=False, default=0),  # workers that were lost over it
    sql.UniqueConstraint("study", "digest"),
    sql.UniqueConstraint("study", "ended"),
)
LOOKS = sql.Table(  # at what the search did not see, each candidate once at each split; and turns to ask
    "mergetool_looks",
    TABLES,
    sql.Column("study", sql.String(200), primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("split", sql.String(10), primary_key=True),
    sql.Column("worker", sql.String(100), nullable=False),
    sql.Column("beat", sql.Float, nullable=False),
    sql.Column("scores", sql.Text),  # none: the worker is at it
)


def enter(connection: Connection, study: str, digest: str, facts: Mapping[str, Any]) -> None:
    """Makes the study where there is none of that name; raises RequestError where that is another search."""
    chosen = sql.select(STUDY.c.digest, STUDY.c.facts).where(STUDY.c.name == study)
    known = connection.execute(chosen).one_or_none()
    if known is None:
        connection.execute(
            STUDY.insert().values(name=study, digest=digest, facts=json.dumps(facts))
        )
    elif known.digest != digest:
        then = json.loads(known.facts)
        others = list(_others(then, facts))
        by = f", by its {', '.join(others)}" if others else ""
        raise RequestError(
            f"study {study!r} is another search than this one{by}; put that back or choose another --output"
        )


def _others(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What of these facts is another than it was, key by key of the tables among them."""
    for name in now:
        a, b = then.get(name), now[name]
        if name not in then or canonical(a) == canonical(b):
            continue
        if not (isinstance(a, dict) and isinstance(b, dict)):
            yield name
            continue
        for key in dict.fromkeys([*a, *b]):
            old, new = (json.dumps(each.get(key)) for each in (a, b))
            if old != new:
                short = len(old) + len(new) <= SHORT
                yield f"{name} ({key} was {old}, is {new})" if short else f"{name} ({key})"
