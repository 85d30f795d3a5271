"""What the experts of a mixture are called, and how its routers were made, as far as its folder tells."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from merge.experts.sections import Mode
from merge.sources.inside import base_inside
from merge.sources.model import Model, read_json
from merge.verify import provenance_of

MODES = get_args(Mode)
KEY = "expert_names"  # of config.json of a stock mixture whose experts were changed


def expert_names(folder: Path, count: int) -> list[str]:
    """The `count` experts of the mixture in `folder` as config.json calls them, else the recipe that made it;
    else their numbers."""
    config = read_json(folder / "config.json")
    told = config.get("mixture")
    named = told.get("experts") if isinstance(told, dict) else config.get(KEY)
    named = named or _of_the_recipe(folder)
    fits = isinstance(named, list) and len(named) == count == len(set(map(str, named)))
    return [str(name) for name in named] if fits and named else [str(i) for i in range(count)]


def told_mode(folder: Path) -> str:
    """The router mode of the recipe that made the mixture in `folder`, "" where none is told."""
    recipe = _recipe(folder)
    router = recipe.get("router")
    mode = (router.get("mode") if isinstance(router, dict) else None) or recipe.get("gate_mode")
    return str(mode) if mode in MODES else ""


def is_trained(folder: Path) -> bool:
    """Whether the routers of the mixture in `folder` have learnt."""
    return bool((provenance_of(folder) or {}).get("training"))


def told_base(folder: Path) -> str:
    """What the recipe that made the mixture in `folder` calls its base, "" where none is told."""
    return str(_recipe(folder).get("base_model") or "")


def former_base(model: Model) -> Model:
    """The base inside of a mixture of adapters (see base_inside), also known by what the recipe that made the
    mixture calls it; any other model as it is."""
    inside, told = base_inside(model), told_base(model.folder)
    return replace(inside, known_as=(told,)) if inside.within and told else inside


def _of_the_recipe(folder: Path) -> list[str] | None:
    try:
        entries = _recipe(folder)["experts"]
        return [e.get("name") or _last(e.get("source_model") or e["adapter"]) for e in entries]
    except (KeyError, TypeError, AttributeError):
        return None


def _recipe(folder: Path) -> Mapping[str, Any]:
    """The last document of the recipe that made what is in `folder`; empty where none is told."""
    documents = (provenance_of(folder) or {}).get("recipe")
    found = documents[-1] if isinstance(documents, list) and documents else None
    return found if isinstance(found, dict) else {}


def _last(model: str) -> str:
    """The last part of a model's public name."""
    return model.rpartition("+")[2].rpartition("/")[2].rpartition(":")[2]
