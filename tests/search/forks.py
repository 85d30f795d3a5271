"""Work in a process of its own, which may be killed at any moment of it."""

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import sqlalchemy

from merge.search.live import LiveModel
from merge.search.panel import Panel

KILLED = -signal.SIGKILL


def forked(work: Callable[[], object]) -> int:
    """The number of the process that does it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def ended(process: int) -> int:
    """How it ended: 0, or KILLED."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, KILLED)
    return status


def is_killed(work: Callable[[], object]) -> bool:
    """Whether it was killed in the middle; else it came to its end."""
    return ended(forked(work)) == KILLED


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(last: int) -> None:
    """Has whatever a search does announce itself before and after it was done; the last one kills."""
    moment = _Moments(last)
    for event in ("before_cursor_execute", "after_cursor_execute", "commit"):
        sqlalchemy.event.listen(sqlalchemy.Engine, event, moment)
    LiveModel.write = _around(LiveModel.write, moment)  # type: ignore[method-assign]
    Panel.marks = _around(Panel.marks, moment)  # type: ignore[method-assign]


class _Moments:
    """Counts, and kills its process at the last one."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            die()


def _around(done: Callable[..., Any], moment: _Moments) -> Callable[..., Any]:
    def announced(*arguments: Any) -> Any:
        moment()
        result = done(*arguments)
        moment()
        return result

    return announced
