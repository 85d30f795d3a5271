"""AutoMerger's choice, written out: two different models of a pool, merged on an arc or as task vectors.

    preset: automerger
    models: [A, B, C]

is a recipe of two ways, whose base is the first model: 4 of 10 times SLERP whose t goes with the depth, one
way in attention and the other in the MLPs, else DARE-TIES of what the second model changed.
"""

from collections.abc import Mapping
from typing import Any

from merge.lines import Lines, nearest

PRESET = "automerger"
KEYS = ("merge_method", "base_model", "variants", "parameters", "slices", "modules")
ATTENTION, MLP = [0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0]
SLERP: dict[str, Any] = {
    "probability": 0.4,
    "merge_method": "slerp",
    "parameters": {
        "t": [
            {"filter": "self_attn", "value": ATTENTION},
            {"filter": "mlp", "value": MLP},
            {"value": 0.5},
        ]
    },
}
DARE_TIES: dict[str, Any] = {
    "probability": 0.6,
    "merge_method": "dare_ties",
    "parameters": {"density": 0.53, "weight": 0.6, "seed": 0},
}


def expanded(data: Mapping[str, Any], lines: Lines) -> dict[str, Any]:
    """The document with its preset written out; raises RecipeError."""
    given = data["preset"]
    if given != PRESET:
        what = f"preset is {given!r}{nearest(str(given), [PRESET])}; there is {PRESET}"
        raise lines.error(("preset",), what)
    for key in KEYS:
        if key in data:
            raise lines.error((key,), f"{key}: {PRESET} chooses it; take it out")
    rest = {key: value for key, value in data.items() if key not in ("preset", "models")}
    pool = {"pool": _pool(data, lines), "pick": 2, "base": "first"}
    return {"models": pool, "variants": [SLERP, DARE_TIES], **rest}


def _pool(data: Mapping[str, Any], lines: Lines) -> list[str]:
    models = data.get("models")
    pool = models.get("pool") if isinstance(models, dict) and len(models) == 1 else models
    names = [name for name in pool if isinstance(name, str)] if isinstance(pool, list) else []
    if not isinstance(pool, list) or len(names) < len(pool) or len(set(names)) < max(2, len(pool)):
        at = ("models",) if "models" in data else ("preset",)
        raise lines.error(at, f"models must be a list of two or more; {PRESET} merges any two")
    return names
