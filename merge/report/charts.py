"""The pictures of a search."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge.report.importance import Importance
from merge.report.pictures import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    RED,
    Picture,
    drawn,
    grid,
    legend_below,
    shown,
)
from merge.report.study import SPLITS, Entry, Search
from merge.report.varied import label_of, short_names
from merge.search.space import Choice, Dimension
from merge.search.starts import is_searched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INTERVAL = 1.96  # standard errors on each side: 95 % of a normal distribution
MOST_AXES = 12  # of parallel coordinates
MOST_BARS = 20  # of importance
SHARES = (
    ("truncated", "cut off at the limit"),
    ("empty", "empty"),
    ("alike", "the most frequent answer"),
)


def charts(search: Search, importance: Importance) -> list[Picture]:
    """Every picture that there is data for, in the order of a report."""
    found = (
        _compared(search),
        _progress(search),
        _front(search),
        _importance(search, importance),
        _parallel(search, importance),
        _answers(search),
    )
    return [picture for picture in found if picture]


# -- winner, parents, average ------------------------------------------------------------------------


def _compared(search: Search) -> Picture | None:
    entries = [*search.top, *search.rivals]
    if not entries:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        known = [split for split in SPLITS if any(split in e.splits for e in entries)]
        for i, split in enumerate(known):
            rows = [(row, e.splits[split]) for row, e in enumerate(entries) if split in e.splits]
            at = [row + 0.22 * (i - (len(known) - 1) / 2) for row, _ in rows]
            axes.errorbar(
                [100 * f.mean for _, f in rows], at, xerr=[100 * INTERVAL * f.stderr for _, f in rows],
                fmt=MARKERS[i], color=(GREY, ORANGE, BLUE)[SPLITS.index(split)], capsize=3,
                markersize=6, label=split,
            )  # fmt: skip
        axes.set_yticks(range(len(entries)), [_named(search, entry) for entry in entries])
        axes.invert_yaxis()
        axes.set_xlabel("score, points")
        grid(axes, "x")
        legend_below(figure, axes)

    if search.outcome:
        told = "Winner, runners-up, plain average and parents with 95 % intervals (1.96 standard errors). "
        told += "The search saw dev; the best were chosen on val; test chose nothing."
    else:
        told = "The best on dev so far, plain average and parents with 95 % intervals (1.96 standard errors)."
        told += " The search sees dev, where the best of many look better than they are."
    return drawn("comparison", "Beside parents and average", told, 1.4 + 0.42 * len(entries), draw)


def _named(search: Search, entry: Entry) -> str:
    name = shown(entry.name, 32)
    if not is_searched(entry.origin):
        return name if entry.origin == "average" else f"parent {name}"
    return f"candidate {name}" + (" (winner)" if entry.number == search.winner else "")


# -- progress ----------------------------------------------------------------------------------------


def _progress(search: Search) -> Picture | None:
    ended = sorted((e for e in search.entries if e.place is not None), key=lambda e: e.place or 0)
    tried = [entry for entry in ended if is_searched(entry.origin)]
    scored = [(i, e.splits["dev"]) for i, e in enumerate(tried, 1) if e.scored]
    if not scored:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        at = [i for i, _ in scored]
        means = [100 * figures.mean for _, figures in scored]
        axes.errorbar(
            at, means, yerr=[100 * f.stderr for _, f in scored],
            fmt="o", color=GREY, markersize=4.5, elinewidth=0.8, label="candidate",
        )  # fmt: skip
        best = np.maximum.accumulate(means)
        axes.step(
            [*at, len(tried)],
            [*best, best[-1]],
            where="post",
            color=BLUE,
            linewidth=2,
            label="best so far",
        )
        _lines_of_rivals(axes, search.rivals)
        early = [(i, e.dev) for i, e in enumerate(tried, 1) if e.state == "pruned"]
        if shown_early := [(i, 100 * figures.mean) for i, figures in early if figures]:
            axes.plot(
                *zip(*shown_early, strict=True), "o", color=GREY, markerfacecolor="none", markersize=4.5,
                label="given up early, on some documents",
            )  # fmt: skip
        if lost := [i for i, e in enumerate(tried, 1) if e.state == "failed"]:
            floor = axes.get_ylim()[0]
            axes.plot(lost, [floor] * len(lost), "x", color=RED, clip_on=False, label="not scored")
        axes.set_xlabel("candidates, in the order in which they ended")
        axes.set_ylabel("dev score, points")
        axes.locator_params(axis="x", integer=True)
        grid(axes)
        legend_below(figure, axes)

    told = "Every candidate on dev with one standard error, and the best so far. The best of many looks "
    told += "better on dev than it is" + (": see val and test above." if search.outcome else ".")
    return drawn("progress", "Progress", told, 4.2, draw)


def _lines_of_rivals(axes: "Axes", rivals: Sequence[Entry]) -> None:
    """The best parent and the average as lines with names, other parents faint."""
    parents = sorted(
        (e for e in rivals if e.origin != "average"), key=lambda e: -e.splits["dev"].mean
    )
    for entry in rivals:
        if entry.origin == "average":
            axes.axhline(
                100 * entry.splits["dev"].mean, color=ORANGE, linestyle="--", label="average"
            )
    for i, entry in enumerate(parents):
        how: dict[str, Any] = {"color": GREEN, "linestyle": ":", "linewidth": 1.0 if i else 1.8}
        label = (
            f"best parent, {shown(entry.name, 24)}"
            if i == 0
            else "other parents"
            if i == 1
            else None
        )
        axes.axhline(100 * entry.splits["dev"].mean, alpha=0.5 if i else 1.0, label=label, **how)


# -- several objectives --------------------------------------------------------------------------------


def _front(search: Search) -> Picture | None:
    names = search.objectives
    entries = [e for e in search.entries if len(e.objectives) == len(names)]
    if len(names) < 2 or not entries:
        return None
    pairs = list(itertools.combinations(range(len(names)), 2))
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
    points = len({e.objectives for e in entries if e.number in search.front})
    told = f"{len(search.front)} candidates, at {points} different points, that no other one beats in all of "
    told += f"{listed}; on dev."
    if not search.own:
        told += " The study itself maximised the mean of these tasks."
    height = 5.4 if across == 1 else 0.8 + 3.2 * down
    return drawn("front", "Pareto front", told, height, draw)


def _one_front(
    axes: "Axes", search: Search, entries: Sequence[Entry], x: int, y: int, *, only: bool
) -> None:
    def points(of: Sequence[Entry]) -> NDArray[np.float64]:
        found = [(e.objectives[x], e.objectives[y]) for e in of]
        return 100 * np.array(found, np.float64).reshape(-1, 2)

    best = sorted((e for e in entries if e.number in search.front), key=lambda e: e.objectives[x])
    others = [e for e in entries if e.number not in search.front and is_searched(e.origin)]
    axes.plot(*points(others).T, "o", color=GREY, alpha=0.7, markersize=4.5, label="candidates")
    if only:
        axes.step(*points(best).T, where="pre", color=BLUE, linewidth=1.2, alpha=0.7)
    axes.plot(*points(best).T, "o", color=BLUE, markersize=7, label="not beaten in all")
    for at, label in _labels([e for e in best if is_searched(e.origin)]) if only else ():
        offset = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(label, (100 * at[x], 100 * at[y]), **offset)  # type: ignore[arg-type]
    for i, entry in enumerate(e for e in entries if not is_searched(e.origin)):
        axes.plot(
            *points([entry]).T, MARKERS[1 + i % (len(MARKERS) - 1)], markersize=8, linestyle="none",
            color=(ORANGE, *COLOURS[2:])[i % 7], markeredgecolor=INK, markeredgewidth=0.6,
            label=shown(entry.name, 24),
        )  # fmt: skip
    names = short_names(search.objectives)
    axes.set_xlabel(f"{shown(names[x], 32)}, points")
    axes.set_ylabel(f"{shown(names[y], 32)}, points")
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


# -- what the score depends on -------------------------------------------------------------------------


def _importance(search: Search, importance: Importance) -> Picture | None:
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

    told = f"{importance.how} over {importance.candidates} candidates: what the dev score depends on among "
    told += "those that were tried, not which way."
    height = 1.2 + 0.36 * len(names) * max(1.0, 0.6 * len(importance.shares))
    return drawn("importance", "What the score depends on", told, height, draw)


def _by_importance(importance: Importance) -> list[str]:
    """Dimensions, those first that matter most in any objective."""
    largest: dict[str, float] = {}
    for shares in importance.shares.values():
        for name, share in shares.items():
            largest[name] = max(share, largest.get(name, 0.0))
    return sorted(largest, key=lambda name: -largest[name])


def _parallel(search: Search, importance: Importance) -> Picture | None:
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
    return float((value - low) / (high - low))


def _axes_of(axes: "Axes", search: Search, dimensions: Sequence[Dimension]) -> None:
    """An upright line for each dimension, with its ends or its choices."""
    for i, dimension in enumerate(dimensions):
        axes.axvline(i, color=INK, alpha=0.35, linewidth=1)
        for height, label in _marks(dimension):
            axes.text(i + 0.03, height, label, fontsize=8, va="center", alpha=0.9)
    names = [shown(label_of(d.name, search.data), 34) for d in dimensions]
    axes.set_xticks(range(len(dimensions)), names, rotation=25, ha="right", fontsize=8.5)
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    axes.set_xlim(-0.15, len(dimensions) - 1 + 0.6)
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


# -- answers -------------------------------------------------------------------------------------------


def _answers(search: Search) -> Picture | None:
    entries = sorted((e for e in search.entries if e.scored), key=lambda e: e.place or 0)
    shares: Mapping[str, list[float]] = {
        name: [100 * getattr(e.splits["dev"], name) for e in entries] for name, _ in SHARES
    }
    if not any(map(any, shares.values())):
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for i, (name, label) in enumerate(SHARES):
            at = range(1, len(entries) + 1)
            axes.plot(
                at, shares[name], "oxD"[i], color=(RED, INK, BLUE)[i], markersize=(8, 5, 4)[i],
                markerfacecolor="none", linestyle="none", label=label,
            )  # fmt: skip
        axes.set_xlabel("candidates and baselines, in the order in which they ended")
        axes.set_ylabel("share of dev answers, per cent")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylim(bottom=-0.05 * max(map(max, shares.values())))
        grid(axes)
        legend_below(figure, axes)

    told = "Answers that stopped at the length limit, that say nothing, and the share of the most frequent "
    told += "answer of a task. Where these are high, the score says little about the model."
    return drawn("answers", "Answers that say nothing", told, 3.6, draw)
