"""From a recipe that may vary to its study: what can be wrong is found before anything is written."""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge.agreement import canonical
from merge.errors import OutputError, RequestError
from merge.lines import load_documents, nearest
from merge.score import check_installed
from merge.search import LOCK
from merge.search.asking import sampler_for
from merge.search.automerger import expanded
from merge.search.checks import (
    check_documents,
    check_layers,
    check_objectives,
    check_plans,
    opened_of,
)
from merge.search.database import file_of
from merge.search.genome import converted, layers_of
from merge.search.ledger import Ledger
from merge.search.parents import check_parents, parents_facts
from merge.search.scoring import Scorer
from merge.search.sections import OF_SEVERAL, StudySection
from merge.search.space import WAYS, Space, varying
from merge.search.starts import check_starts, with_recipes, with_values
from merge.search.study import Setup, Study
from merge.search.tasks import with_metrics
from merge.search.tried import parents_of
from merge.sections import read_section
from merge.write import writing

DATABASE = "study.db"
NAME = "study"  # in a database of its own: it may be moved
LONGER = {"trials", "minutes", "documents", "top"}  # what a study may go on with otherwise
ASKED_BY = ("optuna", "cmaes")
TABLES = ("study", "variants", "preset", "genome")  # that searches alone have


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

    folder: keeps its database and outcome, and is made once the recipe is known to be right. changes: to its
    `study` section. sampler: where that names none; None: one that suits what varies. url: of a database that
    runs on this machine and others share, each with a folder of its own, in the place of the folder's.
    """
    here = f"sqlite:///{folder.absolute() / DATABASE}"
    setup = Setup(
        file, changes or {}, sampler, memory, threads, offline, url or here, url is not None, Path.cwd()
    )  # fmt: skip
    if (folder / "config.json").exists():
        raise OutputError(f"{folder}: holds a model; choose another --output")
    if url and (folder / DATABASE).exists() and file_of(url) != (folder / DATABASE).resolve():
        what = "holds a search with a database of its own, and --study names another"
        raise OutputError(f"{folder}: {what}; choose another --output")
    prepared = _prepared(setup)
    shared = _entered(setup, *prepared) if url else None  # first: it may be out of reach
    with _alone(folder):
        study = shared or _entered(setup, *prepared)
        with closing(study.ledger):
            yield study


def joined(setup: Setup) -> Study:
    """The same study, opened by one of its workers; raises RequestError where it is another one here."""
    return _entered(setup, *_prepared(setup))


def _prepared(setup: Setup) -> tuple[Space, StudySection, Scorer]:
    """Everything that can be wrong with a search is found here; nothing is written."""
    space, section = read_space(setup.file, setup.changes, setup.sampler, offline=setup.offline)
    _check_search_installed()
    section = with_metrics(section, space.lines)
    scorer = Scorer(setup.file, section, setup.memory, setup.threads, setup.offline)
    check_objectives(section, scorer, space.lines)
    check_documents(section, space, scorer)
    check_layers(space, scorer)
    check_plans(space, scorer, setup.memory, setup.threads)
    return space, section, scorer


def _entered(setup: Setup, space: Space, section: StudySection, scorer: Scorer) -> Study:
    """The study with its ledger; raises RequestError where that is of another search, or of other parents."""
    kept = section.model_dump(mode="json", exclude=LONGER)
    documents = {name: panel.digest for name, panel in scorer.panels.items()}
    facts = {"recipe": space.data, "study": kept, "documents": documents}
    digest = hashlib.sha256(canonical(facts).encode()).hexdigest()
    name = f"{setup.file.stem[:100]}-{digest[:12]}" if setup.shared else NAME
    ledger = Ledger.open(setup.url, name, digest, facts | {"begun_with": _versions()})
    opened_of(parents_of(space.data), scorer)  # beside those of recipes to start from
    models = dict(scorer.opened)
    if "parents" not in ledger.facts():
        ledger.remember(parents_facts(models))
    check_parents(models, ledger.facts(), f"study {name!r}")
    return Study(setup, space, section, ledger, scorer)


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
    for key in data:
        if meant := "" if key in TABLES else nearest(str(key), TABLES, 0.8):
            raise lines.error((key,), f"unknown key {key!r}{meant}")
    given = data.pop("study", None)
    if given is not None and not isinstance(given, dict):
        raise lines.error(("study",), "study must be a table of keys")
    section = read_section(StudySection, {**(given or {}), **changes}, lines, ("study",))
    if varying(data) is None:
        meant = next(filter(None, (nearest(key, WAYS, 0.8) for key in _keys(data))), "")
        what = f"nothing in it may vary{meant}; put {{search: [low, high]}} in the place of a value"
        raise lines.error((), what)
    space = Space(data, lines)
    dimensions = {dimension.name: dimension for dimension in space.dimensions()}
    section = with_values(with_recipes(section, file, lines), space)
    check_starts(section, dimensions, lines)
    several = len(section.objectives)
    chosen = section.sampler or sampler or sampler_for(space, several)
    if several == 1 and section.prune:
        what = "prune and objectives are both given; candidates are given up by the mean over all tasks"
        raise lines.error(("study", "prune"), what)
    if several > 1 and section.prune:
        what = "prune and several objectives are both given; worse in one may be better in another"
        raise lines.error(("study", "prune"), what)
    if several > 1 and chosen not in OF_SEVERAL:
        what = f"sampler is {chosen}, which knows one objective; with several it must be one of"
        raise lines.error(("study", "sampler"), f"{what} {', '.join(OF_SEVERAL)}")
    return space, section.model_copy(update={"sampler": chosen})


def _keys(value: Any) -> Iterator[str]:
    """Those of all tables in a document."""
    if isinstance(value, dict):
        yield from (str(key) for key in value)
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list):
            yield from _keys(each)


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
