"""The page and the files of a report on a search."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from merge.printing import counted
from merge.report.candidates import (
    all_columns_of,
    columns_of,
    in_points,
    on_split,
    recipe_text,
    scores_of,
    tasks_of,
)
from merge.report.charts import charts
from merge.report.files import Report, csv_text
from merge.report.importance import FEW, Importance, importance_of
from merge.report.page import Cell, Html, details, figure, joined, page, paragraph, section, table
from merge.report.pictures import Picture
from merge.report.study import SPLITS, Entry, Search
from merge.search.starts import is_searched

MOST_LISTED = 1000  # candidates in the page's table; candidates.csv has all
MOST_RECIPES = 20  # of the best


def report_on(search: Search) -> Report:
    """What a study's folder of a report holds."""
    importance = importance_of(search)
    pictures = charts(search, importance)
    told = {"kind": "study", **search.as_json(), "importance": vars(importance)}
    return Report(
        _page(search, importance, {picture.name: picture for picture in pictures}),
        tuple(pictures),
        {"candidates.csv": csv_text(*all_columns_of(search))},
        told,
    )


def _page(search: Search, importance: Importance, pictures: Mapping[str, Picture]) -> str:
    found = [
        ("beside", "Leaderboard", _leaderboard(search, pictures)),
        ("progress", "Progress", _pictured(pictures, "progress", "Progress")),
        ("front", "Pareto front", _front(search, pictures)),
        ("importance", "Importance", _importance(search, importance, pictures)),
        ("parallel", "Values", _pictured(pictures, "parallel", "Values and scores")),
        ("answers", "Answers", _answers(search, pictures)),
        ("recipes", "Recipes", _recipes(search)),
        ("candidates", "All candidates", _candidates(search)),
        ("failed", "Failed", _failed(search)),
        ("how", "How it was searched", _how(search)),
    ]
    kept = [each for each in found if each[2]]
    return page(f"Search {search.name}", _head(search), kept)


def _head(search: Search) -> Html:
    outcome = search.outcome
    if outcome is None:
        waiting = "No winner is told here: the best are compared on val and test in the end."
        return joined([paragraph(search.status, "faint"), paragraph(waiting, "say")])
    words = " ".join(f"{what[:1].upper()}{what[1:]}." for what in search.words)
    parts = [paragraph(search.status, "faint"), paragraph(words, "say")]
    if outcome.winners_tested > 1:
        what = f"Test was looked at for {outcome.winners_tested} winners of this study, one after the other; "
        parts.append(paragraph(f"{what}the last is a little worse than it looks there."))
    return joined(parts)


def _pictured(pictures: Mapping[str, Picture], name: str, heading: str) -> Html:
    """A section of one picture, empty where there is none."""
    if name not in pictures:
        return Html("")
    return section(name, heading, figure(pictures[name]))


# -- leaderboard -------------------------------------------------------------------------------------


def _leaderboard(search: Search, pictures: Mapping[str, Picture]) -> Html:
    top = search.top[:MOST_LISTED]
    entries = [*top, *search.rivals]
    splits = [split for split in SPLITS if any(split in entry.splits for entry in entries)]
    chosen, tasks = _objectives_on_val(search, entries), tasks_of(entries)
    rows: list[list[Cell]] = [
        [
            _told(search, e), *_on_val(e, chosen), *scores_of(e, splits),
            *(in_points(e.tasks.get(t)) for t in tasks),
        ]
        for e in entries
    ]  # fmt: skip
    head = [
        "candidate", *on_split("val", chosen), *(n for s in splits for n in (s, f"± {s}")),
        *on_split("dev", tasks),
    ]  # fmt: skip
    marked = [i for i, entry in enumerate(entries) if entry.number == search.winner]
    told = "Mean over tasks in points (100 is all right), ± one standard error."
    if search.outcome is None:
        told += f" The best on dev so far, {len(top)} of {len(search.searched)}, and the baselines."
    elif len(top) < len(search.top):
        told += f" The first {len(top)} of the {len(search.top)} best; candidates.csv has all."
    parts = [
        paragraph(told, "faint"),
        table(head, rows, marked=marked, label="Leaderboard"),
        _test(search),
    ]
    if "comparison" in pictures:
        parts.append(figure(pictures["comparison"]))
    return section("beside", "Leaderboard", *parts)


def _objectives_on_val(search: Search, entries: Sequence[Entry]) -> list[str]:
    """The study's objectives, as far as they are known on val."""
    known = {n for e in entries if "val" in e.splits for n in e.splits["val"].objectives}
    return [name for name in search.objectives if name in known]


def _on_val(entry: Entry, objectives: Sequence[str]) -> list[float | None]:
    reached = entry.splits["val"].objectives if "val" in entry.splits else {}
    return [in_points(reached.get(name)) for name in objectives]


def _test(search: Search) -> Html:
    """The paired test in full."""
    verdict = search.outcome.verdict if search.outcome else None
    if not verdict:
        return Html("")
    head = ["paired test", "against", "p", "difference, points", "95 % from", "to", "documents"]
    points = [100 * share for share in (verdict.difference, verdict.low, verdict.high)]
    row: list[Cell] = [
        f"{verdict.winner}: {verdict.test}",
        verdict.rival,
        f"{verdict.p:.2g}",
        *points,
        verdict.documents,
    ]
    return table(head, [row], label="Paired test")


def _told(search: Search, entry: Entry) -> str:
    if not is_searched(entry.origin):
        return entry.origin
    return f"{entry.number}" + (" winner" if entry.number == search.winner else "")


# -- further sections ----------------------------------------------------------------------------------


def _front(search: Search, pictures: Mapping[str, Picture]) -> Html:
    if "front" not in pictures:
        return Html("")
    searched, baselines = search.on_front
    entries = [*searched, *baselines]
    chosen = _objectives_on_val(search, entries)
    rows: list[list[Cell]] = [
        [
            _told(search, e), *(100 * value for value in e.objectives), *_on_val(e, chosen),
            *scores_of(e, ["dev"]),
        ]
        for e in entries
    ]  # fmt: skip
    head = [
        "candidate", *on_split("dev", search.objectives), *on_split("val", chosen), "dev", "± dev",
    ]  # fmt: skip
    return section(
        "front",
        "Pareto front",
        figure(pictures["front"]),
        table(head, rows, label="Candidates and baselines of the front"),
    )


def _importance(search: Search, importance: Importance, pictures: Mapping[str, Picture]) -> Html:
    heading = "What the score depends on"
    if "importance" not in pictures:
        what = f"There are no shares: {importance.why_not}."
        return section("importance", heading, paragraph(what, "faint"))
    parts = [figure(pictures["importance"])]
    known = len(next(iter(importance.shares.values())))
    if importance.candidates < FEW * known:
        what = f"{importance.candidates} candidates are few for {known} values; another search may give "
        parts.append(paragraph(what + "other shares.", "faint"))
    if left := len(search.dimensions) - known:
        what = f"Left out: {counted(left, 'value')} that not every candidate has."
        parts.append(paragraph(what, "faint"))
    return section("importance", heading, *parts)


def _answers(search: Search, pictures: Mapping[str, Picture]) -> Html:
    rows: list[list[Cell]] = []
    for entry in [*search.top[:MOST_LISTED], *search.rivals]:
        split = next((s for s in reversed(SPLITS) if s in entry.splits), None)
        if split is None:
            continue
        figures = entry.splits[split]
        shares = (figures.truncated, figures.empty, figures.alike)
        rows.append([_told(search, entry), split, *(100 * share for share in shares)])
    if not rows:
        return Html("")
    head = ["candidate", "split", "cut off at the limit", "empty", "most frequent answer"]
    parts = [figure(pictures["answers"])] if "answers" in pictures else []
    told = paragraph("Per cent of the answers, on the last split that each was scored on.", "faint")
    return section(
        "answers", "Answers that say nothing", *parts, told, table(head, rows, label="Answers")
    )


def _recipes(search: Search) -> Html:
    if not search.top:
        return Html("")
    best = search.top[:MOST_RECIPES]
    shown = [details(f"Candidate {_told(search, e)}", recipe_text(e.recipe)) for e in best]
    notes = [paragraph(f"Candidate {number}: {note}.") for number, note in _kin(search)]
    told = f"{len(best)} of {len(search.top)} are shown; " if len(best) < len(search.top) else ""
    told += "report.json and candidates.csv have the recipes of all candidates."
    return section("recipes", "Recipes of the best", *shown, *notes, paragraph(told, "faint"))


def _kin(search: Search) -> list[tuple[int, str]]:
    """What is known of the ancestors of the best."""
    top = search.outcome.top if search.outcome else []
    return [(told.number, note) for told in top for note in told.kin]


def _failed(search: Search) -> Html:
    if not search.failed:
        return Html("")
    rows: list[list[Cell]] = [[e.number, e.origin, e.reason] for e in search.failed]
    return section(
        "failed",
        "Candidates that could not be scored",
        table(["number", "origin", "reason"], rows, label="Failed candidates"),
    )


def _how(search: Search) -> Html:
    said = search.settings.items()
    set_to = {key: value for key, value in said if value not in (None, [])}
    facts = {"asked by": search.begun_with, **{k: _as_written(v) for k, v in set_to.items()}}
    space = yaml.safe_dump(search.data, sort_keys=False, allow_unicode=True)
    return section(
        "how",
        "How it was searched",
        table(["setting", "value"], list(map(list, facts.items())), label="Settings"),
        details("The recipe that was searched", space),
    )


def _as_written(value: Any) -> str:
    """A setting as a recipe may have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# -- all candidates ------------------------------------------------------------------------------------


def _candidates(search: Search) -> Html:
    head, rows = columns_of(search)
    kept = rows[:MOST_LISTED]
    marked = [i for i, row in enumerate(kept) if row[0] == search.winner]
    told = "A click on a column's name sorts by it."
    if len(rows) > len(kept):
        told += f" The first {len(kept)} of {len(rows)}; candidates.csv has all."
    numbers = 5 + len(tasks_of(search.entries)) + 3
    digits = [1] * numbers + [4] * (len(head) - numbers)
    return section(
        "candidates",
        "All candidates",
        paragraph(told, "faint"),
        table(head, kept, digits=digits, marked=marked, label="All candidates"),
    )
