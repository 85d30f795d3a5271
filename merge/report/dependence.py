"""The pictures of what the score of a search depends on."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge.report.importance import Importance
from merge.report.pictures import COLOURS, INK, Picture, drawn, grid, legend_below, shown
from merge.report.study import Entry, Search
from merge.report.varied import label_of
from merge.search.front import short_names
from merge.search.space import Choice, Dimension

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_AXES = 12  # of parallel coordinates
MOST_BARS = 20  # of importance


def importance_picture(search: Search, importance: Importance) -> Picture | None:
    if not importance.shares:
        return None
    names = _by_importance(importance)[:MOST_BARS]
    objectives = short_names(list(importance.shares))

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        count = len(importance.shares)
        for i, (objective, shares) in enumerate(
            zip(objectives, importance.shares.values(), strict=True)
        ):
            at = np.arange(len(names)) + 0.8 * (i - (count - 1) / 2) / count
            values = [100 * shares.get(name, 0.0) for name in names]
            axes.barh(at, values, 0.76 / count, color=COLOURS[i % 8], label=shown(objective, 32))
            for place, value in zip(at, values, strict=True):
                axes.text(value + 0.5, place, f"{value:.0f} %", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), [shown(label_of(n, search.data), 44) for n in names])
        axes.invert_yaxis()
        axes.set_xlabel("share of the spread of the dev score, per cent")
        axes.margins(x=0.08)
        grid(axes, "x")
        if count > 1:
            legend_below(figure, axes)

    of = f"{importance.taken} of " if importance.taken < importance.candidates else ""
    told = f"{importance.how} over {of}{importance.candidates} candidates: what the dev score depends on "
    told += "among those that were tried, not which way."
    height = 1.2 + 0.36 * len(names) * max(1.0, 0.6 * len(importance.shares))
    return drawn("importance", "What the score depends on", told, height, draw)


def _by_importance(importance: Importance) -> list[str]:
    """Dimensions, those first that matter most in any objective."""
    largest: dict[str, float] = {}
    for shares in importance.shares.values():
        for name, share in shares.items():
            largest[name] = max(share, largest.get(name, 0.0))
    return sorted(largest, key=lambda name: -largest[name])


def parallel_picture(search: Search, importance: Importance) -> Picture | None:
    entries = list(reversed(search.searched))  # the best are drawn last, over the others
    dimensions = _for_axes(search, importance)
    if len(entries) < 2 or not dimensions:
        return None

    def draw(figure: "Figure") -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        axes = figure.subplots()
        means = np.array([100 * e.splits["dev"].mean for e in entries])
        scale = Normalize(*_spread(means))
        colours = colormaps["viridis"]
        for i, (entry, mean) in enumerate(zip(entries, means, strict=True)):
            good = i >= len(entries) - max(1, len(entries) // 10)
            axes.plot(
                range(len(dimensions)), [_height(entry, d) for d in dimensions], marker=".",
                color=colours(scale(mean)), linewidth=2.4 if good else 1.0, alpha=1.0 if good else 0.55,
            )  # fmt: skip
        _axes_of(axes, search, dimensions)
        figure.colorbar(
            ScalarMappable(scale, colours), ax=axes, label="dev score, points", pad=0.02
        )

    told = "One line for each candidate, coloured by its dev score; the best tenth is drawn thick."
    if len(dimensions) < len(search.dimensions):
        told += f" {len(dimensions)} of {len(search.dimensions)} values that vary are shown."
    return drawn("parallel", "Values and scores", told, 4.8, draw)


def _for_axes(search: Search, importance: Importance) -> list[Dimension]:
    """What is shown: everything, or what matters most, in the order of the recipe."""
    ranked = _by_importance(importance) or [d.name for d in search.dimensions]
    kept = set(ranked[:MOST_AXES]) if len(search.dimensions) > MOST_AXES else None
    return [d for d in search.dimensions if kept is None or d.name in kept]


def _spread(values: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of a colour scale that single bad candidates do not stretch."""
    low, high = float(np.quantile(values, 0.1)), float(values.max())
    return (low, high) if low < high else (high - 1.0, high)


def _height(entry: Entry, dimension: Dimension) -> float:
    """Where a value lies between the ends of its dimension; NaN where it was not asked for."""
    value = entry.asked.get(dimension.name)
    if value is None:
        return float("nan")
    if isinstance(dimension, Choice):
        return value / max(1, dimension.count - 1)
    low, high = dimension.low, dimension.high
    if dimension.log:
        low, high, value = np.log(low), np.log(high), np.log(value)
    return float((value - low) / (high - low)) if low < high else 0.5


def _axes_of(axes: "Axes", search: Search, dimensions: Sequence[Dimension]) -> None:
    """An upright line for each dimension, with its ends or its choices."""
    beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    beside |= {"fontsize": 8, "alpha": 0.9}
    for i, dimension in enumerate(dimensions):
        axes.axvline(i, color=INK, alpha=0.35, linewidth=1)
        for height, label in _marks(dimension):
            axes.annotate(label, (i, height), **beside)
    names = [shown(label_of(d.name, search.data), 34) for d in dimensions]
    axes.set_xticks(range(len(dimensions)), names, rotation=25, ha="right", fontsize=8.5)
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    axes.set_xlim(-0.02 * len(dimensions), len(dimensions) - 1 + 0.02 * len(dimensions))
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _marks(dimension: Dimension) -> Iterator[tuple[float, str]]:
    if not isinstance(dimension, Choice):
        yield -0.035, f"{dimension.low:g}"
        yield 1.035, f"{dimension.high:g}"
        return
    if dimension.count <= 8:
        for i, label in enumerate(dimension.labels):
            yield i / max(1, dimension.count - 1), shown(label, 16)
