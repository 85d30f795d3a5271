"""Experts that a router cannot tell apart, found in what was written."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np

from merge.errors import RequestError
from merge.experts.names import expert_names
from merge.experts.routers.gates import gates_of
from merge.experts.routing import default_mode
from merge.plan import Plan
from merge.sources.model import Model, read_json
from merge.sources.weights import open_safetensors

SAME = 1 - 1e-6  # the cosine of two rows: float32 rounds at 1e-7
LAST = ("hidden", "hidden_last")


def notes_on_routers(plan: Plan, folder: Path) -> list[str]:
    """What to note of the routers of the mixture in `folder`, the result of `plan`."""
    if not plan.recipe.mixes:
        return []
    model = Model(str(folder), folder, read_json(folder / "config.json"), open_safetensors(folder))
    try:
        gates = gates_of(model)
    except RequestError:  # no kind of model whose routers are known
        return []
    names = expert_names(folder, gates.experts)
    places: dict[tuple[str, str], list[str]] = {}
    for tensor in (name for name in gates.names if name.endswith(".weight")):
        for a, b in _same_rows(model, tensor):
            places.setdefault((names[a], names[b]), []).append(tensor)
    return [_told(plan, pair, found) for pair, found in places.items()]


def _same_rows(model: Model, tensor: str) -> Iterator[tuple[int, int]]:
    """Pairs of experts with rows of one direction; those of zeros are meant."""
    rows = model.source.rows(tensor, 0, model.source.tensors[tensor].rows).astype(np.float64)
    lengths = np.sqrt(np.square(rows).sum(axis=1))
    units = rows / np.where(lengths, lengths, 1.0)[:, None]
    cosines = units @ units.T
    return (pair for pair in combinations(range(len(rows)), 2) if cosines[pair] > SAME)


def _told(plan: Plan, pair: tuple[str, str], tensors: list[str]) -> str:
    more = f" and {len(tensors) - 1} others" if len(tensors) > 1 else ""
    why = ""
    if default_mode(plan.recipe) in LAST:
        why = "; hidden looks at the last token of a prompt, which may be the same: hidden_avg looks at all"
    return (
        f"experts {pair[0]} and {pair[1]} have the same row in {tensors[0]}{more}, so that no token tells "
        f"them apart there{why}"
    )
