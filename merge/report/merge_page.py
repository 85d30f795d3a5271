"""The page and the files of a report on a merge."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from merge.printing import counted
from merge.report.figures import OUTSIDE, Comparison, Tensor
from merge.report.files import Report, csv_text
from merge.report.merging import MODULES
from merge.report.page import Cell, Html, figure, joined, page, paragraph, section, table
from merge.report.pictures import ACROSS, Map, Picture, drawn, heat_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAINT = 0.1  # the least end of a scale to both sides of zero: noise shall look like it
MOST_PANELS = 8  # of one picture
MOST_ROWS = 64  # modules of one panel
MOST_LISTED = 1500  # tensors in the page's table; tensors.csv has all
Figured = Callable[[Sequence[Tensor]], float]  # a number for the tensors of a cell


def report_on(found: Comparison) -> Report:
    """What the folder of a report on a merge holds."""
    pictures = [picture for part in found.parts for picture in _pictures(part)]
    head, rows = _columns(found)
    return Report(
        _page(found, pictures), tuple(pictures), {"tensors.csv": csv_text(head, rows)}, _told(found)
    )


def _told(found: Comparison) -> dict[str, Any]:
    """Everything, as JSON can tell it."""
    first, *rest = found.parts
    return {
        "kind": "merge",
        "recipe": found.recipe.rpartition("/")[2],
        "merge_method": found.method,
        "base_model": found.base,
        "compared": "task vectors" if found.base else "weights",
        **_told_sums(first),
        **({"without_base": _told_sums(rest[0])} if rest else {}),
        "copied": found.copied,
        "tensors": [
            {
                "name": t.name,
                "layer": t.layer,
                "module": t.module,
                "shape": list(t.shape),
                "with_base": t.with_base,
                "models": {name: _told_size(found, name, [t]) for name in t.sizes},
                "pairs": [_told_pair(found, pair, [t]) for pair in t.pairs],
                "sign_conflict": t.shared.conflict,
            }
            for t in found.tensors
        ],
    }


def _told_sums(part: Comparison) -> dict[str, Any]:
    return {
        "models": {name: _told_size(part, name, None) for name in part.models},
        "pairs": [_told_pair(part, pair, None) for pair in part.pairs],
        "sign_conflict": part.shared().conflict,
    }


def _told_size(found: Comparison, name: str, of: Sequence[Tensor] | None) -> dict[str, float]:
    size = found.size(name, of)
    return {"norm": size.norm, "relative": size.relative}


def _told_pair(
    found: Comparison, pair: tuple[str, str], of: Sequence[Tensor] | None
) -> dict[str, Any]:
    both = found.pair(pair, of)
    return {"models": list(pair), "cosine": both.cosine, "sign_conflict": both.conflict}


# -- pictures ----------------------------------------------------------------------------------------


def _pictures(found: Comparison) -> list[Picture]:
    return [_sizes(found), *([_cosines(found), _signs(found)] if found.pairs else [])]


def _sizes(found: Comparison) -> Picture:
    relative = any(found.size(model).reference > 0 for model in found.models)

    def figured(model: str, tensors: Sequence[Tensor]) -> float:
        size = found.size(model, tensors)
        return size.relative if relative else size.norm

    away = "task vector" if found.base else "distance from the mean of all"
    unit = "norm" + f", in norms of the {'base' if found.base else 'mean'}" * relative
    told = f"The {away} of each model in each module of each layer: its {unit}."
    panels = [(model, partial(figured, model)) for model in found.models]
    return _picture(found, "sizes", "Sizes", told, panels, unit, "viridis", (0.0, None))


def _cosines(found: Comparison) -> Picture:
    def figured(pair: tuple[str, str], tensors: Sequence[Tensor]) -> float:
        return found.pair(pair, tensors).cosine

    pairs = _largest_first({pair: abs(found.pair(pair).cosine) for pair in found.pairs})
    panels = [(_headed(pair), partial(figured, pair)) for pair in pairs]
    told = f"Cosines between {_compared(found)}: 1 where those of two models point the same way, 0 where "
    told += "they have nothing to do with each other."
    return _picture(found, "cosines", "Cosines", told, panels, "cosine", "RdBu", (None, None))


def _signs(found: Comparison) -> Picture:
    def figured(pair: tuple[str, str], tensors: Sequence[Tensor]) -> float:
        return found.pair(pair, tensors).conflict

    def of_all(tensors: Sequence[Tensor]) -> float:
        return found.shared(tensors).conflict

    pairs = _largest_first({pair: found.pair(pair).conflict for pair in found.pairs})
    panels: list[tuple[str, Figured]] = [(_headed(pair), partial(figured, pair)) for pair in pairs]
    if len(found.models) > 2:
        panels.insert(0, ("any two of all", of_all))
    told = f"The share of values in which {_compared(found)} have opposite signs, of those that two models "
    told += "do not leave at zero. By chance it is 0.5 for a pair."
    return _picture(found, "signs", "Sign conflicts", told, panels, "share", "PuOr_r", (0.0, 1.0))


def _largest_first(values: Mapping[tuple[str, str], float]) -> list[tuple[str, str]]:
    """Pairs, those last that have no value."""
    return sorted(values, key=lambda pair: (math.isnan(values[pair]), -values[pair]))


def _compared(found: Comparison) -> str:
    return "task vectors" if found.base else "weights"


def _both(pair: tuple[str, str]) -> str:
    return f"{pair[0]} × {pair[1]}"


def _headed(pair: tuple[str, str]) -> str:
    """On two lines where one is too short."""
    both = _both(pair)
    return both if len(both) <= 44 else f"{pair[0]} ×\n{pair[1]}"


def _picture(
    found: Comparison,
    name: str,
    title: str,
    told: str,
    panels: Sequence[tuple[str, Figured]],
    label: str,
    scale: str,
    ends: tuple[float | None, float | None],
) -> Picture:
    """Heat maps of modules by layers, one for each panel; what is outside of layers is the last column.

    ends: of the scale; None: as the values are, to both sides of zero where the first is none.
    """
    low, high = ends
    kept = panels[:MOST_PANELS]
    if len(kept) < len(panels):
        told += f" {len(kept)} of {len(panels)} panels are shown; tensors.csv has all."
    rows = _modules(found)
    if len(rows) > MOST_ROWS:
        told += f" {MOST_ROWS} of {len(rows)} modules are shown; tensors.csv has all."
    maps = [_map(found, rows[:MOST_ROWS], heading, figured) for heading, figured in kept]
    every = np.concatenate([each.values[np.isfinite(each.values)] for each in maps])
    top = high if high is not None else float(np.abs(every).max(initial=0.0)) or 1.0
    if low is None:
        top = max(top, FAINT)
    bottom = -top if low is None else low
    down = -(-len(maps) // min(ACROSS, len(maps)))
    height = 0.9 + down * (0.7 + 0.2 * len(maps[0].rows))

    def draw(figure: "Figure") -> None:
        heat_maps(figure, maps, label, low=bottom, high=top, scale=scale)

    return drawn(_identity(found, name), _titled(found, title), told, max(2.8, height), draw)


def _map(found: Comparison, rows: Sequence[str], heading: str, figured: Figured) -> Map:
    columns = _layers(found)
    cells: dict[tuple[str, str], list[Tensor]] = {}
    for tensor in found.tensors:
        if tensor.module in rows:
            cells.setdefault((tensor.layer, tensor.module), []).append(tensor)
    values = np.full((len(rows), len(columns)), np.nan)
    for (layer, module), tensors in cells.items():
        values[rows.index(module), columns.index(layer)] = figured(tensors)
    return Map(heading, rows, [layer or "outside" for layer in columns], values)


def _layers(found: Comparison) -> list[str]:
    """As they come, and last what is outside of all."""
    inside = dict.fromkeys(t.layer for t in found.tensors if t.layer != OUTSIDE)
    order = sorted(inside, key=lambda layer: (layer.rpartition(" ")[0], int(layer.split()[-1])))
    return order + [OUTSIDE] * any(t.layer == OUTSIDE for t in found.tensors)


def _modules(found: Comparison) -> list[str]:
    """Linear layers as a model runs them, then others in layers, then those outside."""
    inside = dict.fromkeys(t.module for t in found.tensors if t.layer != OUTSIDE)
    outside = dict.fromkeys(t.module for t in found.tensors if t.layer == OUTSIDE)
    known = [module for module in MODULES if module in inside]
    return list(dict.fromkeys([*known, *inside, *outside]))


# -- page --------------------------------------------------------------------------------------------


def _page(found: Comparison, pictures: Sequence[Picture]) -> str:
    sections = [
        *((_identity(p, "models"), _titled(p, "Models"), _models(p)) for p in found.parts),
        *((p.name, p.title, section(p.name, p.title, figure(p))) for p in pictures),
        ("tensors", "All tensors", _tensors(found)),
    ]
    kept = [each for each in sections if each[2]]
    return page(f"Merge {found.recipe.rpartition('/')[2]}", _head(found), kept)


def _head(found: Comparison) -> Html:
    count = f"{counted(len(found.tensors), 'tensor')} of {counted(len(found.models), 'model')}"
    count += f", merged by {found.method}"
    copied = f"; {counted(found.copied, 'tensor')} taken over unchanged" if found.copied else ""
    how = joined(paragraph(_how(part), "say") for part in found.parts)
    return joined([paragraph(f"{count}{copied}.", "faint"), how])


def _how(part: Comparison) -> str:
    """What is compared."""
    count = counted(len(part.tensors), "tensor")
    if part.base:
        where = f"In {count} task" if part.apart else "Task"
        return f"{where} vectors are compared: what each model has more than {part.base}."
    where = f"In {count} there is no base" if part.apart else "There is no base"
    what = f"{where}, so the weights themselves are compared, and how far each model is from the plain mean"
    return f"{what} of all."


def _titled(part: Comparison, title: str) -> str:
    """A heading; of one of two parts, which."""
    return f"{title} {'with' if part.base else 'without'} a base" if part.apart else title


def _identity(part: Comparison, name: str) -> str:
    return f"{name}-without-base" if part.apart and not part.base else name


def _models(found: Comparison) -> Html:
    reference = "of the base's" if found.base else "of the mean's"
    rows: list[list[Cell]] = [
        [name, size.norm, 100 * size.relative]
        for name, size in ((name, found.size(name)) for name in found.models)
    ]
    parts = [table(["model", "norm", f"per cent {reference}"], rows, digits=2, label="Models")]
    pairs: list[list[Cell]] = [
        [_both(p), both.cosine, 100 * both.conflict]
        for p, both in ((p, found.pair(p)) for p in found.pairs)
    ]
    if pairs:
        head = ["pair", "cosine", "opposite signs, per cent"]
        parts.append(table(head, pairs, digits=[0, 3, 1], label="Pairs"))
    return section(_identity(found, "models"), _titled(found, "Models"), *parts)


def _tensors(found: Comparison) -> Html:
    head, rows = _columns(found)
    told = "A click on a column's name sorts by it."
    if len(rows) > MOST_LISTED:
        told += f" The first {MOST_LISTED} of {len(rows)}; tensors.csv has all."
    return section(
        "tensors",
        "All tensors",
        paragraph(told, "faint"),
        table(head, rows[:MOST_LISTED], digits=4, label="All tensors"),
    )


def _columns(found: Comparison) -> tuple[list[str], list[list[Cell]]]:
    """A row for each tensor: fractions, not per cent."""
    head = ["tensor", "layer", "module", "shape"]
    head += [f"{key} {name}" for name in found.models for key in ("norm", "relative")]
    head += [f"{key} {_both(p)}" for p in found.pairs for key in ("cosine", "conflict")]
    mixed = len(found.parts) > 1
    rows: list[list[Cell]] = []
    for t in found.tensors:
        row: list[Cell] = [t.name, t.layer, t.module, " × ".join(map(str, t.shape))]
        for name in found.models:
            size = t.sizes.get(name)
            row += [size.norm, size.relative] if size else [None, None]
        for pair in found.pairs:
            both = t.pairs.get(pair)
            row += [both.cosine, both.conflict] if both else [None, None]
        row.append(t.shared.conflict if t.pairs else None)
        rows.append([*row, "yes" if t.with_base else "no"] if mixed else row)
    return [*head, "conflict of any two", *(["base"] if mixed else [])], rows
