"""The only loop over blocks: reads the inputs of a step, merges them, hands on the rows.

Whatever a thread does lies between two calls of numpy or the operating system that release the
interpreter, so that plain threads use all cores. A step whose method knows the whole tensor first
(statistics passes) keeps its inputs in memory between passes where they fit; otherwise it reads again.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from merge.budget import Budget, aligned, block_rows, held_bytes
from merge.finite import check_grain, check_input
from merge.formula import Formula, Measuring, Merging
from merge.methods import Passes, Request, Statistic
from merge.numerics import (
    STORAGE,
    Raw,
    combined_digest,
    grain_digest,
    grains,
)
from merge.plan import Plan, Step
from merge.reader import Reader, driven, reduced

Block = tuple[int, int]  # first row, end row; whole grains
InPlace = Callable[[Step, int, int], Raw | None]


@dataclass(frozen=True)
class StepDigests:
    """Digests of a finished step: of its output and of each input, the base first."""

    output: str
    inputs: tuple[str, ...]


class Memory(Protocol):
    """Of what statistics passes found out about steps, from one run to the next."""

    def known(self, step: Step) -> Any:
        """What they found out; None where it is not known, or there are none."""

    def keep(self, step: Step, stats: Any) -> None: ...


class Writer(Protocol):
    def write(self, step: Step, first_row: int, rows: Raw, digests: Sequence[bytes]) -> None:
        """Takes rows of whole grains, and the digest of each grain where there is one."""

    def finished(self, step: Step, digests: StepDigests) -> None: ...


def run(
    plan: Plan,
    budget: Budget,
    writer: Writer,
    steps: Iterable[Step],
    progress: Callable[[int], None] = lambda _: None,
    *,
    in_place: InPlace | None = None,
    memory: Memory | None = None,
) -> None:
    """Runs `steps` of `plan`. progress(n): n more bytes were read or written.

    in_place(step, first, end): memory for these rows of the result as they are stored, or None where the
    writer is to be given them. Then nothing comes to a disk and the same inputs will be read again: they are
    mapped where they can be, nothing is digested. memory: of what statistics passes found out in other runs.

    Raises ReadError, NonFiniteError or WriteError; what finished before it was handed to the writer.
    """
    slots = _Slots(budget)
    reader = Reader(plan, fuse=budget.fuse)
    allow = plan.recipe.sections.allow_nonfinite
    with _Crew(budget.threads) as crew:
        for step in steps:
            job = _Job(
                reader,
                step,
                Formula(step, budget.fuse, allow),
                writer,
                progress,
                block_rows(step, budget.block),
                in_place,
                memory,
            )
            if len(job.blocks) == 1:
                crew.submit(job.run_alone)
            else:
                _run_in_blocks(job, crew, slots)


def _run_in_blocks(job: "_Job", crew: "_Crew", slots: "_Slots") -> None:
    """Statistics passes wait for all blocks; the last pass does not, so that steps overlap."""
    passes = job.passes()
    held = slots.take(job.step, crew.check) if passes and job.in_place is None else None
    if held is not None:
        job.hold(held)
    stats = job.found_out(passes, lambda request: _over_all_blocks(crew, job, request))
    merging = job.merging(stats)
    remaining = _Countdown(len(job.blocks), lambda: slots.give(held))
    for block in job.blocks:
        crew.submit(job.emit, block, merging, remaining)


def _over_all_blocks(crew: "_Crew", job: "_Job", request: Request) -> Statistic:
    """A statistic over all grains: integers added as they come, floats in the order of the grains."""
    total = _Total(request)
    measuring = job.formula.measuring(request)
    crew.map(lambda block: total.add(block, job.measured(block, measuring)), job.blocks)
    job.was_read = True
    return total.value()


@dataclass
class _Job:
    """One step on its way: its blocks, its inputs held in memory or not, its digests so far."""

    reader: Reader
    step: Step
    formula: Formula
    writer: Writer
    progress: Callable[[int], None]
    rows: int
    in_place: InPlace | None = None
    memory: Memory | None = None
    was_read: bool = False  # every block was read (and digested) once
    was_checked: bool = field(init=False)  # and nothing in them is NaN or infinity, or it may be
    held: list[Raw] | None = None
    output_digests: dict[int, bytes] = field(default_factory=dict)
    input_digests: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = self.memory.known(self.step) if self.memory else None
        self.was_checked = self.formula.allow_nonfinite

    @property
    def blocks(self) -> list[Block]:
        total = self.step.rows
        return [(a, min(a + self.rows, total)) for a in range(0, total, self.rows)] or [(0, 0)]

    def passes(self) -> Passes | None:
        """The statistics passes that have to be made."""
        return None if self._known is not None else self.formula.passes()

    def found_out(self, passes: Passes | None, measured: Callable[[Request], Statistic]) -> Any:
        """What they find out, or is known of them."""
        if passes is None:
            return self._known
        stats = driven(passes, lambda request: self._checked(measured(request)))
        if self.memory:
            self.memory.keep(self.step, stats)
        return stats

    def merging(self, stats: Any) -> Merging | None:
        return None if self.step.copy else self.formula.merging(stats)

    def hold(self, memory: Raw) -> None:
        """Uses `memory` (bytes) for all inputs of the step."""
        self.held = list(_split(memory, self.step, self.step.rows))

    def run_alone(self) -> None:
        """The whole step in one thread; its one block is read once."""
        inputs = self._fetch(self.blocks[0])
        self.was_read, self.held = True, inputs
        stats = self.found_out(self.passes(), self._over_one_block)
        self.emit(self.blocks[0], self.merging(stats), _Countdown(1, lambda: None))

    def _checked(self, statistic: Statistic) -> Statistic:
        """`statistic`, after a pass that saw all blocks."""
        self.was_checked = True
        return statistic

    def _over_one_block(self, request: Request) -> Statistic:
        return reduced(request, self.measured(self.blocks[0], self.formula.measuring(request)))

    def measured(self, block: Block, measuring: Measuring) -> list[Statistic]:
        """The statistics of a block: one for each grain, or one for all."""
        inputs = self._fetch(block)
        found, finite = measuring((inputs, block[0] * self.step.cols))
        if not finite and not self.was_checked:
            for index, rows in enumerate(inputs):
                check_input(self.reader.plan, self.step, index, rows, block[0])
        return found

    def emit(self, block: Block, merging: Merging | None, remaining: "_Countdown") -> None:
        """Merges a block (merging None: copies it) and writes it; the last one completes the step."""
        inputs, (first, end) = self._fetch(block), block
        rows = into = self.in_place(self.step, first, end) if self.in_place else None
        if merging is None:
            rows = inputs[0]
        elif rows is None:
            rows = np.empty((end - first, self.step.cols), STORAGE[self.step.dtype])
        assert rows is not None
        if merging and not merging((inputs, first * self.step.cols), rows):
            self._check_result(inputs, rows, first)
        digests: list[bytes] = []
        if not self.in_place:
            for a, b in grains(self.step.shape, *block):
                # what is copied has the digest that it had as an input
                copied = None if merging else self.input_digests[0, a]
                digests.append(copied or grain_digest(rows[a - first : b - first]))
                self.output_digests[a] = digests[-1]
        self.progress(rows.nbytes)
        if rows.size and rows is not into:
            self.writer.write(self.step, first, rows, digests)
        if remaining.last():
            self.writer.finished(self.step, self._digests())

    def _check_result(self, inputs: Sequence[Raw], rows: Raw, first: int) -> None:
        if not self.formula.allow_nonfinite:
            unseen = () if self.was_checked else inputs
            check_grain(self.reader.plan, self.step, unseen, rows, first)

    def _fetch(self, block: Block) -> list[Raw]:
        """The stored rows of all inputs; digested the first time."""
        first, end = block
        held = None if self.held is None else [raw[first:end] for raw in self.held]
        if held is not None and self.was_read:
            return held
        buffers = held or _buffers.views(self.step, end - first)
        for index, operand in enumerate(self.step.inputs):
            mapped = self.reader.mapped(operand, first, end) if self.in_place else None
            if mapped is None:
                rows = buffers[index]
                self.reader.read(operand, first, end, rows.reshape(-1).view(np.uint8).data)
            else:
                rows = buffers[index] = mapped
            if not self.was_read:
                if self.step.copy and not self.formula.allow_nonfinite:
                    check_input(self.reader.plan, self.step, index, rows, first)
                for a, b in () if self.in_place else grains(self.step.shape, *block):
                    self.input_digests[index, a] = grain_digest(rows[a - first : b - first])
                self.progress(rows.nbytes)
        return buffers

    def _digests(self) -> StepDigests:
        count = len(self.step.inputs)
        starts = sorted(self.output_digests)
        inputs = tuple(
            combined_digest(self.input_digests[i, a] for a in starts) for i in range(count)
        )
        return StepDigests(combined_digest(self.output_digests[a] for a in starts), inputs)


class _Buffers(threading.local):
    """Memory of a thread for one block of all inputs, used again for every block."""

    memory: Raw = np.empty(0, np.uint8)

    def views(self, step: Step, rows: int) -> list[Raw]:
        """Arrays [rows, cols] of the stored types of the step's inputs."""
        sizes = [rows * operand.info.row_bytes for operand in step.inputs]
        if self.memory.size < sum(map(aligned, sizes)):
            self.memory = np.empty(sum(map(aligned, sizes)), np.uint8)
        return list(_split(self.memory, step, rows))


_buffers = _Buffers()


def _split(memory: Raw, step: Step, rows: int) -> Iterator[Raw]:
    """`memory` (bytes) cut into arrays [rows, cols] for each input, each at a cache line."""
    start = 0
    for operand in step.inputs:
        size = rows * operand.info.row_bytes
        part = memory[start : start + size]
        yield part.view(STORAGE[operand.info.dtype]).reshape(rows, step.cols)
        start += aligned(size)


class _Total:
    """What a request finds, from statistics that threads bring in any order."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._lock = threading.Lock()
        self._sum: Statistic | None = None
        self._floats: dict[Block, list[Statistic]] = {}

    def add(self, block: Block, parts: list[Statistic]) -> None:
        with self._lock:
            if parts[0].dtype.kind not in "iu":
                self._floats[block] = parts
            elif self._sum is None:
                self._sum = parts[0]
            else:
                self._sum += parts[0]

    def value(self) -> Statistic:
        if self._sum is not None:
            return self._sum
        parts = [part for block in sorted(self._floats) for part in self._floats[block]]
        return reduced(self._request, parts)


class _Countdown:
    """Tells which of `count` callers is the last, after calling `then` once."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left, self._then, self._lock = count, then, threading.Lock()

    def last(self) -> bool:
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._then()
        return is_last


class _Slots:
    """Two buffers for held inputs: one step is being finished while the next is being read."""

    def __init__(self, budget: Budget) -> None:
        self._size = budget.hold
        self._free = threading.Semaphore(budget.slots)
        self._idle: list[Raw] = []

    def take(self, step: Step, check: Callable[[], None]) -> Raw | None:
        """Memory for the inputs of `step`, or None where they do not fit; `check` raises to give up."""
        if not self._size or held_bytes(step) > self._size:
            return None
        while not self._free.acquire(timeout=0.1):
            check()
        return self._idle.pop() if self._idle else np.empty(self._size, np.uint8)

    def give(self, memory: Raw | None) -> None:
        if memory is not None:
            self._idle.append(memory)
            self._free.release()


class _Crew:
    """Threads that take tasks in order, those of `map` before others; the first error stops the taking and
    is raised at the next call."""

    def __init__(self, threads: int) -> None:
        self._first: deque[Callable[[], None]] = deque()
        self._rest: deque[Callable[[], None]] = deque()
        self._queues = threading.Condition()
        self._room = threading.Semaphore(4 * threads)
        self._closing = False
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"merge_{i}", daemon=True)
            for i in range(threads)
        ]

    def __enter__(self) -> "_Crew":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._error = self._error or error
        with self._queues:
            self._closing = True
            self._queues.notify_all()
        for thread in self._threads:
            thread.join()
        if self._error is not None and self._error is not error:
            raise self._error

    def submit(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Waits while many tasks wait."""
        self._room.acquire()
        self._put(self._rest, partial(self._guarded, task, *arguments, then=self._room.release))
        self.check()

    def map(self, task: Callable[[Block], None], blocks: Sequence[Block]) -> None:
        """All of them, when it returns."""
        done = threading.Semaphore(0)
        for block in blocks:
            self._put(self._first, partial(self._guarded, task, block, then=done.release))
        for _ in blocks:
            done.acquire()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _put(self, queue: "deque[Callable[[], None]]", task: Callable[[], None]) -> None:
        with self._queues:
            queue.append(task)
            self._queues.notify()

    def _work(self) -> None:
        while True:
            with self._queues:
                while not (self._first or self._rest or self._closing):
                    self._queues.wait()
                if not (self._first or self._rest):
                    return
                task = (self._first or self._rest).popleft()
            task()

    def _guarded(self, task: Callable[..., Any], *arguments: Any, then: Callable[[], None]) -> None:
        try:
            if self._error is None:
                task(*arguments)
        except BaseException as error:
            self._error = self._error or error
        finally:
            then()
