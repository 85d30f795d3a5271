"""Names of tensors on disk and of parameters in memory: alike but for how they begin."""

from collections.abc import Collection
from functools import cached_property


class Names:
    """Finds a tensor by a name that may begin otherwise.

    Models are stored with more, fewer or other first parts than the modules have that transformers makes
    (`model.`, `language_model.`); the parts from the first number on are always the same.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def fitting(self, wanted: str) -> list[str]:
        """The name for `wanted`: the same, or the only one that ends alike; else none, or several."""
        if wanted in self._names:
            return [wanted]
        parts = wanted.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
        for start in range(number + 1):
            if found := self._endings.get(".".join(parts[start:]), ()):
                alike = [name for name in found if set(parts) <= set(name.split("."))]
                return list(alike if len(alike) == 1 else found)
        return []

    @cached_property
    def _endings(self) -> dict[str, list[str]]:
        """The names by every end of theirs."""
        found: dict[str, list[str]] = {}
        for name in self._names:
            parts = name.split(".")
            for start in range(len(parts)):
                found.setdefault(".".join(parts[start:]), []).append(name)
        return found
