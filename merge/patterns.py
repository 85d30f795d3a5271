"""Which tensors a pattern of a recipe means."""

import re
from fnmatch import fnmatchcase


def fits(pattern: str, tensor: str) -> bool:
    """Whether a tensor's name is meant: `re:...` is a regular expression to be found in it, a pattern
    with * ? or [ is a glob for all of it, anything else a part of it."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], tensor) is not None
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(tensor, pattern)
    return pattern in tensor


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a pattern, or None."""
    if not pattern.startswith("re:"):
        return None if pattern else "is empty"
    try:
        re.compile(pattern[3:])
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    return None
