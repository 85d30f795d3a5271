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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.disk import write_at
from merge.errors import OutputError, ReadError, WriteError
from merge.numerics import STORAGE, Raw
from merge.plan import Plan, Step
from merge.sources.safetensors import INDEX, SINGLE
from merge.stream import StepDigests
from merge.verify import Place, check_stored, stored_digest

ALIGNMENT = 4096  # bytes, a page: what starts there is written and read twice as fast
LOCK, JOURNAL, MODEL, REPLACED = "lock", "journal.jsonl", "model", "replaced"
TRAINING = "training"  # where a training of routers stands


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
    size = 0
    for step in plan.steps:
        if groups[-1] and size + step.nbytes > plan.shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(step)
        size += step.nbytes
    if len(groups) == 1:
        return [_shard(SINGLE, groups[0])]
    return [
        _shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def index_text(plan: Plan, shards: Sequence[Shard]) -> str:
    """The shard index: which file holds which tensor."""
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": plan.write_bytes}, "weight_map": weight_map}
    return json.dumps(index, indent=2) + "\n"


def _shard(file: str, steps: Sequence[Step]) -> Shard:
    """Tensors of whole pages first, so that all of them start at one; then wider dtypes first: torch
    reads a tensor in place only where it starts at a multiple of its values' size."""
    steps = sorted(steps, key=lambda s: (s.nbytes % ALIGNMENT > 0, -STORAGE[s.dtype].itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        header[step.name] = {
            "dtype": step.dtype,
            "shape": step.shape,
            "data_offsets": [end, end + step.nbytes],
        }
        end += step.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    offsets = {step.name: start + header[step.name]["data_offsets"][0] for step in steps}
    return Shard(file, struct.pack("<Q", len(text)) + text, offsets, start + end)


class PartialFolder:
    """The output while it grows; a Writer for the engine. Use as a context: it holds a lock.

    Raises OutputError when another run holds the lock, or when what lies there is of another merge.
    """

    def __init__(self, final: Path, plan: Plan, *, threads: int = 1, restart: bool = False) -> None:
        self.plan = plan
        self.threads = threads
        self.final = final
        self.partial = partial_of(final)
        self.model = self.partial / MODEL
        self.shards = layout(plan)
        self.digests: dict[str, StepDigests] = {}
        self._restart = restart
        self._places = {name: (s.file, at) for s in self.shards for name, at in s.offsets.items()}
        self._descriptors: dict[str, int] = {}
        self._journal: int | None = None
        self._journal_lock = threading.Lock()

    def __enter__(self) -> "PartialFolder":
        self._lock = take_lock(self.final)
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

    def write(self, step: Step, first_row: int, rows: Raw, digests: Sequence[bytes]) -> None:
        """Puts whole grains of a step's tensor in their place and reads them back from there.

        digests: one of each grain; VerifyError where the file holds something else.
        """
        file, start = self._places[step.name]
        position = start + first_row * (step.nbytes // max(1, step.rows))
        with writing(self.model / file):
            stored = rows.reshape(-1).view("u1").data
            write_at(self._descriptors[file], [stored], position, uncached=True)
        check_stored(self.model, step.name, self._place(step), first_row, digests)

    def _place(self, step: Step) -> Place:
        file, start = self._places[step.name]
        return Place(self._descriptors[file], start, step.shape, step.dtype)

    def finished(self, step: Step, digests: StepDigests) -> None:
        line = {"step": step.name, "output": digests.output, "inputs": digests.inputs}
        self._note(line)
        self.digests[step.name] = digests

    def offsets(self) -> dict[str, int]:
        """Where in its file every tensor lies that was read back or taken up."""
        return {name: self._places[name][1] for name in self.digests}

    def close_files(self) -> None:
        """Headers and index: from here on the files can be loaded. What the disk refused to take is
        told here at the latest."""
        for shard in self.shards:
            with writing(self.model / shard.file):
                os.pwrite(self._descriptors[shard.file], shard.header, 0)
                os.fsync(self._descriptors[shard.file])
        if len(self.shards) > 1:
            self.write_text(INDEX, index_text(self.plan, self.shards))

    def write_text(self, name: str, text: str) -> None:
        with writing(self.model / name):
            (self.model / name).write_text(text, encoding="utf-8")

    def publish(self) -> None:
        check_inputs(self.inputs)
        publish(self.final)

    # -- opening ------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.inputs = input_stamps(self.plan)
        journal = self.partial / JOURNAL
        if self._restart:
            with writing(journal):
                journal.unlink(missing_ok=True)
        lines, whole_bytes = read_journal(journal)
        if lines:
            check_same(self.partial, lines[0], self.plan.digest, self.inputs)
        with writing(self.model):
            if not lines:
                shutil.rmtree(self.model, ignore_errors=True)
            self.model.mkdir(exist_ok=True)
            self._open_files()
            self._journal = os.open(
                journal, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
            os.ftruncate(self._journal, whole_bytes)
        if not lines:
            self._note({"plan": self.plan.digest, "inputs": self.inputs})
        self._take_up(lines[1:])

    def _open_files(self) -> None:
        for shard in self.shards:
            descriptor = os.open(
                self.model / shard.file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644
            )
            self._descriptors[shard.file] = descriptor
            if os.fstat(descriptor).st_size != shard.size:
                # not fallocate, which made writing a quarter slower; check_disk saw that there is room
                os.ftruncate(descriptor, 0)
                os.ftruncate(descriptor, shard.size)

    def _take_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Counts journalled steps as done whose bytes are still there (a power cut can lose them)."""
        steps = {step.name: step for step in self.plan.steps}

        def still_there(line: Mapping[str, Any]) -> bool:
            step = steps.get(str(line.get("step")))
            if step is None or not isinstance(line.get("inputs"), list):
                return False
            try:
                found = stored_digest(self._place(step))
            except OSError:  # the disk does not give it back: it is written anew
                return False
            return found == line.get("output") and len(line["inputs"]) == len(step.inputs)

        with ThreadPoolExecutor(self.threads) as pool:
            for line, good in zip(lines, pool.map(still_there, lines), strict=True):
                if good:
                    digests = StepDigests(line["output"], tuple(line["inputs"]))
                    self.digests[line["step"]] = digests

    def _note(self, line: Mapping[str, Any]) -> None:
        with self._journal_lock, writing(self.partial):
            assert self._journal is not None
            text = json.dumps(line).encode() + b"\n"
            if os.write(self._journal, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def take_lock(final: Path) -> int:
    """The descriptor of a lock on what grows into `final`, until it is closed; raises OutputError."""
    partial = partial_of(final)
    check_own(partial)
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(lock).st_nlink:  # the run that held it finished and tidied up
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise OutputError(
            f"{final}: another run is writing there; wait for it or choose another output"
        ) from None
    return lock


def publish(final: Path) -> None:
    """Gives what has grown its name; a former folder is kept until then."""
    partial = partial_of(final)
    replaced = partial / REPLACED
    with writing(final):
        if final.is_dir() and any(final.iterdir()):
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        (partial / MODEL).rename(final)
    shutil.rmtree(partial, ignore_errors=True)


def check_inputs(stamps: Mapping[str, Sequence[int]]) -> None:
    """Raises ReadError when an input file is not what it was when this run began."""
    for path, before in stamps.items():
        if _stamp(Path(path)) != list(before):
            raise ReadError(f"{path}: changed while it was being merged; start over with --restart")


def check_same(
    partial: Path, begun: Mapping[str, Any], plan: str, inputs: Mapping[str, Sequence[int]]
) -> None:
    """Raises OutputError unless the first line of a journal is of this plan over these input files."""
    if begun.get("plan") != plan:
        raise OutputError(
            f"{partial}: holds an unfinished merge of another recipe; give --restart to discard it, "
            f"finish it by its own recipe, or choose another output"
        )
    before = begun.get("inputs", {})
    for path in (*before, *inputs):
        if inputs.get(path) != before.get(path):
            raise OutputError(
                f"{path}: changed since the merge in {partial} was interrupted; "
                f"restore it, or give --restart to begin again"
            )
    if list(before) != list(inputs):
        raise OutputError(
            f"{partial}: holds an unfinished merge of these models in another order; "
            f"give --restart to discard it"
        )


def input_stamps(plan: Plan) -> dict[str, list[int]]:
    """Size and modification time of every weight file that the plan reads."""
    return {str(file): _stamp(file) for model in plan.models for file in model.files()}


def _stamp(file: Path) -> list[int]:
    try:
        stat = file.stat()
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]


def read_journal(journal: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole lines of a journal and their bytes; the last one may have been cut off by a kill."""
    lines: list[dict[str, Any]] = []
    size = 0
    for raw in journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else ():
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
        size += len(raw) + 1
    return lines, size


def partial_of(final: Path) -> Path:
    """Where the output grows while it is not whole."""
    return final.with_name(final.name + ".partial")


def discard_leftover(final: Path) -> None:
    """Removes what a run that was killed in its last act left beside its finished merge."""
    partial = partial_of(final)
    if not partial.is_dir() or (partial / MODEL).exists():
        return  # there is none, or it is another merge that is not finished
    with (partial / LOCK).open("a") as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(partial, ignore_errors=True)


def check_own(partial: Path) -> None:
    """Raises OutputError when `partial` is there but is not from a run of ours."""
    if not partial.exists() and not partial.is_symlink():
        return
    names = {p.name for p in partial.iterdir()} if partial.is_dir() else {"a file"}
    if not names <= {LOCK, JOURNAL, MODEL, REPLACED, TRAINING} or names == {MODEL}:
        raise OutputError(
            f"{partial}: is needed for the unfinished merge, but holds something else; move it "
            f"or choose another output"
        )


class writing:  # noqa: N801 - reads as a statement
    """Turns an OSError into a WriteError that names the place and says what to do."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(
                f"{self._place}: the disk is full; free some room and run the same command, "
                f"which goes on from here"
            ) from None
        raise WriteError(f"{self._place}: cannot be written: {error.strerror or error}") from None
