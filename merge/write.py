"""safetensors written at fixed places in any order, a journal of finished steps, an atomic finish.

While a merge into OUT runs, everything lies in OUT.partial: `model/` (the files at their full size),
`journal.jsonl` (one line per finished step) and `lock`. The last act is the rename of `model/` to OUT,
so OUT is either absent or whole. Killed at any moment, the same command goes on from the journal.
"""

import errno
import fcntl
import json
import os
import shutil
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import OutputError, ReadError, WriteError
from merge.numerics import Raw
from merge.plan import Plan, Step
from merge.sources.safetensors import INDEX, SINGLE
from merge.stream import StepDigests
from merge.verify import stored_digest

HEADER_ALIGNMENT = 64  # bytes: so that tensors start at a cache line when a file is mapped


@dataclass(frozen=True)
class Shard:
    """One output file: its header and where each tensor's bytes start."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def layout(plan: Plan) -> list[Shard]:
    """The output files, tensors in plan order, each file closed before it would exceed the shard size."""
    groups: list[list[Step]] = [[]]
    for step in plan.steps:
        if groups[-1] and sum(s.nbytes for s in groups[-1]) + step.nbytes > plan.shard_bytes:
            groups.append([])
        groups[-1].append(step)
    if len(groups) == 1:
        return [_shard(SINGLE, groups[0])]
    return [
        _shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def _shard(file: str, steps: Sequence[Step]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        header[step.name] = {"dtype": step.dtype, "shape": step.shape, "data_offsets": [end, end + step.nbytes]}
        end += step.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    start = 8 + len(text)
    offsets = {step.name: start + header[step.name]["data_offsets"][0] for step in steps}
    return Shard(file, struct.pack("<Q", len(text)) + text, offsets, start + end)


class PartialFolder:
    """The output while it grows; a Writer for the engine. Use as a context: it holds a lock.

    Raises OutputError when another run holds the lock, or when what lies there is of another merge.
    """

    def __init__(self, final: Path, plan: Plan, *, restart: bool = False) -> None:
        self.plan = plan
        self.final = final
        self.partial = final.with_name(final.name + ".partial")
        self.model = self.partial / "model"
        self.shards = layout(plan)
        self.digests: dict[str, StepDigests] = {}
        self._restart = restart
        self._places = {name: (s.file, at) for s in self.shards for name, at in s.offsets.items()}
        self._descriptors: dict[str, int] = {}
        self._journal: int | None = None
        self._journal_lock = threading.Lock()

    def __enter__(self) -> "PartialFolder":
        with _writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OutputError(f"{self.final}: another run is writing there; wait for it or choose another output") from None
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (*self._descriptors.values(), self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors, self._journal = {}, None

    def pending(self) -> Iterator[Step]:
        """The steps that no journal line tells of."""
        return (step for step in self.plan.steps if step.name not in self.digests)

    def write(self, step: Step, first_row: int, rows: Sequence[Raw]) -> None:
        """Puts consecutive rows of a step's tensor in their place."""
        file, start = self._places[step.name]
        position = start + first_row * (step.nbytes // max(1, step.rows))
        buffers = [memoryview(part).cast("B") for part in rows if part.nbytes]
        with _writing(self.model / file):
            while buffers:
                done = os.pwritev(self._descriptors[file], buffers, position)
                position += done
                while buffers and done >= len(buffers[0]):
                    done -= len(buffers.pop(0))
                if buffers:
                    buffers[0] = buffers[0][done:]

    def finished(self, step: Step, digests: StepDigests) -> None:
        line = {"step": step.name, "output": digests.output, "inputs": digests.inputs}
        self._note(line)
        self.digests[step.name] = digests

    def close_files(self) -> None:
        """Headers and index: from here on the files can be loaded."""
        for shard in self.shards:
            with _writing(self.model / shard.file):
                os.pwrite(self._descriptors[shard.file], shard.header, 0)
        if len(self.shards) > 1:
            weight_map = {name: s.file for s in self.shards for name in s.offsets}
            index = {"metadata": {"total_size": self.plan.write_bytes}, "weight_map": weight_map}
            self.write_text(INDEX, json.dumps(index, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        with _writing(self.model / name):
            (self.model / name).write_text(text, encoding="utf-8")

    def publish(self) -> None:
        """Gives the finished folder its name; a former one is kept until then."""
        self.check_inputs()
        replaced = self.partial / "replaced"
        with _writing(self.final):
            if self.final.is_dir() and any(self.final.iterdir()):
                shutil.rmtree(replaced, ignore_errors=True)
                self.final.rename(replaced)
            self.model.rename(self.final)
            shutil.rmtree(self.partial)

    def check_inputs(self) -> None:
        """Raises ReadError when an input file is not what it was when this run began."""
        for path, before in self._inputs.items():
            if _stamp(Path(path)) != before:
                raise ReadError(f"{path}: changed while it was being merged; start over with --restart")

    # -- opening ------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._inputs = input_stamps(self.plan)
        journal = self.partial / "journal.jsonl"
        if self._restart:
            journal.unlink(missing_ok=True)
        lines = list(_read_journal(journal))
        if lines:
            self._check_same_merge(lines[0])
        with _writing(self.model):
            if not lines:
                shutil.rmtree(self.model, ignore_errors=True)
            self.model.mkdir(exist_ok=True)
            self._open_files()
            self._journal = os.open(journal, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        if not lines:
            os.ftruncate(self._journal, 0)
            self._note({"plan": self.plan.digest, "inputs": self._inputs})
        self._take_up(lines[1:])

    def _check_same_merge(self, begun: Mapping[str, Any]) -> None:
        if begun.get("plan") != self.plan.digest:
            raise OutputError(f"{self.partial}: holds an unfinished merge of another recipe; finish it, choose another output, or give --restart to discard it")
        for path, stamp in begun.get("inputs", {}).items():
            if self._inputs.get(path) != stamp:
                raise OutputError(f"{path}: changed since the merge in {self.partial} was interrupted; restore it, or give --restart to begin again")

    def _open_files(self) -> None:
        for shard in self.shards:
            descriptor = os.open(self.model / shard.file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            self._descriptors[shard.file] = descriptor
            if os.fstat(descriptor).st_size != shard.size:
                _allocate(descriptor, shard.size)

    def _take_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Counts journalled steps as done whose bytes are still there (a power cut can lose them)."""
        steps = {step.name: step for step in self.plan.steps}
        for line in lines:
            step = steps.get(line.get("step", ""))
            if step is None:
                continue
            file, start = self._places[step.name]
            if stored_digest(self._descriptors[file], start, step.shape, step.dtype) == line["output"]:
                self.digests[step.name] = StepDigests(line["output"], tuple(line["inputs"]))

    def _note(self, line: Mapping[str, Any]) -> None:
        with self._journal_lock, _writing(self.partial):
            assert self._journal is not None
            os.write(self._journal, json.dumps(line).encode() + b"\n")


def input_stamps(plan: Plan) -> dict[str, list[int]]:
    """Size and modification time of every weight file that the plan reads."""
    return {str(file): _stamp(file) for model in plan.models for file in model.files()}


def _stamp(file: Path) -> list[int]:
    try:
        stat = file.stat()
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]


def _read_journal(journal: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a journal; the last one may have been cut off by a kill."""
    if not journal.is_file():
        return
    for line in journal.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _allocate(descriptor: int, size: int) -> None:
    """Room for the whole file at once, so that a full disk is met before the work."""
    os.ftruncate(descriptor, 0)
    try:
        os.posix_fallocate(descriptor, 0, max(1, size))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


class _writing:
    """Turns an OSError into a WriteError that names the place and says what to do."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(f"{self._place}: the disk is full; free some room and run the same command, which goes on from here") from None
        raise WriteError(f"{self._place}: cannot be written: {error.strerror or error}") from None
