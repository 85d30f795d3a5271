"""How a plan fits into a memory cap: block size, threads, and the projected peak."""

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass

from merge.errors import PlanError
from merge.numerics import grain_rows
from merge.plan import Plan, Step
from merge.recipe import parse_size

RESERVED = 112 << 20  # bytes: interpreter, numpy, libraries, plan; 74 MiB measured for a 1 B model
BLOCK = 4 << 20  # bytes of one input read at once: larger gains nothing, smaller costs calls
SLACK = 1.25  # freed arrays that the allocator keeps, over those alive
STATISTIC = 1 << 20  # bytes per model and thread of a statistics pass: counts and their copy
FIXED_ARRAYS = 4  # float32 grains alive per thread beside those counted per model
DEFAULT_MEMORY = "512MiB"


@dataclass(frozen=True)
class Budget:
    """Sizes in bytes. `block`: one input's part of a block; `hold`: inputs of one tensor kept between
    passes, in each of `slots` buffers (0: always read again); `peak`: projected for the process."""

    threads: int
    block: int
    hold: int
    slots: int
    peak: int


def make_budget(plan: Plan, memory: str = DEFAULT_MEMORY, threads: int | None = None) -> Budget:
    """The fastest way to run `plan` within `memory`; PlanError names the smallest cap that would do."""
    cap = parse_size(memory)
    wanted = threads or len(os.sched_getaffinity(0))
    for count in range(wanted, 0, -1):
        for block in (BLOCK, BLOCK // 4, 0):
            base = RESERVED + count * _per_thread(plan, block)
            if base <= cap:
                return _with_holds(plan, count, block, base, cap)
    smallest = RESERVED + _per_thread(plan, 0)
    raise PlanError(
        f"--memory {memory} is too small for this merge; {-(-smallest >> 20)}MiB is the least that would do"
    )


def _with_holds(plan: Plan, threads: int, block: int, base: int, cap: int) -> Budget:
    sizes = [held_bytes(s) for s in plan.steps if not s.copy and grains(s) > 1] if plan.recipe.method.passes else []
    slots = 2 if sizes else 0
    room = (cap - base) // slots if slots else 0
    hold = max((size for size in sizes if size <= room), default=0)
    return Budget(threads, block, hold, slots if hold else 0, base + slots * hold)


def held_bytes(step: Step) -> int:
    """Memory for all inputs of a step, each starting at a cache line."""
    return sum(aligned(operand.info.nbytes) for operand in step.inputs)


def aligned(size: int) -> int:
    return -(-size // 64) * 64


def grains(step: Step) -> int:
    return -(-step.rows // grain_rows(step.shape))


def block_rows(step: Step, block: int) -> int:
    """Rows of one block: whole grains, about `block` bytes of the widest input, at least one grain."""
    grain = grain_rows(step.shape)
    widest = max((o.info.row_bytes for o in step.inputs), default=1)
    return min(grain * max(1, block // max(1, grain * widest)), max(1, step.rows))


def _per_thread(plan: Plan, block: int) -> int:
    return max((_thread_bytes(plan, step, block) for step in _distinct(plan.steps)), default=0)


def _thread_bytes(plan: Plan, step: Step, block: int) -> int:
    rows = block_rows(step, block)
    raw = rows * (sum(o.info.row_bytes for o in step.inputs) + step.nbytes // max(1, step.rows))
    if step.copy:
        return raw
    method = plan.recipe.method
    arrays = len(step.inputs) + method.workspace * len(step.operands) + FIXED_ARRAYS
    floats = arrays * min(grain_rows(step.shape), step.rows) * step.cols * 4
    statistics = STATISTIC * len(step.operands) * 2 if method.passes else 0
    return raw + int(SLACK * floats) + statistics


def _distinct(steps: Iterable[Step]) -> Iterable[Step]:
    """One step of each shape and kind; a 70 B model has few."""
    return {(s.shape, s.dtype, s.copy, tuple(o.info.dtype for o in s.inputs)): s for s in steps}.values()


def keep_freed_memory() -> None:
    """Tells glibc to keep freed arrays for the next block instead of returning them to the system.

    The arrays of a block are allocated and freed thousands of times; page faults made a TIES merge
    3 times slower (42 against 13 ns per value). Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 256 << 20)
    mallopt(top_pad, 4 << 20)
