"""The pictures of a search."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from merge.report.dependence import importance_picture, parallel_picture
from merge.report.front import front_picture
from merge.report.importance import Importance
from merge.report.pictures import (
    BLUE,
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
from merge.search.starts import is_searched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INTERVAL = 1.96  # standard errors on each side: 95 % of a normal distribution
MOST_COMPARED = 40  # of the best, and of baselines
CROWD = 300  # candidates from which each is drawn small
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
        front_picture(search),
        importance_picture(search, importance),
        parallel_picture(search, importance),
        _answers(search),
    )
    return [picture for picture in found if picture]


# -- winner, parents, average ------------------------------------------------------------------------


def _compared(search: Search) -> Picture | None:
    top, rivals = search.top[:MOST_COMPARED], list(search.rivals)
    del rivals[MOST_COMPARED - 1 : -1]  # the last one is the average
    entries = [*top, *rivals]
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
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.set_xlabel("score, points")
        grid(axes, "x")
        legend_below(figure, axes)

    if search.outcome:
        told = "Winner, runners-up, plain average and parents with 95 % intervals (1.96 standard errors). "
        told += "The search saw dev; the best were chosen on val; test chose nothing."
    else:
        told = "The best on dev so far, plain average and parents with 95 % intervals (1.96 standard errors)."
        told += " The search sees dev, where the best of many look better than they are."
    if len(top) < len(search.top):
        told += f" {len(top)} of the {len(search.top)} best are shown."
    if len(rivals) < len(search.rivals):
        told += f" {len(rivals)} of {len(search.rivals)} parents and average are shown."
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
            fmt="o", color=GREY, markersize=4.5 if len(at) <= CROWD else 2, elinewidth=0.8,
            label="candidate",
        )  # fmt: skip
        best = np.maximum.accumulate(means)
        axes.step(
            [*at, len(tried)],
            [*best, best[-1]],
            where="post",
            color=BLUE,
            linewidth=2,
            zorder=3,  # over many candidates
            label="best so far",
        )
        _lines_of_rivals(axes, search)
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


def _lines_of_rivals(axes: "Axes", search: Search) -> None:
    """The best parent and the average as lines with names, other parents faint."""
    best, split = search.best_parent or (None, "")
    others = "other parents"
    for entry in sorted(search.rivals, key=lambda each: each is not best):
        how: dict[str, Any] = {"color": GREEN, "linestyle": ":", "linewidth": 1.8, "zorder": 3}
        if entry.origin == "average":
            how |= {"color": ORANGE, "linestyle": "--", "linewidth": 1.5, "label": "average"}
        elif entry is best:
            how["label"] = f"best parent on {split}, {shown(entry.name, 24)}"
        else:
            how |= {"linewidth": 1.0, "alpha": 0.5, "label": others}
            others = "_"  # of several lines alike the legend has one
        axes.axhline(100 * entry.splits["dev"].mean, **how)


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
