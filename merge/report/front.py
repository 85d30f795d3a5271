"""The picture of what a search reached in several objectives."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from merge.printing import counted
from merge.report.pictures import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    Picture,
    drawn,
    grid,
    legend_below,
    shown,
)
from merge.report.study import Entry, Search
from merge.search.front import short_names, words_of_front
from merge.search.starts import is_searched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12  # pairs of objectives
MOST_LABELS = 30  # points with numbers of candidates


def front_picture(search: Search) -> Picture | None:
    names = search.objectives
    entries = [e for e in search.entries if len(e.objectives) == len(names)]
    if len(names) < 2 or not entries:
        return None
    every = list(itertools.combinations(range(len(names)), 2))
    pairs = every[:MOST_PANELS]
    across = min(len(pairs), 2)
    down = -(-len(pairs) // across)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots(down, across, squeeze=False)
        for axis, (x, y) in zip(axes.flat, pairs, strict=False):
            _one_front(axis, search, entries, x, y, only=len(names) == 2)
        for axis in axes.flat[len(pairs) :]:
            axis.set_visible(False)
        legend_below(figure, axes[0][0])

    listed = ", ".join(short_names(names))
    candidates, baselines = search.on_front
    places = counted(len({e.objectives for e in candidates}), "place")
    told = f"No other one beats these in all of {listed} on dev: "
    told += words_of_front(len(candidates), [e.name for e in baselines])
    told += f"; the candidates lie at {places}." if candidates else "."
    if not search.own:
        told += " The study itself maximised the mean of these tasks."
    if len(pairs) < len(every):
        told += f" {len(pairs)} of {len(every)} pairs are shown; report.json has all."
    height = 5.4 if across == 1 else 0.8 + 3.2 * down
    return drawn("front", "Pareto front", told, height, draw)


def _one_front(
    axes: "Axes", search: Search, entries: Sequence[Entry], x: int, y: int, *, only: bool
) -> None:
    def points(of: Sequence[Entry]) -> NDArray[np.float64]:
        found = [(e.objectives[x], e.objectives[y]) for e in of]
        return 100 * np.array(found, np.float64).reshape(-1, 2)

    best = sorted((e for e in entries if e.number in search.front), key=lambda e: e.objectives[x])
    found = [e for e in best if is_searched(e.origin)]
    others = [e for e in entries if e.number not in search.front and is_searched(e.origin)]
    if others:
        axes.plot(
            *points(others).T, "o", color=GREY, alpha=0.7, markersize=4.5, label="other candidates"
        )
    if only:
        axes.step(*points(best).T, where="pre", color=BLUE, linewidth=1.2, alpha=0.7)
    if found:
        axes.plot(
            *points(found).T, "o", color=BLUE, markersize=7, label="candidates not beaten in all"
        )
    labels = list(_labels(found)) if only else []
    for at, label in labels if len(labels) <= MOST_LABELS else ():
        offset = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(label, (100 * at[x], 100 * at[y]), **offset)  # type: ignore[arg-type]
    for i, entry in enumerate(e for e in entries if not is_searched(e.origin)):
        axes.plot(
            *points([entry]).T, MARKERS[1 + i % (len(MARKERS) - 1)], markersize=8, linestyle="none",
            color=(ORANGE, *COLOURS[2:])[i % 7], markeredgecolor=INK, markeredgewidth=0.6,
            label=shown(entry.name, 24),
        )  # fmt: skip
    names = short_names(search.objectives)
    axes.set_xlabel(f"dev {shown(names[x], 32)}, points")
    axes.set_ylabel(f"dev {shown(names[y], 32)}, points")
    axes.margins(0.08)
    grid(axes)


def _labels(entries: Sequence[Entry]) -> Iterator[tuple[tuple[float, ...], str]]:
    """For each point the numbers of the candidates there, a few of them."""
    found: dict[tuple[float, ...], list[str]] = {}
    for entry in entries:
        found.setdefault(entry.objectives, []).append(entry.name)
    for at, names in found.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield at, ", ".join(names[:3]) + more
