"""Patterns of modules fit what PEFT finds that they fit, and no pattern takes more than one pass."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from merge.sources.module_patterns import first_fitting, is_readable

MODULE = "model.layers.10.self_attn.q_proj"
NAMES = st.text("a1.", max_size=8)
SIMPLE = st.sampled_from(["a", "1", "a1", ".", r"\."])
TOKENS = st.one_of(
    SIMPLE,
    st.sampled_from([".*", ".+", r"\d+", "^", "$"]),
    st.lists(SIMPLE | st.just(""), min_size=1, max_size=3).map(lambda each: f"({'|'.join(each)})"),
    st.lists(SIMPLE, min_size=1, max_size=3).map(lambda each: f"(?:{'|'.join(each)})"),
)
PATTERNS = st.lists(st.lists(TOKENS, max_size=5).map("".join), min_size=1, max_size=2).map("|".join)


@given(PATTERNS, NAMES)
def test_a_pattern_fits_as_peft_matches_it(pattern: str, name: str) -> None:
    assert is_readable(pattern) or not pattern
    fitting = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert (first_fitting([pattern], name) == pattern) is fitting or not pattern


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["proj", "self_attn.q_proj"],
        ["model.layers.10.self_attn.q_proj"],
        ["^layers.10.self_attn.q_proj", r"^model\.layers\.\d+\.self_attn\.q_proj$"],
        [r".*layers.(1|10|11)\..*(q|v)_proj"],
        ["v_proj|q_proj"],
        ["k_proj", "layers.1", "q_proj$"],
    ],
)
def test_the_first_of_the_usual_keys_is_the_one_that_peft_takes(keys: list[str]) -> None:
    expected = get_pattern_key(keys, MODULE)
    assert first_fitting(keys, MODULE) == (expected if expected in keys else "")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", ".?" * 90, "a*", "a{9}", r"(\w+)*", "[ab]", "(?i)q", "(?=a)", r"(a)\1", "(", "((a))"),
        *("", "(.*|a)", r"\D", "a" * 201, "a\n", "ä"),
    ],
)  # fmt: skip
def test_other_patterns_are_not_read(pattern: str) -> None:
    assert not is_readable(pattern)


@pytest.mark.parametrize(
    "pattern", [".*a" * 66, r"\d+." * 40 + "b", "(a|a|.|..)" * 19 + "b", r"\d+" * 60 + "b"]
)
@pytest.mark.parametrize("name", ["a." * 500, "1" * 1000, "a1." * 333])
def test_a_hostile_pattern_is_matched_in_one_pass(pattern: str, name: str) -> None:
    """Trying one thing after the other would take longer than the universe is old."""
    assert is_readable(pattern)
    first_fitting([pattern] * 10, name)
