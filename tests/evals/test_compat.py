"""What two versions of transformers make of a result is compared, and a difference would be told."""

import copy
from pathlib import Path

from evals.compat.transformers4 import problems, read, texts
from merge.pipeline import run_recipe
from merge.shipped import shipped


def test_a_result_is_read_and_differences_are_told(tmp_path: Path) -> None:
    out = run_recipe(shipped("recipes/chat.yaml"), tmp_path / "out").folder
    asked = {"folder": str(out), "texts": texts(out), "questions": ["reverse abc", "roman 12"]}
    assert len({*asked["texts"]}) > 100
    here = read(asked)
    assert problems(asked, here, here) == []
    other = copy.deepcopy(here)
    other["ids"][0] = [7]
    other["said"][1].pop()
    told = problems(asked, other, here)
    assert len(told) == 3
    assert told[0].startswith("'Once upon a time' is [7], not [")
    assert told[1].startswith("'roman 12' is [")
    assert told[2].endswith("does not end")
