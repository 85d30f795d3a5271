"""The command that writes a report."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.errors import RequestError
from merge.options import JSON, MEMORY, OFFLINE, THREADS

if TYPE_CHECKING:
    from merge.report.files import Report


@click.command("report")
@click.argument("what")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the report.  [default: STUDY/report, or out/report-NAME]",
)
@click.option(
    "--study", "url", metavar="URL", help="Database of the study, where several machines share it."
)
@click.option("--name", help="Of the study, in a database of several.")
@MEMORY
@THREADS
@OFFLINE
@JSON
def report_command(
    what: str, output: Path | None, url: str | None, name: str | None, memory: str,
    threads: int | None, offline: bool, as_json: bool,
) -> None:  # fmt: skip
    """Writes a page about WHAT: a study's folder or database, a recipe, or a merged model.

    Of a study: winner, parents and average with the paired test, progress, Pareto front, importance. Of a
    merge: how far its models are from the base, and where they agree, by layer and module.

    Example: mergetool report out/evolved
    """
    from merge.report.files import PAGE, check_ours
    from merge.report.pictures import check_drawing
    from merge.search.opening import DATABASE

    check_drawing()
    url = what if url is None and "://" in what else url
    is_study = url is not None or (Path(what) / DATABASE).is_file()
    name = _name_of_study(what, url, name) if is_study else None
    folder = output or _place(what, name)
    check_ours(folder)
    report = _of_study(what, url, name) if name else _of_merge(what, memory, threads, offline)
    report.save(folder)
    click.echo(report.json if as_json else f"{folder / PAGE}: written")


def _place(what: str, study: str | None) -> Path:
    """The folder of a report on `what`: on its study of that name, or (None) on a merge."""
    from merge.search.opening import NAME

    if study and "://" not in what:
        return Path(what) / "report"
    place = Path(what).absolute()
    told = study or (place.name if place.is_dir() else place.stem)  # a folder has no ending
    if study == NAME:  # as in every database of its own, which lies in the study's folder
        told = Path(what.partition(":///")[2]).absolute().parent.name
    kept = "".join(c if c.isalnum() or c in "-_" else "-" for c in told)
    return Path("out") / f"report-{kept}"


def _name_of_study(what: str, url: str | None, name: str | None) -> str:
    """The study that is meant, of the database in the folder `what` or of the one at `url`."""
    from importlib.util import find_spec

    for library in ("sqlalchemy", "optuna"):
        if find_spec(library) is None:
            raise RequestError(f"the report of a study needs {library}; install mergetool[search]")
    from merge.search.ledger import Ledger
    from merge.search.opening import NAME

    if what != url and not Path(what).is_dir():
        raise RequestError(f"{what}: no such folder; give one that a search wrote")
    known = Ledger.names(url) if name is None and url else [NAME]
    if name is None and len(known) > 1:
        raise RequestError(f"--name: which study? The database has {', '.join(known)}")
    return name or next(iter(known), NAME)


def _of_study(what: str, url: str | None, name: str) -> "Report":
    """Of the database in the folder `what`, or of the one at `url`."""
    from merge.report.reading import read_search
    from merge.report.study_page import report_on
    from merge.search.ledger import Ledger
    from merge.search.opening import DATABASE

    folder = None if what == url else Path(what)
    ledger = Ledger.existing(url or f"sqlite:///{Path(what).absolute() / DATABASE}", name)
    return report_on(read_search(ledger, folder.absolute().name if folder else name, folder))


def _of_merge(what: str, memory: str, threads: int | None, offline: bool) -> "Report":
    from merge.options import progress
    from merge.report.merge_page import report_on
    from merge.report.merged import check_models, planned
    from merge.report.merging import measured

    plan = planned(what, memory, offline)
    if Path(what).is_dir():
        check_models(plan, Path(what), memory, threads, progress)
    size = sum(operand.info.nbytes for step in plan.steps for operand in step.inputs)
    with progress("read", size) as count:
        found = measured(plan, memory, threads, count)
    return report_on(found)
