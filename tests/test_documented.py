"""The recipes of mergekit's documentation run unchanged, and give what mergekit makes of them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import yaml
from methods.cases import read_values
from safetensors.numpy import load_file

from merge.anatomy import matched
from merge.pipeline import run_recipe

_spec = importlib.util.spec_from_file_location(
    "documented", Path(__file__).parent / "oracle" / "documented.py"
)
assert _spec is not None
assert _spec.loader is not None
documented = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(documented)
RESULTS = load_file(documented.RESULTS)
HALF_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, None: 2.0**-24}
# with weights of its own for each model, mergekit elects signs otherwise than the paper
DIFFERENT = ("ties", "mega")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    documented.write_inputs(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "compat"),
    [(n, c) for n in documented.RECIPES for c in (False, True) if c or n not in DIFFERENT],
)
def test_equal_within_rounding(name: str, compat: bool, models: Path) -> None:
    documents = documented.RECIPES[name]
    place = models / f"{name}-{compat}"
    place.mkdir()
    recipe = models / f"{place.name}.yaml"
    extra = {"compat": "mergekit"} if compat else {}
    recipe.write_text(yaml.safe_dump_all([document | extra for document in documents]))
    found = read_values(run_recipe(recipe, place / "out").folder)
    expected = {
        k.removeprefix(f"{name}/"): v for k, v in RESULTS.items() if k.startswith(f"{name}/")
    }
    names = matched(expected, found)
    assert len(names) == len(expected) == len(found)
    half_unit = HALF_UNIT[documents[-1].get("dtype")]
    for tensor, values in expected.items():
        # one rounding to the recipe's dtype, and float32 sums of values below 4 in other orders
        tolerance = half_unit * np.abs(values) + 8 * 2.0**-24 * 4
        assert (np.abs(found[names[tensor]] - values) <= tolerance).all(), tensor
