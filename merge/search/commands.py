"""The commands of searches: sweep and evolve."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.options import JSON, MEMORY, OFFLINE, THREADS

if TYPE_CHECKING:
    from merge.search.ledger import Candidate
    from merge.search.study import Outcome, Study

FAILURES = 3  # that are told
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
WRITE = click.option(
    "--write", type=click.IntRange(min=0), default=0, help="Also write the best N models."
)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (JSON, OFFLINE, THREADS, MEMORY, WRITE, SEED, MINUTES, TRIALS, OUTPUT):
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
    from merge.search.study import open_study

    file = find_recipe(recipe)
    folder = given["output"] or Path("out") / file.stem
    changes = {key: given[key] for key in ("trials", "minutes", "seed") if given[key] is not None}
    with open_study(
        file, folder, memory=given["memory"], threads=given["threads"], offline=given["offline"],
        changes=changes, sampler=sampler,
    ) as study:  # fmt: skip
        outcome = study.run(_told_live(given["as_json"]))
        outcome.save(folder)
    for candidate in outcome.top[: given["write"]]:
        _write(folder, candidate, given)
    if given["as_json"]:
        click.echo(json.dumps(outcome.as_json(), indent=1))
        return
    click.echo(leaderboard(outcome))
    for number, reason in list(outcome.failed.items())[:FAILURES]:
        click.echo(f"note: candidate {number} failed: {reason}", err=True)
    if len(outcome.failed) > FAILURES:
        click.echo(f"note: {len(outcome.failed)} failed; outcome.json has the reasons", err=True)
    if outcome.verdict:
        click.echo(outcome.verdict.words)
    if outcome.average_is_as_good:
        click.echo("the plain average of its parents is as good or better there")
    click.echo(f"{folder}: {len(outcome.top)} recipes in {folder / 'recipes'}")


def _told_live(quiet: bool) -> Callable[["Candidate", "Study"], None]:
    """A line that tells how far the search is: the best so far, the rate, the time left."""
    import sys
    import time

    if quiet or not sys.stderr.isatty():
        return lambda candidate, study: None
    started, count, best = time.monotonic(), 0, float("-inf")

    def tell(candidate: "Candidate", study: "Study") -> None:
        nonlocal count, best
        count += 1
        best = max(best, candidate.scores["mean"] if candidate.scores else best)
        rate = count / (time.monotonic() - started)
        left = study.left() / rate / 60
        said = f"best {100 * best:.1f}, {60 * rate:.0f} a minute, {left:.1f} min left"
        said = f"candidate {candidate.number}: {said}"
        click.echo(f"\r{said:<78}", nl=False, err=True)

    return tell


def _write(folder: Path, candidate: "Candidate", given: Mapping[str, Any]) -> None:
    from merge.options import progress
    from merge.pipeline import run_recipe

    recipe, output = (
        folder / part / f"candidate-{candidate.number}" for part in ("recipes", "models")
    )
    run_recipe(
        recipe.with_suffix(".yaml"), output, memory=given["memory"], threads=given["threads"],
        offline=given["offline"], progress=progress,
    )  # fmt: skip
    click.echo(f"{output}: written and verified", err=given["as_json"])


def leaderboard(outcome: "Outcome") -> str:
    """The best, the parents and their average: on what was searched, chosen with, and kept for the end."""
    rows = [["candidate", "dev", "val", "test"]]
    for candidate in (*outcome.top, *outcome.rivals):
        number = candidate.number
        name = f"{number}" if candidate.origin == "search" else candidate.origin
        mark = " *" if number == outcome.winner.number else ""
        dev, val, test = candidate.scores, outcome.val.get(number), outcome.test.get(number)
        rows.append([name, _cell(dev), _cell(val) + mark, _cell(test)])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: list[str], widths: list[int]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *rest])


def _cell(scores: Mapping[str, Any] | None) -> str:
    from merge.search.study import errors_of

    if scores is None:
        return "-"
    return f"{100 * scores['mean']:.1f} ± {100 * errors_of(scores):.1f}"
