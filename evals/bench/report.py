"""The figures of a benchmark as a table for people and as JSON for machines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median_low
from typing import Any

from .measure import Usage

RATIOS = ("ours_over_floor", "mergekit_over_ours")

# What we hold ourselves to at full size: at most so many times the floor, at least so many times
# faster than mergekit. Printed, never asserted; a small model measures start-up instead.
BARS: Mapping[str, tuple[float, float]] = {
    "linear": (1.5, 8.0),
    "slerp": (3.0, 6.0),
    "dare_ties": (8.0, 12.0),
    "ties": (8.0, 15.0),
}
OTHERS = (8.0, 5.0)  # bars of every other method


@dataclass
class Row:
    """One method: all runs, how the outputs agree, the planned peak in bytes, what failed."""

    method: str
    projected: int | None = None
    runs: dict[str, list[Usage]] = field(default_factory=dict)
    agreement: dict[str, Any] | None = None
    failures: list[str] = field(default_factory=list)

    def usage(self, tool: str) -> Usage | None:
        """The run of median wall time, with the largest peak of all runs."""
        runs = self.runs.get(tool)
        if not runs:
            return None
        middle = median_low(run.wall for run in runs)
        chosen = next(run for run in runs if run.wall == middle)
        return Usage(chosen.wall, chosen.cpu, max(run.peak for run in runs))

    def ratio(self, above: str, below: str) -> float | None:
        over, under = self.usage(above), self.usage(below)
        return over.wall / under.wall if over and under else None


def as_json(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    listed = [
        {
            "method": row.method,
            "runs": {tool: [asdict(run) for run in runs] for tool, runs in row.runs.items()},
            "ours_over_floor": row.ratio("ours", "floor"),
            "mergekit_over_ours": row.ratio("mergekit", "ours"),
            "bars": dict(zip(RATIOS, BARS.get(row.method, OTHERS), strict=True)),
            "projected_peak": row.projected,
            "agreement": row.agreement,
            "failures": row.failures,
        }
        for row in rows
    ]
    return json.dumps({"machine": facts, "methods": listed}, indent=1) + "\n"


def report(facts: Mapping[str, Any], rows: Sequence[Row], *, bars: bool) -> str:
    """The machine, the table, and a line for every comparison and failure."""
    return "\n".join([*_facts_lines(facts), "", *table(rows, bars=bars), "", *_remarks(rows)])


def _facts_lines(facts: Mapping[str, Any]) -> list[str]:
    model = facts["model"]
    parameters, size = model["parameters"] / 1e6, model["bytes"] / 1e9
    cached = facts["inputs_in_page_cache"]
    too_small = "" if facts["memory_holds_inputs"] else "; RAM IS TOO SMALL, inputs come from disk"
    lines = [
        f"models    {parameters:.0f} M parameters, {size:.2f} GB each, bfloat16",
        f"machine   {facts['cores']} cores, {facts['processor']}, {facts['system']}, "
        f"load {facts['load_before']:.1f} before the start",
        f"versions  Python {facts['python']}, numpy {facts['numpy']}, torch {facts['torch']}",
        f"cache     inputs read before every run, at least {cached:.0%} of them in memory; "
        f"{facts['memory_available'] / 1e9:.0f} GB available{too_small}",
        f"floor     reads the same models, writes one, {facts['threads_of_floor']} threads",
    ]
    if peer := facts.get("mergekit"):
        versions = ", ".join(f"{name} {number}" for name, number in peer["versions"].items())
        lines.append(f"peer      {versions}; mergekit-yaml RECIPE OUT {' '.join(peer['flags'])}")
    return lines


def table(rows: Sequence[Row], *, bars: bool) -> list[str]:
    """Medians; MB is 10^6 bytes of resident memory at the peak, cpu is user + system."""
    head = ["method", "floor s", "ours s (cpu, MB)", "mergekit s (cpu, MB)"]
    head += ["ours/floor", "mergekit/ours", "bars"]
    lines = [head]
    for row in rows:
        floor = row.usage("floor")
        lines.append(
            [
                row.method,
                f"{floor.wall:.2f}" if floor else "-",
                _cell(row.usage("ours")),
                _cell(row.usage("mergekit")),
                _times(row.ratio("ours", "floor")),
                _times(row.ratio("mergekit", "ours")),
                _bars(row) if bars else "- (small)",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]


def _cell(usage: Usage | None) -> str:
    return f"{usage.wall:.2f} ({usage.cpu:.2f}, {usage.peak / 1e6:.0f})" if usage else "-"


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f}x" if ratio is not None else "-"


def _bars(row: Row) -> str:
    """Each bar with whether it is met."""
    most, least = BARS.get(row.method, OTHERS)
    slow, fast = row.ratio("ours", "floor"), row.ratio("mergekit", "ours")
    found = []
    if slow is not None:
        found.append(f"<={most:g}x {'met' if slow <= most else 'MISSED'}")
    if fast is not None:
        found.append(f">={least:g}x {'met' if fast >= least else 'MISSED'}")
    return ", ".join(found) or "-"


def _remarks(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row.agreement and row.agreement["same_tensors"]:
            found = row.agreement
            lines.append(
                f"{row.method}: {found['equal']:.1%} of the values have the bits of mergekit's; "
                f"largest difference {found['largest']:.2e}, {found['ulp']:.1f} ulp of bfloat16"
            )
        elif row.agreement:
            lines.append(f"{row.method}: mergekit wrote other tensors")
        if row.projected and (ours := row.usage("ours")):
            planned = f"{row.projected / 1e6:.0f} MB projected by its plan"
            lines.append(f"{row.method}: {ours.peak / 1e6:.0f} MB at the peak, {planned}")
        lines += [f"FAILED  {failure}" for failure in row.failures]
    return lines
