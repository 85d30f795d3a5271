"""How the models of a merge lie to each other, tensor by tensor: sums over the grains that a merge reads.

Where a tensor is merged with a base, its task vectors are compared: what each model has more than the base.
Where it is not, there is nothing to take a difference from, and the weights themselves are compared; how far
a model is away is then told from the plain mean of all.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from merge.anatomy import layer_of
from merge.budget import (
    COMPILER,
    PER_INPUT,
    RESERVED,
    SLACK,
    reading_bytes,
    threads_and_cap,
    worth_fusing,
)
from merge.errors import PlanError
from merge.finite import check_input
from merge.formula import Formula, Grains
from merge.methods import Models, Request, Sums
from merge.numerics import FLOATS, grain_rows, grains
from merge.plan import Plan, Step
from merge.reader import Reader, reduced
from merge.report.figures import OUTSIDE, Comparison, Pair, Shared, Size, Tensor

MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # come first
ARRAYS = 12  # float32 grains alive beside those counted for each model
DRAWING = 80 << 20  # bytes: matplotlib and a page of pictures; 60 MiB measured


def measured(
    plan: Plan,
    memory: str,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Compares the models of a plan in `memory`; raises PlanError, NonFiniteError, ReadError."""
    steps = [step for step in plan.steps if _is_compared(step)]
    if not steps:
        raise PlanError(
            f"{plan.recipe.file}: nothing in it is merged of several models; there is nothing to show"
        )
    count, fuse = _way(plan, steps, memory, threads)
    reader = Reader(plan, fuse=fuse)
    modules = modules_of([step.name for step in steps])
    with ThreadPoolExecutor(count, thread_name_prefix="report") as pool:
        sums = pool.map(lambda step: _summed(reader, step, fuse, progress), steps)
        tensors = [
            _tensor(plan, step, modules[step.name], found)
            for step, found in zip(steps, sums, strict=True)
        ]
    bases = dict.fromkeys(_name(plan, step.base.model) for step in steps if step.base)
    return Comparison(
        plan.recipe.file,
        plan.recipe.method.name,
        " or ".join(bases) or None,
        tuple(tensors),
        len(plan.steps) - len(steps),
    )


def _is_compared(step: Step) -> bool:
    several = len(step.operands) > 1 or step.base is not None
    return several and not step.copy and all(o.info.dtype in FLOATS for o in step.inputs)


# -- sums --------------------------------------------------------------------------------------------


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))


def _terms(x: Models, with_base: bool) -> Iterator[Any]:
    """What is summed: squares of the base (where there is one) and of all, products of pairs; whether both of
    a pair are not zero and whether their signs differ; the same of any two."""
    wide = [values.astype(np.float64) for values in x]
    if with_base:
        base = wide.pop(0)
        yield base * base
        wide = [values - base for values in wide]
    yield from (values * values for values in wide)
    pairs = _pairs(len(wide))
    yield from (wide[i] * wide[j] for i, j in pairs)
    yield from ((wide[i] * wide[j] != 0.0).astype(np.float64) for i, j in pairs)
    yield from ((wide[i] * wide[j] < 0.0).astype(np.float64) for i, j in pairs)
    if not pairs:
        return
    up, down = _counted(wide, np.greater), _counted(wide, np.less)
    yield (up + down >= 2.0).astype(np.float64)
    yield np.logical_and(up > 0.0, down > 0.0).astype(np.float64)


def _counted(wide: Sequence[Any], than: Any) -> Any:
    """For each value how many models have one above zero, or below."""
    total = than(wide[0], 0.0).astype(np.float64)
    for values in wide[1:]:
        total = total + than(values, 0.0).astype(np.float64)
    return total


def _summed(reader: Reader, step: Step, fuse: bool, progress: Callable[[int], None]) -> list[float]:
    """The sums of `_terms` over a tensor."""
    with_base = step.base is not None
    plain = replace(step, operands=step.inputs, base=None, parameters={})
    request: Request = Sums(lambda x: _terms(x, with_base))
    measure = Formula(plain, fuse, allow_nonfinite=True).measuring(request)
    parts = [part for grain in _grains(reader, plain, progress) for part in measure(grain)[0]]
    found: list[float] = reduced(request, parts).tolist()
    return found


def _grains(reader: Reader, step: Step, progress: Callable[[int], None]) -> Iterator[Grains]:
    for first, end in grains(step.shape):
        grain = reader.grain(step, first, end)
        for index, rows in enumerate(grain[0]):
            check_input(reader.plan, step, index, rows, first)
        yield grain
        progress(sum(rows.nbytes for rows in grain[0]))


def _tensor(plan: Plan, step: Step, place: tuple[str, str], sums: Sequence[float]) -> Tensor:
    names = _names(plan, step)
    count, pairs, with_base = len(names), _pairs(len(names)), step.base is not None
    left = iter(sums)
    reference = next(left) if with_base else 0.0
    squares = list(itertools.islice(left, count))
    products, both, opposed = (list(itertools.islice(left, len(pairs))) for _ in range(3))
    shared = Shared(*(int(value) for value in left))
    sizes = {name: Size(square, reference) for name, square in zip(names, squares, strict=True)}
    if not with_base:
        sizes = _from_mean(names, squares, dict(zip(pairs, products, strict=True)))
    return Tensor(
        step.name,
        *place,
        step.shape,
        with_base,
        sizes,
        {
            (names[i], names[j]): Pair(product, squares[i], squares[j], int(n), int(against))
            for (i, j), product, n, against in zip(pairs, products, both, opposed, strict=True)
        },
        shared,
    )


def _from_mean(
    names: Sequence[str], squares: Sequence[float], products: Mapping[tuple[int, int], float]
) -> dict[str, Size]:
    """How far each model is from the plain mean of all, from their inner products."""
    count = len(names)
    gram = np.diag(np.array(squares, np.float64))
    for (i, j), product in products.items():
        gram[i, j] = gram[j, i] = product
    mean = float(gram.sum()) / count**2
    away = np.diag(gram) - 2.0 * gram.sum(axis=1) / count + mean
    return {
        name: Size(max(0.0, float(square)), mean) for name, square in zip(names, away, strict=True)
    }


def _names(plan: Plan, step: Step) -> list[str]:
    """Of the models of a step, each once: a model whose layers are merged with each other comes again."""
    found: list[str] = []
    for operand in step.operands:
        name = _name(plan, operand.model)
        count = sum(known == name or known.startswith(f"{name} (") for known in found)
        found.append(name if not count else f"{name} ({count + 1})")
    return found


def _name(plan: Plan, model: int) -> str:
    return plan.models[model].public_name


# -- places ------------------------------------------------------------------------------------------


def modules_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(layer, module) of each tensor; numbers within a layer, as of experts, are one module together. A
    module has the last word of its name where that is not another's too."""
    stacks = {found[0] for found in map(layer_of, names) if found}
    whole = {name: _place(name, len(stacks) > 1) for name in names}
    words: dict[str, set[str]] = {}
    for layer, path in whole.values():
        words.setdefault(_last_word(path), set()).add(f"{bool(layer)} {path}")
    return {
        name: (layer, _last_word(path) if len(words[_last_word(path)]) == 1 else path)
        for name, (layer, path) in whole.items()
    }


def _place(name: str, several: bool) -> tuple[str, str]:
    layer = layer_of(name)
    if layer is None:
        return OUTSIDE, name.removesuffix(".weight")
    stack, number = layer
    rest = name.removeprefix(f"{stack}.{number}.").removesuffix(".weight")
    path = ".".join("*" if part.isdecimal() else part for part in rest.split("."))
    return (f"{stack} {number}" if several else str(number)), path


def _last_word(path: str) -> str:
    head, _, last = path.rpartition(".")
    return f"{head.rpartition('.')[2]}.{last}" if head and last in ("bias", "*") else last


# -- memory ------------------------------------------------------------------------------------------


def _way(plan: Plan, steps: Sequence[Step], memory: str, threads: int | None) -> tuple[int, bool]:
    """As many threads as are wanted and fit, and whether sums are compiled, which pays for large models;
    raises PlanError where not even one thread fits."""
    wanted, cap = threads_and_cap(memory, threads)
    for fuse in [True, False] if worth_fusing(plan) else [False]:
        for count in range(wanted, 0, -1):
            if peak_bytes(plan, steps, count, fuse=fuse) <= cap:
                return count, fuse
    least = -(-peak_bytes(plan, steps, 1, fuse=False) >> 20)
    raise PlanError(
        f"--memory {memory} is too small for this report; {least}MiB is the least that would do"
    )


def peak_bytes(plan: Plan, steps: Sequence[Step], threads: int, *, fuse: bool) -> int:
    """Projected for the process. Compiled, one thread at a time computes by numpy."""
    reserved = RESERVED + DRAWING + PER_INPUT * sum(len(step.inputs) for step in plan.steps)
    reserved += sum(model.source.held for model in plan.models) + plan.parsing

    def rows(step: Step) -> int:
        return min(grain_rows(step.shape), step.rows)

    def read(step: Step) -> int:
        raw = rows(step) * sum(operand.info.row_bytes for operand in step.inputs)
        scratch = max(reading_bytes(plan, operand, rows(step)) for operand in step.inputs)
        return 2 * raw + scratch  # half precision is widened for a loop

    def arrays(step: Step) -> int:
        return int(SLACK * 4 * rows(step) * step.cols * (3 * len(step.inputs) + ARRAYS))

    reads, computes = max(map(read, steps)), max(map(arrays, steps))
    if fuse:
        return reserved + COMPILER + threads * reads + computes
    return reserved + threads * (reads + computes)
