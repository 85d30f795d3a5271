"""The command that has a model's answers graded by another model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.errors import OutputError, RequestError, ScoreError
from merge.options import JSON, MEMORY, OFFLINE, TRUST, progress

if TYPE_CHECKING:
    from merge.judge.judging import Court
    from merge.judge.outcome import Comparison, Grades
    from merge.score import Candidate


@click.command("judge")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--judge-url",
    "url",
    required=True,
    help="The judge's OpenAI-compatible server, as far as /v1. A key is taken from MERGETOOL_JUDGE_KEY or "
    "OPENAI_API_KEY.",
)
@click.option("--judge-model", "judge_model", required=True, help="How the server names the judge.")
@click.option(
    "--questions",
    "sets",
    multiple=True,
    default=("en", "de"),
    show_default=True,
    help="Shipped questions (en, de), or a file of lines of JSON with id and turns.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N questions of all.")
@click.option("--single", is_flag=True, help="Grade each of two models, instead of comparing them.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/judge"),
    show_default=True,
    help="Folder of answers and grades, which are never asked for twice.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Of an answer, and of a judge's reply.",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Requests to the judge at a time.",
)
@click.option("--device", help="As torch names it.  [default: a GPU where there is one]")
@MEMORY
@TRUST
@OFFLINE
@JSON
def judge(
    models: tuple[str, ...], url: str, judge_model: str, sets: tuple[str, ...], limit: int | None,
    single: bool, output: Path, max_tokens: int, parallel: int, device: str | None, memory: str,
    trusted: bool, offline: bool, as_json: bool,
) -> None:  # fmt: skip
    """Has a MODEL's answers to open questions graded by another model, or two MODELS compared.

    Each question has two turns; a grade is 1 to 10. Two models are compared in both orders, and one wins a
    question where both orders say so. MODELS are named as in recipes and need a chat template. Killed, the
    same command goes on.

    Example: mergetool judge out/merged zoo:base --judge-url http://localhost:8000/v1 --judge-model NAME
    """
    from merge.judge.journal import alone
    from merge.judge.judging import Court
    from merge.judge.outcome import counts_of, cut_of, replies, told_comparison, told_grades
    from merge.judge.questions import questions_of
    from merge.judge.server import Server
    from merge.score import Conditions
    from merge.score.models import candidate, check_candidate

    if len(models) > 2:
        raise RequestError(f"judge takes one model or two, not {len(models)}")
    questions = questions_of(sets)[:limit]
    server = Server.at(url, judge_model, max_tokens=max_tokens)
    server.check()
    conditions = Conditions(device=device, chat_template=True, trusted=trusted, memory=memory)
    found = [candidate(name, offline=offline) for name in models]
    for each, name in zip(found, models, strict=True):
        check_candidate(each, name, conditions)
        if isinstance(each, Path) and output.resolve().is_relative_to(each.resolve()):
            what = f"lies in the folder of {name}, which is another model with every file in it"
            raise OutputError(f"--output {output}: {what}; choose another one")
    with alone(output):
        court = Court(server, questions, output, max_tokens, parallel, conditions)
        if len(models) == 2 and not single:
            comparison = _compared(court, found, models)
            results: list[Any] = [comparison]
            told, talks = told_comparison(comparison), list(comparison.talks)
        else:
            grades = _graded(court, found, models)
            results, told = list(grades), told_grades(grades)
            talks = [each.talks for each in grades]
    counts = counts_of(results)
    if counts["unreadable"] == counts["asked"]:
        raise ScoreError(
            f"{judge_model}: none of its {replies(counts['asked'])} could be read{cut_of(counts)}; "
            f"they are in {output / 'grades.jsonl'}"
        )
    if as_json:
        reports = [each.as_json() for each in results]
        report = {"judge": judge_model, "questions": len(questions), "results": reports}
        click.echo(json.dumps(report, indent=1))
        return
    click.echo(told)
    for name, talk in zip(models, talks, strict=True):
        for doubt in talk.doubts():
            click.echo(f"note: {name}: {doubt}", err=True)


def _compared(
    court: "Court", found: "Sequence[Candidate]", models: tuple[str, ...]
) -> "Comparison":
    """Both in both orders."""
    count = len(court.questions)
    with progress("answer", 2 * count) as answered, progress("judge", 2 * count) as judged:
        return court.compared(found, models, answered, judged)


def _graded(
    court: "Court", found: "Sequence[Candidate]", models: tuple[str, ...]
) -> "list[Grades]":
    """Each turn of each."""
    count, turns = len(court.questions), sum(len(q.turns) for q in court.questions)
    with (
        progress("answer", count * len(models)) as answered,
        progress("judge", turns * len(models)) as judged,
    ):
        return [
            court.graded(each, name, answered, judged)
            for each, name in zip(found, models, strict=True)
        ]
