"""What tests of searches share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch with one thread: a process that is forked from one with others waits for them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def noted(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[type, str, Callable[[Any], str]], list[str]]:
    """Notes calls of a method, by name: the list to which each adds what is said of its object."""

    def note(kind: type, name: str, said: Callable[[Any], str]) -> list[str]:
        found: list[str] = []
        method = getattr(kind, name)

        def noting(it: Any, *arguments: Any) -> Any:
            found.append(said(it))
            return method(it, *arguments)

        monkeypatch.setattr(kind, name, noting)
        return found

    return note
