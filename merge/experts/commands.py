"""Commands about mixtures; everything heavy is imported by the command that needs it."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from merge.options import JSON, TRUST, progress

TEXT = click.option(
    "--text",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Texts, one a line, or .jsonl with text, or with prompt and completion; a folder of such files; "
    "zoo:texts. May be repeated.",
)


@click.command("routing")
@click.argument("folder", type=click.Path(path_type=Path))
@TEXT
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N texts of each file.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw a heat map, as PNG, PDF or SVG.",
)
@TRUST
@JSON
def routing_command(
    folder: Path, files: tuple[Path, ...], limit: int | None, plot: Path | None, trusted: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Shows which experts of the mixture in FOLDER the tokens of texts go to, layer by layer.

    FOLDER is a mixture of LoRAs or a stock MoE. Files stand side by side: of each the share that every expert
    has, how far the largest is from a fair one, and the entropy of the shares.

    Example: mergetool routing out/mix --text poems.txt --text code.txt --plot routing.png
    """
    from merge.experts.routers.showing import check_plot, draw, tables
    from merge.experts.routers.traffic import traffic_of
    from merge.experts.texts import read_texts, text_files

    if plot:
        check_plot(plot)
    found = text_files(files)
    names = [file.name for file in found]
    labels = [n if names.count(n) == 1 else str(f) for n, f in zip(names, found, strict=True)]
    texts = {label: read_texts([f])[:limit] for label, f in zip(labels, found, strict=True)}
    with progress("routing", sum(map(len, texts.values()))) as count:
        traffic = traffic_of(folder, texts, trusted=trusted, progress=count)
    click.echo(json.dumps(traffic.as_json(), indent=1) if as_json else tables(traffic))
    if plot:
        draw(traffic, plot)
        click.echo(f"{plot}: the shares of all experts in every layer", err=as_json)


@click.command("train-router")
@click.argument("folder", type=click.Path(path_type=Path))
@TEXT
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Output folder."
)
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True)
@click.option(
    "--lr",
    "rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-2,
    show_default=True,
    help="Highest learning rate of Adam; it falls to a tenth along half a cosine.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Texts a step."
)
@click.option(
    "--balance",
    type=click.FloatRange(min=0),
    default=0.01,
    show_default=True,
    help="Weight of the loss that evens out how often experts are chosen.",
)
@click.option(
    "--z-loss",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Weight of the loss that keeps router scores small.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of texts.")
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens of a text that are looked at.",
)
@click.option("--eos/--no-eos", default=True, help="Whether the eos token ends each text.")
@click.option("--device", default="cpu", show_default=True, help="As torch calls it.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of torch, which decide about bits; default: one per core, one for tiny models.",
)
@click.option(
    "--save-every",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Steps after which the state is saved.",
)
@click.option("--overwrite", is_flag=True, help="Replace another model in the output folder.")
@click.option("--restart", is_flag=True, help="Discard an interrupted training.")
@TRUST
@JSON
def train_router_command(
    folder: Path, files: tuple[Path, ...], output: Path, steps: int, rate: float, batch: int,
    balance: float, z_loss: float, seed: int, length: int, eos: bool, device: str,
    threads: int | None, save_every: int, overwrite: bool, restart: bool, trusted: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Trains the routers of the mixture in FOLDER on texts, and nothing else.

    FOLDER is a mixture of LoRAs (format: routed) or a stock MoE. A tenth of the texts is held out; their
    loss is told before and after. Interrupted, the same command goes on.

    Example: mergetool train-router out/mix --text zoo:texts --output out/mix-trained
    """
    from merge.experts.texts import text_files
    from merge.experts.training.learning import Course, train_router

    course = Course(steps, rate, batch, balance, z_loss, seed, length, eos)
    with _bar(steps) as told:
        done = train_router(
            folder, text_files(files), output, course, device=device, threads=threads, save_every=save_every,
            restart=restart, overwrite=overwrite, trusted=trusted, progress=progress, told=told,
        )  # fmt: skip
    before, after = done.told["held_out_loss"]
    if as_json:
        report = {
            "output": str(done.folder),
            "existed": done.existed,
            "taken_up": done.taken_up,
            "steps": steps,
            "texts": done.told["texts"],
            "held_out_loss": {"before": before, "after": after},
            "verified": done.verified,
        }
        click.echo(json.dumps(report, indent=1))
        return
    did = "is this training's result already; verified" if done.existed else "written and verified"
    if done.taken_up and not done.existed:
        did += f" (went on after {done.taken_up} of {steps} steps)"
    held = done.told["texts"]["held_out"]
    click.echo(f"{done.folder}: {did}: loss of {held} held-out texts {before:.4f} -> {after:.4f}")


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[int, float, float], None]]:
    """Shows steps, loss and balance; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc="train", unit="step", leave=False) as bar:

        def tell(step: int, loss: float, balance: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", balance=f"{balance:.2f}", refresh=False)
            bar.update(step - bar.n)

        yield tell
