"""Models side by side keep the order of their files, whatever seed Python hashes text with."""

import os
import subprocess
import sys
from pathlib import Path

from families import drawn, shapes, typed, write_model, write_recipe

from merge.lineup import Lineup
from merge.recipe import load_recipe
from merge.sources.opening import open_model

TOLD = """
import sys
from merge.pipeline import plan_recipe
plan = plan_recipe(sys.argv[1])
print([step.name for step in plan.steps], plan.notes, plan.digest)
"""


def test_names_keep_the_order_of_the_file(tmp_path: Path) -> None:
    for name, layers in (("a", 2), ("b", 3)):
        write_model(tmp_path / name, typed(drawn(0, shapes(layers))))
    models = [open_model(str(tmp_path / name)) for name in "ab"]
    recipe = write_recipe(
        tmp_path / "r.yaml", models={"a": {"weight": 1}, "b": {"weight": 1}}, merge_method="linear"
    )
    lineup = Lineup(load_recipe(recipe), models, {"a": 0, "b": 1}, {})
    for index, model in enumerate(models):
        assert list(lineup.spelled[index].values()) == list(model.source.tensors)


def test_a_plan_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    for name in "ab":
        write_model(tmp_path / name, typed(drawn(0)))
    recipe = write_recipe(
        tmp_path / "r.yaml", models={"a": {"weight": 1}, "b": {"weight": 1}}, merge_method="linear"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", TOLD, str(recipe)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
