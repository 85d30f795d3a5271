"""Regular expressions over names of modules, as the keys of PEFT's rank_pattern and alpha_pattern: strangers
write them, so they are of a small language and matched in one pass, never tried in turn.
"""

import re
from collections.abc import Iterable, Mapping

TOKEN = r"\.[*+]|\\d\+|\((?:\?:)?(?:[\w.|-]|\\\.)*\)|\\\.|[\w.^$-]"
TOKENS = re.compile(TOKEN, re.ASCII)
LANGUAGE = re.compile(rf"(?:{TOKEN}|\|)+", re.ASCII)
BETWEEN = re.compile(r"\|(?![^(]*\))")  # alternatives that no brackets hold
LONGEST = 200  # characters
ALLOWED = r"names, \., ., .*, .+, \d+, ^, $ and alternatives (a|b)"


def is_readable(pattern: str) -> bool:
    """Whether the pattern is of the language: see ALLOWED."""
    return len(pattern) <= LONGEST and LANGUAGE.fullmatch(pattern) is not None


def first_fitting(patterns: Iterable[str], module: str) -> str:
    r"""The first of the patterns that fits as PEFT asks, `(.*\.)?(pattern)$` from the name's beginning; ""
    where none does."""
    places: dict[str, int] = {}
    for i, sign in enumerate(module):
        places[sign] = places.get(sign, 0) | 1 << i
    starts = 1 | places.get(".", 0) << 1
    end = 1 << len(module)
    return next((p for p in patterns if _either(p, places, starts, end) & end), "")


def _either(pattern: str, places: Mapping[str, int], at: int, end: int) -> int:
    """The places (bit i: before character i, up to `end`) that the pattern reaches from those in `at`."""
    found = 0
    for sequence in BETWEEN.split(pattern):
        found |= _through(TOKENS.findall(sequence), places, at, end)
    return found


def _through(tokens: Iterable[str], places: Mapping[str, int], at: int, end: int) -> int:
    everywhere = 2 * end - 1
    for token in tokens:
        if token in (".*", ".+"):
            at <<= token == ".+"
            at = everywhere & -(at & -at)  # and all that follow the first
        elif token == r"\d+":
            at = _digits(places, at)
        elif token[0] == "(":
            at = _either(token[1:-1].removeprefix("?:"), places, at, end)
        elif token in "^$":
            at &= 1 if token == "^" else end
        elif token == ".":
            at = at << 1 & everywhere
        else:
            at = (at & places.get(token[-1], 0)) << 1
        if not at:
            break
    return at


def _digits(places: Mapping[str, int], at: int) -> int:
    digits = sum(places.get(sign, 0) for sign in "0123456789")
    found, step = 0, (at & digits) << 1
    while step & ~found:
        found |= step
        step = (found & digits) << 1
    return found
