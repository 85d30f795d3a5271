"""What the experts of a mixture are called."""

from pathlib import Path

from merge.errors import SourceError
from merge.sources.model import read_json
from merge.verify import PROVENANCE

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


def _of_the_recipe(folder: Path) -> list[str] | None:
    try:
        entries = read_json(folder / PROVENANCE)["recipe"][-1]["experts"]
        return [e.get("name") or _last(e.get("source_model") or e["adapter"]) for e in entries]
    except (SourceError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _last(model: str) -> str:
    """The last part of a model's public name."""
    return model.rpartition("+")[2].rpartition("/")[2].rpartition(":")[2]
