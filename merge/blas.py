"""Matrix products that give the same bits whatever the number of threads around them."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

Matrix = NDArray[np.float64]


def product(a: Matrix, b: Matrix) -> Matrix:
    """a @ b in this thread alone: the order of its sums depends on the shapes."""
    with one_thread_each():
        return a @ b


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keeps numpy's BLAS from starting threads of its own while any thread is in here."""
    _limit.enter()
    try:
        yield
    finally:
        _limit.leave()


class _Limit:
    """The setting is one for the whole process: the first that comes sets it, the last restores it."""

    def __init__(self) -> None:
        self._lock, self._inside, self._undo = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._undo.enter_context(_controller().limit(limits=1, user_api="blas"))
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries: once is enough


_limit = _Limit()
