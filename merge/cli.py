"""The `mergetool` command. Everything heavy is imported by the command that needs it."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from merge.errors import MergetoolError, RequestError
from merge.experts.commands import routing_command, train_router_command
from merge.judge.command import judge
from merge.options import JSON, MEMORY, OFFLINE, OUTPUT, THREADS, TRUST, progress
from merge.printing import printable
from merge.report.commands import report_command
from merge.score.command import score
from merge.search.commands import evolve, sweep
from merge.tokens.codes import CODES

if TYPE_CHECKING:
    from merge.plan import Plan
    from merge.sources.model import Model
    from merge.tokens.findings import Finding


class _Group(click.Group):
    """Prints an error as one line and exits with its code; --debug shows the traceback."""

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **more)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            _exit(error.format_message(), error.exit_code)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            about = error.ctx.command_path if error.ctx else "mergetool"
            _exit(f"{error.format_message()} ({about} --help tells more)", error.exit_code)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _exit("interrupted; the same command goes on from here", 130)
        except Exception as error:
            if context.params.get("debug"):
                raise
            if isinstance(error, MergetoolError):
                _exit(str(error), error.exit_code)
            _exit(
                f"unexpected {type(error).__name__}: {error}; --debug before the command shows where",
                1,
            )


def _exit(message: str, code: int) -> NoReturn:
    click.echo("mergetool: " + " ".join(message.splitlines()), err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mergetool")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Merges models: recipe -> plan -> stream -> write -> verify -> score.

    Example: mergetool run recipe.yaml --output out/merged
    """


@main.command("run")
@click.argument("recipe")
@OUTPUT
@MEMORY
@THREADS
@OFFLINE
@click.option(
    "--overwrite", is_flag=True, help="Replace another model in the output folder, once done."
)
@click.option("--restart", is_flag=True, help="Discard an interrupted run instead of going on.")
@click.option(
    "--score/--no-score",
    "wanted",
    default=None,
    help="Score the result, or not, whatever the recipe says.",
)
@JSON
def run_command(
    recipe: str, output: Path | None, memory: str, threads: int | None, offline: bool,
    overwrite: bool, restart: bool, wanted: bool | None, as_json: bool,
) -> None:  # fmt: skip
    """Merges what RECIPE asks for, verifies the result and scores it where the recipe says so.

    RECIPE is a file, or the name of a shipped recipe. Interrupted, the same command goes on.

    Example: mergetool run quickstart --output out/quickstart
    """
    from merge.pipeline import run_recipe

    file = find_recipe(recipe)
    scoring = _scoring_wanted(file, wanted)
    result = run_recipe(
        file, output, memory=memory, threads=threads, restart=restart,
        overwrite=overwrite, offline=offline, progress=progress, planned=_scorable(scoring),
    )  # fmt: skip
    report: dict[str, Any] = {
        "output": str(result.folder),
        "existed": result.existed,
        "taken_up": result.taken_up,
        "plan": result.plan.digest,
        "verified": result.verified,
        "notes": [*result.plan.notes, *result.plan.unseen, *result.notes],
        "rows_made": result.rows_made,
    }
    if not as_json:
        _say_notes(result.plan, *result.notes)
        click.echo(_said_result(result))
        if result.rows_made:
            click.echo(_said_rows(result.rows_made))
    if scoring is not None:
        scores = _scored_beside_parents(result, *scoring, memory, offline)
        report["scores"] = scores.as_json()
        if not as_json:
            from merge.score import table

            click.echo(table(scores))
            for note in scores.notes():
                click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps(report, indent=1))


def _scoring_wanted(file: Path, wanted: bool | None) -> tuple[Any, Any] | None:
    """The score section and its suite, or None; a suite that cannot run is refused before the merge."""
    from merge.recipe import load_recipe
    from merge.score.wanted import suite_of
    from merge.sections import ScoreSection

    sections = load_recipe(file).sections
    section = sections.score or (ScoreSection() if wanted else None)
    if section is None or wanted is False:
        return None
    if sections.adapter:
        todo = "merge it into its base (model: base+adapter) and score that"
        raise RequestError(f"{file}: --score: the result is an adapter; {todo}")
    if sections.experts and sections.format == "peft":
        todo = "score the same experts in the routed format"
        raise RequestError(f"{file}: --score: the result is a folder of adapters; {todo}")
    return section, suite_of(section, file)


def _scorable(scoring: tuple[Any, Any] | None) -> "Callable[[Plan], None]":
    """Refuses a plan whose result or parents cannot be scored as they shall be."""
    if scoring is None:
        return lambda plan: None
    from merge.score.wanted import check_scorable

    return lambda plan: check_scorable(plan, scoring[0])


def _said_result(result: Any) -> str:
    done = "written and verified"
    if result.taken_up:
        done += f" (went on after {result.taken_up} of {len(result.plan.steps)} tensors)"
    if result.existed:
        done = "is this merge already; verified"
    facts = result.verified
    size = f"{facts['tensors']} tensors, {_bytes(facts['bytes'])}"
    if "layers" in facts:
        size += f"; an adapter of {facts['layers']} modules that misses {facts['error']:.2%} of the change"
    return f"{result.folder}: {done}: {size}"


def _said_rows(rows_made: "Sequence[dict[str, Any]]") -> str:
    """One line about rows that no model had."""
    told = []
    for made in rows_made:
        error, donor = made["median_error"], made.get("donor")
        measured = "" if error is None else f", median error {error:.2f} on tokens held out"
        how = made["how"] + (f" from {donor}" if donor else "")
        told.append(f"{made['rows']} of {made['tensor']} of {made['model']} by {how}{measured}")
    return f"rows made: {'; '.join(told)}"


def _scored_beside_parents(
    result: Any, section: Any, suite: Any, memory: str, offline: bool
) -> Any:
    from merge.score.wanted import scored_beside_parents

    parents = [model for model in result.plan.models if section.parents and not model.computed]
    count = 1 + len(parents)
    with progress("score", count * len(suite.tasks)) as counted:
        return scored_beside_parents(
            result, section, suite, memory=memory, offline=offline, progress=counted
        )


@main.command("plan")
@click.argument("recipe")
@OUTPUT
@MEMORY
@THREADS
@OFFLINE
@click.option(
    "--tensor",
    "tensors",
    multiple=True,
    help="Show the parameters of tensors whose name contains this.",
)
@JSON
def plan_command(
    recipe: str, output: Path | None, memory: str, threads: int | None, offline: bool,
    tensors: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Shows what `run` would do with RECIPE, reading headers only and writing nothing.

    Example: mergetool plan recipe.yaml --memory 2GiB --tensor layers.3.mlp
    """
    from merge.output import free_bytes
    from merge.pipeline import budget_of, plan_recipe
    from merge.plan import output_folder

    plan = plan_recipe(find_recipe(recipe), memory=memory, offline=offline, peek=True)
    budget = budget_of(plan, memory, threads)
    where = output or plan.recipe.sections.output
    folder = output_folder(plan.recipe, output) if where else Path()
    chosen = [s for s in plan.steps if any(t in s.name for t in tensors)]
    if tensors and not chosen:
        raise RequestError(f"{recipe}: no tensor's name contains {' or '.join(tensors)!r}")
    facts = {
        "method": plan.recipe.method.name,
        "models": [m.label for m in plan.models],
        "steps": len(plan.steps),
        "read_bytes": plan.read_bytes,
        "write_bytes": None if plan.recipe.sections.adapter else plan.write_bytes,
        "peak_bytes": budget.peak,
        "free_bytes": free_bytes(folder),
        "threads": budget.threads,
        "plan": plan.digest,
        "notes": [*plan.notes, *plan.unseen],
    }
    shown = {
        s.name: {
            "shape": s.shape,
            "dtype": s.dtype,
            "inputs": [[plan.models[o.model].label, o.tensor] for o in s.inputs],
            "parameters": dict(s.parameters),
        }
        for s in chosen
    }
    if as_json:
        click.echo(json.dumps(facts | ({"tensors": shown} if tensors else {}), indent=1))
        return
    _say_plan(plan, facts, str(folder) if where else "no output yet", memory)
    for step in chosen:
        values = ", ".join(f"{k}={v}" for k, v in step.parameters.items())
        how = "copied" if step.copy else f"{step.method.name}: {values}"
        origins = dict.fromkeys(o.tensor for o in step.inputs if o.tensor != step.name)
        of = f" of {', '.join(origins)}" if origins else ""
        click.echo(f"{step.name} {list(step.shape)} {step.dtype}: {how}{of}")


def _say_plan(plan: "Plan", facts: dict[str, Any], place: str, memory: str) -> None:
    based = any(piece.task_vectors for piece in plan.recipe.slices)
    count = sum(not model.computed for model in plan.models) - based
    models = f"{count} model{'s' * (count != 1)}{' on a base' if based else ''}"
    what = f"{facts['method']} of {models}"
    if plan.recipe.mixes:
        from merge.experts.telling import names_of, told_routing

        what = f"mixture of {', '.join(names_of(plan))}"
    click.echo(f"{what}, {len(plan.steps)} tensors")
    if plan.recipe.mixes:
        click.echo(f"  {told_routing(plan)}")
    for i, model in enumerate(plan.models):
        between = "  (merged on the way)" if model.label in plan.recipe.stages else "  (computed)"
        role = "  (base)" if i == plan.base else between if model.computed else ""
        click.echo(f"  {model.label}{role}")
    free, peak = _bytes(facts["free_bytes"]), f"{facts['peak_bytes'] / 2**20:.0f} MiB"
    click.echo(f"reads          {_bytes(plan.read_bytes)}")
    adapter = plan.recipe.sections.adapter
    rank = f" of rank {adapter.rank} at most" if adapter and adapter.rank else ""
    what = f"an adapter{rank}" if adapter else _bytes(plan.write_bytes)
    click.echo(f"writes         {what} to {place}; {free} free")
    click.echo(f"projected peak {peak} with {facts['threads']} threads (cap {memory})")
    _say_notes(plan)


@main.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--load",
    is_flag=True,
    help="Also load it with transformers: every tensor in its place, finite outputs.",
)
@TRUST
@JSON
def verify_command(folder: Path, load: bool, trusted: bool, as_json: bool) -> None:
    """Checks that a written model in FOLDER is whole: every tensor against its digest.

    Example: mergetool verify out/merged --load
    """
    from merge.experts.checks.loading import check_loads
    from merge.verify import verify_folder

    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    with progress("verify", size) as count:
        facts = verify_folder(folder, progress=count)
    if load:
        facts |= check_loads(folder, trusted=trusted)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(
        f"{folder}: {facts['tensors']} tensors, {_bytes(facts['bytes'])}, digests: {facts['digests']}"
    )
    if load:
        click.echo(f"{folder}: {_said_loading(facts)}")


def _said_loading(facts: dict[str, Any]) -> str:
    what = f"loads as {facts['loads_as']}; no tensor missing, none unexpected"
    if not facts["compared"]:
        return f"{what}; names and shapes alone: the free memory does not hold its values"
    return f"{what}, every bit in its place" + (
        "; its outputs are finite" if facts["forward"] else ""
    )


def _told_codes() -> str:
    width = max(map(len, CODES))
    return "\b\nCodes:\n" + "\n".join(f"  {code:{width}}  {text}" for code, text in CODES.items())


@main.command("doctor", epilog=_told_codes())
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--load/--no-load",
    default=True,
    help="Ask transformers to load the tokenizers, or not: that takes seconds.",
)
@OFFLINE
@JSON
def doctor_command(models: tuple[str, ...], load: bool, offline: bool, as_json: bool) -> None:
    """Finds what is wrong with the tokens of MODELS, of each and as parents of one merge.

    MODELS are named as in recipes: a folder (a merge too), zoo:NAME, a hub id, model+adapter. Vocabularies,
    end tokens, chat templates, embeddings and configs are compared; exit code 1 where there are errors.

    Example: mergetool doctor ./leo ./disco
    """
    from merge.tokens.doctor import diagnosed, recipe_lines

    opened = [_opened(name, offline) for name in dict.fromkeys(models)]
    findings = diagnosed(opened, load=load)
    lines = recipe_lines(findings)
    if as_json:
        listed = [asdict(finding) for finding in findings]
        click.echo(json.dumps({"models": models, "findings": listed, "fix": lines}, indent=1))
    else:
        _say_findings(findings, lines)
    sys.exit(int(any(finding.severity == "error" for finding in findings)))


def _opened(name: str, offline: bool) -> "Model":
    from functools import partial

    from merge.sources import hub
    from merge.sources.opening import open_model

    fetch, fetch_adapter = (partial(f, offline=offline) for f in (hub.fetch, hub.fetch_adapter))
    return open_model(name, fetch=fetch, fetch_adapter=fetch_adapter)


def _say_findings(findings: "Sequence[Finding]", lines: str) -> None:
    colours = {"error": "red", "warning": "yellow"}
    for f in findings:
        severity = click.style(f"{f.severity:7}", fg=colours[f.severity])
        told = f"{f.code}  {', '.join(f.models)}: {f.what}"
        # names and settings come from files that others wrote
        click.echo(f"{severity} {printable(told)}")
    if not findings:
        click.echo("no findings")
    if lines:
        click.echo(f"\nTo resolve, add to the recipe:\n\n{lines}", nl=False)


@main.command("methods")
@click.argument("name", required=False)
@JSON
def methods_command(name: str | None, as_json: bool) -> None:
    """Lists the merge methods, or documents one from its signature.

    Example: mergetool methods ties
    """
    from merge.methods import REQUIRED, all_methods

    methods = all_methods()
    if name is not None and name not in methods:
        from merge.lines import nearest

        what = f"no merge method {name!r}{nearest(name, list(methods))}"
        raise RequestError(f"{what}; there are {', '.join(methods)}")
    chosen = [methods[name]] if name else list(methods.values())
    if as_json:
        click.echo(json.dumps([_method_facts(m) for m in chosen], indent=1))
        return
    for found in chosen:
        if name is None:
            click.echo(f"{found.name:16} {found.summary}")
            continue
        click.echo(f"{found.name}\n\n{found.text}\n")
        click.echo(click.wrap_text(f"When it helps: {found.when}", 100) + "\n")
        if found.paper:
            click.echo(f"Paper: {found.paper}\n")
        for p in found.parameters.values():
            default = "required" if p.default is REQUIRED else f"default {json.dumps(p.default)}"
            scope = "per model" if p.per_model else "for all"
            click.echo(f"  {p.name:20} {p.allowed}, {scope}, {default}\n{'':23}{p.text}")


def _method_facts(method: Any) -> dict[str, Any]:
    from merge.methods import REQUIRED

    return {
        "name": method.name,
        "text": method.text,
        "when": method.when,
        "paper": method.paper,
        "base": method.base,
        "parameters": [
            {
                "name": p.name,
                "allowed": p.allowed,
                "per_model": p.per_model,
                "required": p.default is REQUIRED,
            }
            | ({} if p.default is REQUIRED else {"default": p.default})
            | {"text": p.text}
            for p in method.parameters.values()
        ],
    }


main.add_command(score)
main.add_command(judge)
main.add_command(evolve)
main.add_command(sweep)


def find_recipe(name: str) -> Path:
    """A recipe file, or a shipped recipe by its name."""
    from merge.shipped import shipped_recipes

    if Path(name).is_file() or name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    known = shipped_recipes()
    if name not in known:
        raise RequestError(
            f"{name}: no such file, and no shipped recipe of that name; there are {', '.join(known)}"
        )
    return known[name]


def _say_notes(plan: "Plan", *more: str) -> None:
    for note in (*plan.notes, *plan.unseen, *more):
        click.echo(f"note: {note}", err=True)


def _bytes(size: int) -> str:
    from merge.output import shown_bytes

    return shown_bytes(size)


main.add_command(routing_command)
main.add_command(train_router_command)
main.add_command(report_command)

if __name__ == "__main__":
    main()
