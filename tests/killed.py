"""Runs a merge in a process of its own that is killed at a chosen change of the disk, half done."""

import mmap
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merge.pipeline import run_recipe


def run_killed(recipe: Path, out: Path, at: int, **options: Any) -> bool:
    """Whether the run was killed at its `at`-th change of the disk; False: it came to its end."""
    return _status(recipe, out, _Changes(at), options) == -signal.SIGKILL


def changes(recipe: Path, out: Path, **options: Any) -> int:
    """How many changes of the disk a whole run makes."""
    counted = _Changes(None)
    _status(recipe, out, counted, options)
    shutil.rmtree(out)
    return int.from_bytes(counted.count[:], "little")


def _status(recipe: Path, out: Path, changes: "_Changes", options: Mapping[str, Any]) -> int:
    """Exit code of a process that runs the recipe; negative: the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _announce(changes)
            run_recipe(recipe, out, **options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status


class _Changes:
    """Counts changes of the disk, for the parent too; kills its process at the `at`-th."""

    def __init__(self, at: int | None) -> None:
        self._at, self._lock = at, threading.Lock()
        self.count = mmap.mmap(-1, 8)

    def __call__(self, half: Callable[[], object]) -> None:
        with self._lock:
            count = int.from_bytes(self.count[:], "little") + 1
            self.count[:] = count.to_bytes(8, "little")
            if count == self._at:
                half()
                os.kill(os.getpid(), signal.SIGKILL)


def _announce(step: _Changes) -> None:
    """Has every change of the disk announce itself with a way to do only half of it."""
    pwritev, write, pwrite, truncate = os.pwritev, os.write, os.pwrite, os.ftruncate
    rename, write_text, mkdir = Path.rename, Path.write_text, Path.mkdir
    copyfile, rmtree = shutil.copyfile, shutil.rmtree

    def half_pwritev(descriptor: int, buffers: Any, position: int, flags: int = 0) -> int:
        step(lambda: pwrite(descriptor, bytes(buffers[0])[: len(buffers[0]) // 2], position))
        return pwritev(descriptor, buffers, position, flags)

    def half_write(descriptor: int, data: bytes) -> int:
        step(lambda: write(descriptor, data[: len(data) // 2]))
        return write(descriptor, data)

    def half_pwrite(descriptor: int, data: bytes, position: int) -> int:
        step(lambda: pwrite(descriptor, data[: len(data) // 2], position))
        return pwrite(descriptor, data, position)

    def half_truncate(descriptor: int, size: int) -> None:
        step(lambda: truncate(descriptor, size // 2))
        truncate(descriptor, size)

    def half_write_text(path: Path, text: str, **more: Any) -> int:
        step(lambda: write_text(path, text[: len(text) // 2], **more))
        return write_text(path, text, **more)

    def half_copyfile(source: Path, target: Path) -> None:
        step(lambda: write_text(Path(target), "half"))
        copyfile(source, target)

    def no_rename(path: Path, target: Path) -> Path:
        step(lambda: None)
        return rename(path, target)

    def no_mkdir(path: Path, *arguments: Any, **more: Any) -> None:
        step(lambda: None)
        mkdir(path, *arguments, **more)

    def half_rmtree(path: Path, **more: Any) -> None:
        step(lambda: [file.unlink() for file in sorted(Path(path).glob("*"))[:1] if file.is_file()])
        rmtree(path, **more)

    os.pwritev, os.write, os.pwrite, os.ftruncate = (
        half_pwritev,
        half_write,
        half_pwrite,
        half_truncate,
    )  # type: ignore[assignment]
    Path.rename, Path.write_text, Path.mkdir = no_rename, half_write_text, no_mkdir  # type: ignore[assignment, method-assign]
    shutil.copyfile, shutil.rmtree = half_copyfile, half_rmtree  # type: ignore[assignment]
