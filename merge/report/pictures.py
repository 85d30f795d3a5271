"""How pictures of a report are drawn: matplotlib without a screen, one style, SVG for the page, PNG beside.

Text and lines are in one colour of their own, INK, in the place of which the page puts that of its text, so
that a picture is read on light ground and on dark. All other colours are Okabe and Ito's, or scales that
colour-blind people can read.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from merge.errors import RequestError
from merge.printing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#20262d"  # stands for the colour of the page's text
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE, GREY = (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#8c8c8c",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, GREY)
MARKERS = "osD^vPX*"
WIDTH = 8.0  # inches
DPI = 144
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # names come from files that others wrote
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Picture:
    """`name`: of its file. `told`: what is to be seen, in a sentence or two. `svg`: an element for a page."""

    name: str
    title: str
    told: str
    svg: str
    png: bytes


def check_drawing() -> None:
    """Raises RequestError where nothing can be drawn."""
    if find_spec("matplotlib") is None:
        raise RequestError("a report needs matplotlib; install mergetool[plots]")


def drawn(
    name: str, title: str, told: str, height: float, draw: Callable[["Figure"], None]
) -> Picture:
    """The picture that `draw` makes on an empty figure, WIDTH x height inches; the same for the same data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _style(name):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        svg, png = io.StringIO(), io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
        figure.savefig(png, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return Picture(name, title, told, _element(svg.getvalue()), png.getvalue())


@contextmanager
def _style(name: str) -> Iterator[None]:
    import logging
    import warnings

    import matplotlib

    salted = {**STYLE, "svg.hashsalt": name}  # ids that no other picture of the page has
    fonts = logging.getLogger("matplotlib.font_manager")
    with matplotlib.rc_context(salted), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks
        before = fonts.level
        fonts.setLevel(logging.ERROR)
        try:
            yield
        finally:
            fonts.setLevel(before)


def _element(svg: str) -> str:
    """The element alone, in the colour of the text around it."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace(INK, "currentColor").strip()


def shown(text: str, most: int = 40) -> str:
    """A name that others wrote, on one line and not too long."""
    clean = printable(text)
    return clean if len(clean) <= most else f"{clean[: most // 2]}…{clean[-(most // 2 - 1) :]}"


def grid(axes: "Axes", which: Literal["both", "x", "y"] = "both") -> None:
    """Faint lines behind the data."""
    axes.grid(visible=True, axis=which, color=INK, alpha=0.12, linewidth=0.8)


def legend_below(figure: "Figure", axes: "Axes") -> None:
    """A legend under the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))


ACROSS = 2


@dataclass(frozen=True)
class Map:
    """One panel of heat maps: `values` [rows, columns], NaN where there is nothing. The title may have two
    lines."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: NDArray[np.float64]


def heat_maps(
    figure: "Figure", maps: Sequence[Map], label: str, *, low: float, high: float, scale: str
) -> None:
    """Panels side by side, up to ACROSS in a row, in colours of one scale."""
    across = min(ACROSS, len(maps))
    down = -(-len(maps) // across)
    axes: Any = figure.subplots(down, across, squeeze=False, sharey=True)
    mesh: Any = None
    for axis, each in zip(axes.flat, maps, strict=False):
        mesh = axis.pcolormesh(each.values, vmin=low, vmax=high, cmap=scale)
        axis.set_title("\n".join(shown(part, 44) for part in each.title.split("\n")), fontsize=8.5)
        step = max(1, -(-len(each.columns) // 16))
        places = range(0, len(each.columns), step)
        axis.set_xticks(
            [p + 0.5 for p in places], [shown(each.columns[p], 12) for p in places], fontsize=8
        )
        axis.tick_params(length=2, labelsize=8)
        _write_in(axis, each, low, high)
    names = [shown(row, 30) for row in maps[0].rows]
    axes[0][0].set_yticks(np.arange(len(names)) + 0.5, names, fontsize=8)
    axes[0][0].invert_yaxis()
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(maps) - across) : len(maps)]:
        axis.set_xlabel("layer")
    bar = figure.colorbar(
        mesh, ax=list(axes.flat), label=label, location="bottom", fraction=0.04, aspect=50, pad=0.02
    )
    bar.outline.set_visible(False)


MOST_NUMBERS = 130  # cells of a panel that have their numbers written into them


def _write_in(axis: "Axes", each: Map, low: float, high: float) -> None:
    """The numbers themselves, where there is room, light on dark and dark on light."""
    from matplotlib import colormaps

    if each.values.size > MOST_NUMBERS or len(each.columns) > 12:
        return
    mesh = axis.collections[0]
    scale = colormaps[mesh.get_cmap().name]
    for (row, column), value in np.ndenumerate(each.values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = scale((value - low) / ((high - low) or 1))
        bright = 0.299 * red + 0.587 * green + 0.114 * blue
        colour = "#000000" if bright > 0.55 else "#ffffff"
        rounded = round(float(value), 2) + 0.0  # no negative zero
        text = f"{rounded:.2f}".replace("0.", ".", 1) if abs(rounded) < 1 else f"{value:.1f}"
        axis.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color=colour
        )
