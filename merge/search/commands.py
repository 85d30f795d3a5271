"""The commands of searches: sweep and evolve."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.options import JSON, MEMORY, OFFLINE, THREADS

if TYPE_CHECKING:
    from merge.search.ledger import Candidate
    from merge.search.outcome import Outcome
    from merge.search.study import Placing, Study

FAILURES = 3  # that are told
WIDTH = 78  # of the line that tells how far a search is
EVERY = 30  # seconds between such lines where they stay, as in a log
LEGEND = "mean ± standard error, per cent; dev was searched on, val chose the winner (*), test chose nothing"
OUTPUT = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the study: what was tried, the best recipes.  [default: out/NAME of the recipe]",
)
TRIALS = click.option(
    "--trials", type=click.IntRange(min=1), help="Candidates beside the baselines."
)
MINUTES = click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="End after so many minutes."
)
SEED = click.option("--seed", type=int, help="Another seed draws other candidates.")
WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that try candidates side by side and share --memory and --threads.  [default: 1]",
)
STUDY = click.option(
    "--study",
    "url",
    metavar="URL",
    help="Database that several machines share: postgresql://USER@HOST/DATABASE, or sqlite:///FILE for runs "
    "side by side on one, each with an --output of its own. The same command elsewhere joins in.",
)
RAY = click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Place the workers on a Ray cluster: auto (this machine's), local, or HOST:PORT; each has all of "
    "--memory.",
)
WRITE = click.option(
    "--write", type=click.IntRange(min=0), default=0, help="Also write the best N models."
)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (JSON, OFFLINE, THREADS, MEMORY, RAY, STUDY, WORKERS, WRITE, SEED, MINUTES, TRIALS)
    for option in (*options, OUTPUT):
        command = option(command)
    return command


@click.command("evolve")
@click.argument("recipe")
@_options
def evolve(recipe: str, **given: Any) -> None:
    """Searches the values of RECIPE that make the best model, and says whether it is better than its parents.

    Values that may vary are written as {search: [low, high]} or {choice: [A, B]}. Interrupted, the same
    command goes on; a longer one (--trials, --minutes) too.

    Example: mergetool evolve evolve-quickstart --trials 60
    """
    _searched(recipe, None, given)


@click.command("sweep")
@click.argument("recipe")
@_options
def sweep(recipe: str, **given: Any) -> None:
    """Tries random candidates of RECIPE, or a grid of them, and ranks them.

    Example: mergetool sweep sweep-quickstart --trials 20 --write 1
    """
    _searched(recipe, "random", given)


def _searched(recipe: str, sampler: str | None, given: Mapping[str, Any]) -> None:
    from merge.cli import find_recipe
    from merge.search.front import words_of_front
    from merge.search.opening import open_study
    from merge.search.tried import name_of

    file = find_recipe(recipe)
    folder = given["output"] or Path("out") / file.stem
    changes = {key: given[key] for key in ("trials", "minutes", "seed") if given[key] is not None}
    placing = _placing(given["workers"], given["ray"])
    with open_study(
        file, folder, memory=given["memory"], threads=given["threads"], offline=given["offline"],
        changes=changes, sampler=sampler, url=given["url"],
    ) as study:  # fmt: skip
        with _told_live(given["as_json"]) as tell:
            outcome = study.run(tell, placing)
        outcome.save(folder)
        for candidate in outcome.top[: given["write"]]:
            _write(folder, candidate, outcome, given)
    for note in study.notes:
        click.echo(f"note: {note}", err=True)
    if given["as_json"]:
        click.echo(json.dumps(outcome.as_json(), indent=1))
        return
    click.echo(f"{leaderboard(outcome)}\n{LEGEND}")
    for number, notes in outcome.kin.items():
        for note in notes:
            click.echo(f"note: candidate {number}: {note}", err=True)
    for number, reason in list(outcome.failed.items())[:FAILURES]:
        click.echo(f"note: candidate {number} failed: {reason}", err=True)
    if len(outcome.failed) > FAILURES:
        click.echo(f"note: {len(outcome.failed)} failed; outcome.json has the reasons", err=True)
    if outcome.section.prune:
        documents = sum(outcome.saved.values())
        click.echo(f"candidates given up: {len(outcome.saved)}, documents saved: {documents}")
    if len(outcome.section.objectives) > 1:
        candidates, baselines = outcome.front
        found = words_of_front(len(candidates), [name_of(c.origin) for c in baselines])
        click.echo(f"no other one beats these in all objectives on dev: {found}")
    for said in outcome.words:
        click.echo(said)
    if outcome.winners > 1:
        what = f"this study has had {outcome.winners} winners, and each was measured on test"
        click.echo(f"{what}; who goes on until test looks good has chosen by it")
    click.echo(
        f"recipes of the best, for `mergetool run RECIPE --output FOLDER`: {folder / 'recipes'}"
    )


def _placing(workers: int | None, ray: str | None) -> "Placing | None":
    """Who tries candidates; None: this process."""
    if ray is not None:
        from merge.search.cluster import on_ray

        return on_ray(ray, workers)
    if workers is None or workers == 1:
        return None
    from merge.search.workers import on_this_machine

    return on_this_machine(workers)


@contextmanager
def _told_live(quiet: bool) -> "Iterator[Callable[[Candidate, Study], None]]":
    """A line that tells how far the search is while it is: the best so far, the rate, the time left. It is
    one line of a terminal; elsewhere there is another one now and then."""
    import sys
    import time

    from merge.search.ledger import DONE
    from merge.search.starts import is_searched

    if quiet:
        yield lambda candidate, study: None
        return
    terminal, started, count = sys.stderr.isatty(), time.monotonic(), 0
    last = started
    best = {True: float("-inf"), False: float("-inf")}  # of what is searched, of the baselines

    def tell(candidate: "Candidate", study: "Study") -> None:
        nonlocal count, last
        count += 1
        searched = is_searched(candidate.origin)
        if candidate.scores and candidate.state == DONE:
            best[searched] = max(best[searched], candidate.scores["mean"])
        now = time.monotonic()
        if not terminal and now - last < EVERY:
            return
        last, rate = now, 60 * count / (now - started)
        told = f"best {_points(best[True])}, baselines {_points(best[False])}, {rate:.0f} a minute"
        said = f"candidate {candidate.number}: {told}, {study.minutes_left(rate):.1f} min left"
        click.echo(f"\r{said:<{WIDTH}}" if terminal else said, nl=not terminal, err=True)

    try:
        yield tell
    finally:
        if terminal:
            click.echo(f"\r{'':<{WIDTH}}\r", nl=False, err=True)


def _points(mean: float) -> str:
    return f"{100 * mean:.1f}" if mean > float("-inf") else "-"


def _write(
    folder: Path, candidate: "Candidate", outcome: "Outcome", given: Mapping[str, Any]
) -> None:
    from merge.options import progress
    from merge.pipeline import run_recipe

    recipe, output = (
        folder / part / f"candidate-{candidate.number}" for part in ("recipes", "models")
    )
    run_recipe(
        recipe.with_suffix(".yaml"), output, memory=given["memory"], threads=given["threads"],
        offline=given["offline"], progress=progress, about=how_found(outcome, candidate),
    )  # fmt: skip
    click.echo(f"{output}: written and verified", err=given["as_json"])


def how_found(outcome: "Outcome", candidate: "Candidate") -> str:
    """The end of a candidate's model card: which search tried it, and how good it was there."""
    section, number = outcome.section, candidate.number
    splits = {
        "dev, which was searched on": candidate.scores,
        "val, which the best were chosen with": outcome.val.get(number),
        "test": outcome.test.get(number),
    }
    rows = [f"| {name} | {_cell(scores)} |" for name, scores in splits.items() if scores]
    kin = [f"- {note}" for note in outcome.kin.get(number, ())]
    on = f"the suite {section.suite}"
    if section.tasks:
        on = f"the tasks {', '.join(each.task for each in section.tasks)}"
    about = f"Candidate {number} of a search ({section.sampler}, seed {section.seed}) on {on}"
    return "\n".join(
        [
            f"\n## How it was found\n\n{about}; mean and standard error, per cent:\n",
            *("| documents | mean |", "|---|---|"),
            *rows,
            *(["", *kin] if kin else []),
            "",
        ]
    )


def leaderboard(outcome: "Outcome") -> str:
    """The best, the parents and their average: on what was searched, chosen with, and kept for the end; what
    each reaches in the objectives of the study, on val."""
    from merge.search.front import reached, short_names
    from merge.search.starts import is_searched

    named = list(reached(outcome.section, outcome.val[outcome.winner.number]))
    headed = [f"val {name}" for name in short_names(named)]
    rows = [["candidate", *headed, "dev", "val", "test"]]
    for candidate in (*outcome.top, *outcome.rivals):
        number = candidate.number
        name = f"{number}" if is_searched(candidate.origin) else candidate.origin
        mark = " *" if number == outcome.winner.number else ""
        dev, val, test = candidate.scores, outcome.val.get(number), outcome.test.get(number)
        values = reached(outcome.section, val).values() if val else ()
        shown = [f"{100 * value:.1f}" for value in values] or ["-"] * len(named)
        rows.append([name, *shown, _cell(dev), _cell(val) + mark, _cell(test)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: list[str], widths: list[int]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *rest])


def _cell(scores: Mapping[str, Any] | None) -> str:
    from merge.search.outcome import errors_of

    if scores is None:
        return "-"
    error = errors_of(scores)  # of one document there is none
    return f"{100 * scores['mean']:.1f}" + ("" if isnan(error) else f" ± {100 * error:.1f}")
