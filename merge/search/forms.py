"""How what may vary is written, read and checked before anything is asked for; space.py has its meaning."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = sys.float_info.max
Wrong = Callable[[str, str], Exception]  # key ("": the whole), what is wrong with it -> the error


@dataclass(frozen=True)
class Numbers:
    """One number from low to high, or a gradient of `points`. `log`: drawn evenly in its logarithm. `whole`:
    a whole number."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    points: int | None = None


@dataclass(frozen=True)
class Pool:
    """`pick` different ones of some models. `leads`: the first of them is base_model, too."""

    models: tuple[str, ...]
    pick: int = 2
    leads: bool = False


def numbers_in(spec: Mapping[str, Any], wrong: Wrong) -> Numbers:
    """What {search: [low, high]} says; raises wrong(key, what)."""
    check_keys(spec, ("search", "log", "int", "points"), wrong)
    for key in ("log", "int"):
        if not isinstance(spec.get(key, False), bool):
            raise wrong(key, f"{key} must be true or false")
    log, whole, points = bool(spec.get("log")), bool(spec.get("int")), spec.get("points")
    low, high = _bounds(spec["search"], log, wrong)
    if whole and (low, high) != (int(low), int(high)):
        raise wrong("", f"search is {spec['search']}; with int both must be whole numbers")
    if points is not None and (type(points) is not int or points < 2):
        raise wrong("points", "points must be a whole number from 2")
    return Numbers(low, high, log, whole, points)


def pool_in(spec: Mapping[str, Any], wrong: Wrong) -> Pool:
    """What {pool: [A, B, C]} says; raises wrong(key, what)."""
    check_keys(spec, ("pool", "pick", "base", "parameters"), wrong)
    pool, pick = spec["pool"], spec.get("pick", 2)
    if not (pool and isinstance(pool, list) and all(isinstance(name, str) for name in pool)):
        raise wrong("pool", "pool must be a list of models")
    if type(pick) is not int or not 1 <= pick <= len(pool):
        raise wrong("pick", f"pick must be a whole number from 1 to {len(pool)}")
    if spec.get("base", "first") != "first":
        raise wrong("base", "base must be first, or left out")
    return Pool(tuple(pool), pick, "base" in spec)


def check_keys(spec: Mapping[str, Any], known: Sequence[str], wrong: Wrong) -> None:
    """Raises wrong(key, what) for a key that is not known."""
    for key in spec:
        if key not in known:
            raise wrong(str(key), f"unknown key {key!r}; allowed: {', '.join(known)}")


def are_shares(given: Any, count: int) -> bool:
    """Whether they are as many numbers above 0."""
    numbers = given if isinstance(given, list) else []
    return len(numbers) == count and all(_is_number(n) and n > 0 for n in numbers)


def _bounds(value: Any, log: bool, wrong: Wrong) -> tuple[float, float]:
    found = value if isinstance(value, list) else []
    numbers = [n for n in found if _is_number(n)]
    if len(found) != 2 or len(numbers) != 2:
        raise wrong("", "search must be two numbers, [lowest, highest]")
    low, high = numbers
    if not low < high:
        raise wrong("", f"search is {value}; the first number must be less than the second")
    if log and low <= 0:
        raise wrong("", f"search is {value}; with log both must be above 0")
    return low, high


def _is_number(value: Any) -> bool:
    """Whether it is a finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST
