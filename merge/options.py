"""What the commands share: their options, and the bar that shows progress."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

UNITS = {
    "score": "task",
    "routing": "text",
    "answer": "question",
    "judge": "reply",
}  # of stages that are not counted in bytes
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document for machines.")


def _a_size(context: click.Context, option: click.Parameter, value: str) -> str:
    from merge.sections import parse_size

    try:
        parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


MEMORY = click.option(
    "--memory",
    default="512MiB",
    show_default=True,
    callback=_a_size,
    help="Cap on this process's memory.",
)
THREADS = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads; default: one per core."
)
OFFLINE = click.option("--offline", is_flag=True, help="Take hub models from the cache alone.")
TRUST = click.option(
    "--trust-remote-code",
    "trusted",
    is_flag=True,
    help="Run the modelling code in the folder even where it is not what mergetool writes.",
)
OUTPUT = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Output folder, instead of the recipe's.",
)


@contextmanager
def progress(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with its pace and the time left; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from threading import Lock

    from tqdm import tqdm

    lock = Lock()
    unit = UNITS.get(stage, "B")
    with tqdm(total=total, desc=stage, unit=unit, unit_scale=unit == "B", leave=False) as bar:

        def count(n: int) -> None:
            with lock:
                bar.update(n)

        yield count
