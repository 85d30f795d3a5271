"""The command that scores models."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from merge.errors import RequestError
from merge.options import JSON, MEMORY, OFFLINE, THREADS, TRUST, progress

if TYPE_CHECKING:
    from merge.score.results import Scores

# what a run of EuroEval is told; it knows nothing like the other options
OF_EUROEVAL = ("models", "tasks", "backend", "device", "program", "trusted", "offline", "as_json")


def _batch_size(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    if value is None or value == "auto":
        return value
    if value.isdecimal() and int(value):
        return int(value)
    raise click.BadParameter(f"{value!r} is neither a number of documents nor auto")


@click.command("score")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--suite",
    "-s",
    help="A shipped suite, a folder with suite.yaml, or a file.  [default: quickstart]",
)
@click.option(
    "--tasks",
    "-t",
    multiple=True,
    help="Instead of a suite: tasks, groups or tags of lm-eval, separated by commas; NAME=METRIC or "
    "NAME=METRIC:FILTER says what counts, else the first metric does.",
)
@click.option(
    "--include",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    help="A folder with task files of your own for --tasks.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Only the first N documents of each task."
)
@click.option(
    "--num-fewshot",
    type=click.IntRange(min=0),
    help="Solved examples before each document, instead of what suite and task say; a task that says 0 "
    "keeps it.",
)
@click.option(
    "--apply-chat-template", "chat", is_flag=True, help="Put prompts as chats, examples as turns."
)
@click.option("--batch-size", callback=_batch_size, help="Documents at once, or auto.")
@click.option(
    "--samples",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A new file for what each model answered to each document, a line of JSON each.",
)
@click.option(
    "--backend",
    type=click.Choice(["hf", "vllm", "euroeval"]),
    default="hf",
    show_default=True,
    help="What runs the models: transformers, vLLM where it is installed, or EuroEval, whose data sets "
    "--tasks names then.",
)
@click.option("--device", help="As torch names it.  [default: a GPU where there is one]")
@click.option(
    "--euroeval",
    "program",
    envvar="MERGETOOL_EUROEVAL",
    help="The euroeval program, in an environment of its own.  [default: euroeval]",
)
@click.option(
    "--split",
    type=click.Choice(["heldout", "search"]),
    default="heldout",
    show_default=True,
    help="The suite's tasks for reporting, or those that searches may look at.",
)
@MEMORY
@THREADS
@TRUST
@OFFLINE
@JSON
def score(
    models: tuple[str, ...], suite: str | None, tasks: tuple[str, ...], include: tuple[Path, ...],
    limit: int | None, num_fewshot: int | None, chat: bool, batch_size: Any, samples: Path | None,
    backend: Any, device: str | None, program: str | None, split: str, memory: str,
    threads: int | None, trusted: bool, offline: bool, as_json: bool,
) -> None:  # fmt: skip
    """Scores MODELS side by side with lm-evaluation-harness, with standard errors.

    MODELS are named as in recipes: a folder, zoo:NAME, a hub id, or model+adapter, which is merged in memory.

    Example: mergetool score zoo:base out/quickstart --suite quickstart
    """
    from merge.score import Conditions, Suite, score_models, tasks_by_name
    from merge.score.harness import quiet_libraries
    from merge.score.models import candidate

    models = tuple(dict.fromkeys(models))  # one that is named twice is scored once
    if backend != "euroeval" and _is_typed(click.get_current_context(), "program"):
        raise RequestError("--euroeval is for --backend euroeval; give both or neither")
    if tasks and (suite or split != "heldout"):
        raise RequestError("--tasks and --suite (or its --split) are both given; keep one")
    if include and not tasks:
        raise RequestError("--include is for --tasks; a suite has its tasks in its folder")
    names = [name.strip() for each in tasks for name in each.split(",") if name.strip()]
    if backend == "euroeval":
        _refuse_others(click.get_current_context())
        _say(_by_euroeval(models, names, program, device, trusted, offline), as_json)
        return
    harness = None
    if tasks:
        with quiet_libraries():
            opened, harness = tasks_by_name(names, include)
    else:
        opened = Suite.named(suite or "quickstart", split=split)
    conditions = Conditions(
        limit, num_fewshot, chat, batch_size, backend, device, trusted, memory, threads
    )
    found = [candidate(m, offline=offline) for m in models]
    with progress("score", len(models) * len(opened.tasks)) as count:
        scores = score_models(
            found, opened, labels=list(models), conditions=conditions, harness=harness,
            samples=samples, progress=count,
        )  # fmt: skip
    _say(scores, as_json)


def _refuse_others(context: click.Context) -> None:
    """Raises RequestError for an option that EuroEval would not be told."""
    for option in context.command.params:
        name = str(option.name)
        if name not in OF_EUROEVAL and _is_typed(context, name):
            what = f"{option.opts[0]} is not for EuroEval, which asks as its leaderboards do"
            raise RequestError(f"--backend euroeval: {what}; leave it out")


def _is_typed(context: click.Context, name: str) -> bool:
    """Whether an option stands in the command, and not only in the environment or among the defaults."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _by_euroeval(
    models: tuple[str, ...], names: list[str], program: str | None, device: str | None,
    trusted: bool, offline: bool,
) -> "Scores":  # fmt: skip
    from merge.score.euroeval import score_by_euroeval
    from merge.score.models import candidate

    found = []
    for label in models:
        folder = candidate(label, offline=offline)
        if not isinstance(folder, Path):
            raise RequestError(f"{label}: EuroEval scores folders alone; merge the adapter first")
        found.append(folder)
    return score_by_euroeval(
        found, list(models), names, program=program or "euroeval", device=device, trusted=trusted
    )


def _say(scores: "Scores", as_json: bool) -> None:
    from merge.score.results import table

    if as_json:
        click.echo(json.dumps(scores.as_json(), indent=1))
        return
    click.echo(table(scores))
    for note in scores.notes():
        click.echo(f"note: {note}", err=True)
