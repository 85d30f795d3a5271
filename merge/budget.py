"""How a plan fits into a memory cap: block size, threads, and the projected peak."""

import ctypes
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from merge.errors import PlanError
from merge.machine import available
from merge.numerics import grain_rows
from merge.plan import Operand, Plan, Step, every_step
from merge.sections import parse_size

RESERVED = 80 << 20  # bytes: interpreter, numpy, libraries; 40 to 55 MiB measured
PER_INPUT = 2 << 10  # bytes: of the plan and the journal, for every tensor read
COMPILER = 104 << 20  # bytes: LLVM with methods compiled; 76 MiB and 1 for each loop measured
BLOCK = 4 << 20  # bytes of one input read at once: larger gains nothing, smaller costs calls
SLACK = 1.25  # freed arrays that the allocator keeps, over those alive
STATISTIC = 1 << 20  # bytes per model and thread of a statistics pass: counts and their copy
OF_A_ROW = 64  # bytes per row of sums by row: three float64, joined, and what is made of them
FIXED_ARRAYS = 4  # float32 grains alive per thread beside those counted per model
DEFAULT_MEMORY = "512MiB"
FUSE_FROM = 1 << 26  # input values of a merge from which compiling (0.15 s) pays


@dataclass(frozen=True)
class Budget:
    """Sizes in bytes. `block`: one input's part of a block; `hold`: inputs of one tensor kept between
    passes, in each of `slots` buffers (0: always read again); `peak`: projected for the process.
    `fuse`: methods are compiled. `spare`: of the cap, what is left as long as no inputs are kept."""

    threads: int
    block: int
    hold: int
    slots: int
    peak: int
    fuse: bool
    spare: int = 0


def make_budget(
    plan: Plan,
    memory: str = DEFAULT_MEMORY,
    threads: int | None = None,
    *,
    fuse: bool | None = None,
) -> Budget:
    """The fastest way to run `plan` within `memory`; PlanError names the smallest cap that would do.

    fuse: whether methods are compiled; by default where it pays and the compiler fits.
    """
    wanted, cap = threads_and_cap(memory, threads)
    if plan.recipe.sections.allow_nonfinite:
        fuse = False  # a loop cannot tidy up the NaNs that it meets
    for compiled in [worth_fusing(plan), False] if fuse is None else [fuse]:
        for count in range(wanted, 0, -1):
            for block in (BLOCK, BLOCK // 4, 0):
                base = max(_base(plan, compiled, count, block), RESERVED + plan.parsing)
                if base <= cap:
                    return _with_holds(plan, count, block, base, cap, compiled)
    smallest = max(_base(plan, bool(fuse), 1, 0), RESERVED + plan.parsing)
    raise PlanError(
        f"--memory {memory} is too small for this merge; {-(-smallest >> 20)}MiB is the least that would do"
    )


def threads_and_cap(memory: str, threads: int | None) -> tuple[int, int]:
    """How many threads are wanted, and the bytes of `memory`; raises PlanError."""
    try:
        return threads or len(os.sched_getaffinity(0)), parse_size(memory)
    except ValueError as error:
        raise PlanError(f"--memory: {error}") from None


def worth_fusing(plan: Plan) -> bool:
    """Whether compiled methods are expected to save more time than compiling takes."""
    return sum(map(_values, plan.steps)) >= FUSE_FROM and available()


def _values(step: Step) -> int:
    """Input values that compiled loops could take, those of steps within it included."""
    within = sum(_values(operand.step) for operand in step.inputs if operand.step)
    return within + (not step.copy) * step.rows * step.cols * len(step.inputs)


def _base(plan: Plan, fuse: bool, threads: int, block: int) -> int:
    """Projected bytes without held inputs. Compiled, one thread at a time computes by numpy and
    another compares its loop with that."""
    steps = list(_distinct(plan))
    blocks = max((_block_bytes(plan, step, block) for step in steps), default=0)
    arrays = int(SLACK * max((_array_bytes(step) for step in steps), default=0))
    reserved = RESERVED + PER_INPUT * sum(len(step.inputs) for step in plan.steps)
    reserved += sum(plan.models[index].source.held for index in _models_read(plan))
    files = plan.tokens.files.values() if plan.tokens else ()
    reserved += sum(len(text) for text in files if isinstance(text, bytes))
    if plan.fillings:  # the vocabularies are kept, and one is made again to ask it for pieces
        reserved += 2 * plan.parsing
    reserved += sum(_kept_bytes(o.step) for step in plan.steps for o in step.inputs if o.step)
    if fuse:
        trial = 4 * max((_grain_bytes(step) for step in steps), default=0)
        return reserved + COMPILER + threads * (blocks + _beside_loops(steps)) + arrays + trial
    return reserved + threads * (blocks + arrays)


def _models_read(plan: Plan) -> set[int]:
    """Those that any step reads; of a mixture's adapters others may be read in their place."""
    return {operand.model for step in every_step(plan.steps) for operand in step.inputs}


def _with_holds(plan: Plan, threads: int, block: int, base: int, cap: int, fuse: bool) -> Budget:
    sizes = [
        held_bytes(step)
        for step in plan.steps
        if step.method.passes and not step.copy and grains(step) > 1
    ]

    def kept(room: int) -> int:
        return sum(size for size in sizes if size <= room)

    # with two buffers steps overlap; one is better where more tensors fit it
    slots = 2 if kept((cap - base) // 2) >= kept(cap - base) else 1
    hold = max((size for size in sizes if size <= (cap - base) // slots), default=0)
    return Budget(threads, block, hold, slots if hold else 0, base + slots * hold, fuse, cap - base)


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


def _block_bytes(plan: Plan, step: Step, block: int) -> int:
    """What a thread needs for one block: its rows as stored, in, out and read back, what reading them
    takes, and its statistics."""
    rows = block_rows(step, block)
    out = step.nbytes // max(1, step.rows)
    raw = rows * (sum(o.info.row_bytes for o in step.inputs) + 2 * out)
    return raw + _statistics_bytes(step) + _scratch(plan, step, rows)


def _statistics_bytes(step: Step) -> int:
    if step.copy or not step.method.passes:
        return 0
    return STATISTIC * len(step.operands) * 2 + OF_A_ROW * step.rows * _knows_rows(step)


def _kept_bytes(step: Step) -> int:
    """What steps within steps keep of their rows."""
    within = sum(_kept_bytes(operand.step) for operand in step.inputs if operand.step)
    return within + 4 * step.rows * _knows_rows(step)


def _knows_rows(step: Step) -> bool:
    """Whether passes find out numbers for each row; of a single column they do not."""
    return "of_rows" in step.method.takes and step.cols > 1 and not step.copy


def _scratch(plan: Plan, step: Step, rows: int) -> int:
    """Memory that reading so many rows of a step's inputs takes, one input after the other."""
    return max((reading_bytes(plan, operand, rows) for operand in step.inputs), default=0)


def reading_bytes(plan: Plan, operand: Operand, rows: int) -> int:
    """For a step within a step: one grain of its inputs and of its arithmetic."""
    step = operand.step
    if step is None:
        return plan.models[operand.model].source.scratch(operand.tensor, rows)
    if step.places:
        return max(_part_bytes(plan, part, rows) for part in step.operands)
    if step.copy:
        return reading_bytes(plan, step.operands[0], rows)
    grain = min(grain_rows(step.shape), step.rows)
    raw = grain * sum(o.info.row_bytes for o in step.inputs)
    arrays = int(SLACK * _array_bytes(step)) + _statistics_bytes(step)
    return raw + arrays + _scratch(plan, step, grain)


def _part_bytes(plan: Plan, part: Operand, rows: int) -> int:
    """The grains of one part of a tensor that so many rows of the whole may lie in, read and picked."""
    rows = min(rows + 2 * grain_rows(part.info.shape), part.info.rows)
    return 2 * rows * part.info.row_bytes + reading_bytes(plan, part, rows)


def _beside_loops(steps: Sequence[Step]) -> int:
    """float32 grains around a compiled loop: inputs that it cannot widen, an output it cannot round,
    ranks and the room to sort them."""
    found = 0
    for step in steps:
        extra = sum(o.info.dtype == "F16" for o in step.inputs)
        extra += step.dtype not in ("BF16", "F32")
        if "ranks" in step.method.takes:
            extra += 2 * len(step.operands) + (7 if step.cols == 1 else 3)
        found = max(found, extra * _grain_bytes(step))
    return found


def _array_bytes(step: Step) -> int:
    """float32 arrays of one grain that numpy has alive at once."""
    if step.copy:
        return 0
    arrays = len(step.inputs) + step.method.workspace * len(step.operands) + FIXED_ARRAYS
    return arrays * _grain_bytes(step)


def _grain_bytes(step: Step) -> int:
    """Of one grain in float32."""
    return min(grain_rows(step.shape), step.rows) * step.cols * 4


def _distinct(plan: Plan) -> Iterable[Step]:
    """One step of each shape and kind; a 70 B model has few."""
    return {
        (s.shape, s.dtype, s.method.name, s.copy, tuple(o.info.dtype for o in s.inputs),
         _scratch(plan, s, grain_rows(s.shape))): s
        for s in plan.steps
    }.values()  # fmt: skip


def keep_freed_memory() -> None:
    """Tells glibc to keep freed arrays for the next block instead of returning them to the system.

    The arrays of a block are allocated and freed thousands of times; page faults made a TIES merge
    3 times slower (42 against 13 ns per value). Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what planning needed goes back first
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 256 << 20)
    mallopt(top_pad, 4 << 20)
