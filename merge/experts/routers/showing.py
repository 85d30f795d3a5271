"""Where a mixture sends the tokens of texts, as tables and as a picture."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from merge.errors import RequestError, WriteError
from merge.experts.routers.traffic import Load, Traffic

PICTURES = (".png", ".pdf", ".svg")


def tables(traffic: Traffic) -> str:
    """Sets of texts side by side, then the layers of each: per cent of the places with experts that tokens
    have, and in brackets the mean probability."""
    names, count = list(traffic.loads), len(traffic.experts)
    heads = [*traffic.experts, "largest/fair", "entropy"]
    whole = [[*_told(n, traffic.whole(n)), str(traffic.tokens(n))] for n in names]
    out = [
        f"per cent of the places that tokens have with experts, {traffic.top_k} of {count} for each router, "
        "and the mean probability in brackets",
        "",
        *_aligned([["texts", *heads, "tokens"], *whole]),
    ]
    for name in names:
        rows = [_told(layer, load) for layer, load in traffic.by_layer(name).items()]
        out += ["", *_aligned([[name, *heads], *rows])]
    return "\n".join(out)


def _told(name: str, load: Load) -> list[str]:
    cells = [
        f"{100 * share:.1f} ({100 * probability:.1f})"
        for share, probability in zip(load.share, load.probability, strict=True)
    ]
    return [name, *cells, f"{load.imbalance:.2f}", f"{load.entropy:.2f} bits"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def check_plot(file: Path) -> None:
    """Raises RequestError where no picture can be drawn into `file`."""
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib; install mergetool[plots]")
    if file.suffix.lower() not in PICTURES:
        raise RequestError(f"--plot {file}: is no picture; it must end in {', '.join(PICTURES)}")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"--plot {file}: no such folder; choose one that is there")


def draw(traffic: Traffic, file: Path) -> None:
    """Writes a heat map, as PNG, PDF or SVG by the file's name: of each set of texts the share that every
    expert has in every layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, layers = list(traffic.loads), list(traffic.by_layer(next(iter(traffic.loads))))
    width, height = 1.5 + len(names) * (1 + 0.5 * len(traffic.experts)), 1.8 + 0.28 * len(layers)
    figure = Figure(figsize=(max(4.0, width), max(3.0, height)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, names, strict=True):
        shares = np.array([load.share for load in traffic.by_layer(name).values()])
        image = axis.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set_title(name)
        axis.set_xticks(range(len(traffic.experts)), traffic.experts, rotation=60, ha="right")
        axis.set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=list(axes), label="share")
    try:
        figure.savefig(file, format=file.suffix.lower()[1:], dpi=120, bbox_inches="tight")
    except OSError as error:
        raise WriteError(f"{file}: cannot be written: {error.strerror}") from None
