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
    folder = output or _place(what, is_study)
    check_ours(folder)
    report = _of_study(what, url, name) if is_study else _of_merge(what, memory, threads, offline)
    report.save(folder)
    click.echo(report.json if as_json else f"{folder / PAGE}: written")


def _place(what: str, is_study: bool) -> Path:
    if is_study and "://" not in what:
        return Path(what) / "report"
    kept = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(what).stem)
    return Path("out") / f"report-{'study' if is_study else kept}"


def _of_study(what: str, url: str | None, name: str | None) -> "Report":
    """Of the database in the folder `what`, or of the one at `url`."""
    from importlib.util import find_spec

    for library in ("sqlalchemy", "optuna"):
        if find_spec(library) is None:
            raise RequestError(f"the report of a study needs {library}; install mergetool[search]")
    from merge.report.study import read_search
    from merge.report.study_page import report_on
    from merge.search.ledger import Ledger
    from merge.search.opening import DATABASE, NAME

    folder = None if what == url else Path(what)
    if folder is not None and not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give one that a search wrote")
    place = url or f"sqlite:///{Path(what).absolute() / DATABASE}"
    known = Ledger.names(place) if name is None and url else [NAME]
    if name is None and len(known) > 1:
        raise RequestError(f"--name: which study? The database has {', '.join(known)}")
    name = name or next(iter(known), NAME)
    ledger = Ledger.existing(place, name)
    return report_on(read_search(ledger, folder.absolute().name if folder else name, folder))


def _of_merge(what: str, memory: str, threads: int | None, offline: bool) -> "Report":
    from merge.options import progress
    from merge.report.merge_page import report_on
    from merge.report.merging import measured, planned

    plan = planned(what, memory, offline)
    size = sum(operand.info.nbytes for step in plan.steps for operand in step.inputs)
    with progress("read", size) as count:
        found = measured(plan, memory, threads, count)
    return report_on(found)
