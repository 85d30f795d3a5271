"""Files that come with the package: recipes, suites and the tiny model family."""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "shipped"  # in a wheel; in a checkout they lie beside merge/


def shipped(place: str) -> Path:
    """Folder or file of the project, such as 'recipes/quickstart.yaml' or 'evals/zoo/base'."""
    return (_PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent) / place


def shipped_recipes() -> dict[str, Path]:
    """Those that are known by name."""
    return {file.stem: file for file in sorted(shipped("recipes").glob("*.yaml"))}
