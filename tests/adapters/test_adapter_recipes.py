"""Recipes whose result is an adapter: extraction from a merge, and adapters merged into one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import contents
from methods.cases import CASES, Case, read_values
from peft_models import MODELS, WIDE, adapter, loaded, merged_by_peft, saved
from transformers import LlamaConfig, LlamaForCausalLM

from merge.adapters.modules import modules_of
from merge.adapters.run import adapter_budget, run_adapter
from merge.errors import OutputError, PlanError, RecipeError, RequestError, VerifyError
from merge.experts.checks.loading import check_loads
from merge.methods import all_methods
from merge.pipeline import plan_recipe, run_recipe
from merge.verify import verify_folder

RUN = """
import os, signal, sys
from pathlib import Path
from merge.adapters.journal import Journal
from merge.methods import all_methods
from merge.pipeline import run_recipe
recipe, out, after = sys.argv[1:]
add, left = Journal.add, [int(after)]
def counted(self, *arguments):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    add(self, *arguments)
Journal.add = counted
run_recipe(recipe, Path(out))
"""


def written(folder: Path, models: list[Any], **keys: Any) -> Path:
    file = folder / "r.yaml"
    entries = [m if isinstance(m, dict) else {"model": m} for m in models]
    file.write_text(yaml.safe_dump({"base_model": "base", "models": entries} | keys))
    return file


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A tiny Llama `base`, and adapters a and b of it."""
    saved(MODELS["llama"](), tmp_path / "base")
    for rank, name in enumerate("ab", start=3):
        layers = ["q_proj", "up_proj", "down_proj"][: 6 - rank]
        adapter(tmp_path / "base", tmp_path / name, r=rank, target_modules=layers)
    return tmp_path


def weights(folder: Path, base: Path) -> dict[str, Any]:
    """The base with the adapter, as PEFT merges them in float64."""
    return merged_by_peft(base, folder, into=base.parent / f"merged-{folder.name}")


@pytest.mark.parametrize(("method", "normalize"), [("linear", True), ("task_arithmetic", False)])
def test_a_weighted_sum_of_adapters_is_exact_side_by_side(
    adapters: Path, method: str, normalize: bool
) -> None:
    models = [{"model": name, "parameters": {"weight": 0.75}} for name in "ab"]
    keys = {"merge_method": method, "parameters": {"normalize": normalize}}
    result = run_recipe(written(adapters, models, adapter={}, **keys), adapters / "out")
    assert result.verified["error"] == 0.0
    assert json.loads((result.folder / "adapter_config.json").read_text())["r"] == 3 + 4
    share = 0.5 if normalize else 0.75
    base = read_values(adapters / "base")
    a, b, found = (weights(adapters / name, adapters / "base") for name in ("a", "b", "out"))
    for name, values in found.items():
        expected = base[name] + share * (a[name] - base[name]) + share * (b[name] - base[name])
        assert np.abs(values - expected).max() <= 2.0**-22 * np.abs(expected).max()


# everything that takes two models; those that draw masks see other task vectors only by float32 rounding
EVERY = [
    case
    for case in {case.method: case for case in CASES if case.models <= 3}.values()
    if case.method not in ("passthrough", "nearswap")
]
OF_MODELS = [
    ["base+a", "base+b"],
    ["base+a+b", "base+b"],  # two adapters in a row
    ["tuned+a", "tuned"],  # a model of its own
]


@pytest.mark.parametrize("models", OF_MODELS, ids=" ".join)
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.method)
def test_the_adapter_is_what_the_whole_merge_changes(
    adapters: Path, case: Case, models: list[str]
) -> None:
    """Of any method and of models that stand on the base or not, at full rank."""
    tune(adapters / "base", adapters / "tuned")
    entries = [
        {"model": model, "parameters": {key: values[i] for key, values in case.own.items()}}
        for i, model in enumerate(models)
    ]
    based = all_methods()[case.method].base
    first = models[0] if based == "first" else "base"
    keys = {"merge_method": case.method, "parameters": dict(case.shared)}
    if based in ("first", "required"):
        keys["base_model"] = first
    whole = run_recipe(_only(adapters, entries, keys), adapters / "whole").folder
    recipe = written(adapters, ["x"], merge_method="passthrough", adapter={"rank": 16})
    inner = yaml.safe_dump(keys | {"name": "x", "models": entries})
    recipe.write_text(inner + "---\n" + recipe.read_text())
    if based != "first" and not case.based:
        recipe = written(adapters, entries, adapter={"rank": 16}, **keys | {"base_model": "base"})
    plan = plan_recipe(recipe)
    run_adapter(plan, adapter_budget(plan, "1GiB"), adapters / "out", ask=modules_of)
    found, expected = weights(adapters / "out", adapters / "base"), read_values(whole)
    for name, values in found.items():
        # the whole model is rounded to float32, and so are the difference and its two factors
        assert np.abs(values - expected[name]).max() <= 2.0**-20 * np.abs(expected[name]).max(), (
            name
        )


def tune(base: Path, folder: Path) -> None:
    """A fine-tune of all linear layers."""
    random = torch.Generator().manual_seed(9)
    model = loaded(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) / 10)
    model.save_pretrained(folder)


def _only(folder: Path, entries: list[Any], keys: dict[str, Any]) -> Path:
    file = folder / "whole.yaml"
    file.write_text(yaml.safe_dump({"models": entries} | keys))
    return file


@pytest.mark.parametrize("label", ["dora", "base+dora"])
def test_an_adapter_that_needs_the_values_of_its_base_is_merged_on_them(
    adapters: Path, label: str
) -> None:
    adapter(adapters / "base", adapters / "dora", target_modules=["q_proj"], use_dora=True)
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", label)]
    recipe = written(adapters, models, merge_method="linear", adapter={"rank": 16})
    run_recipe(recipe, adapters / "out")
    a, dora, found = (weights(adapters / n, adapters / "base") for n in ("a", "dora", "out"))
    for name, values in found.items():
        expected = (a[name] + dora[name]) / 2
        assert np.abs(values - expected).max() <= 2.0**-20 * np.abs(expected).max()


def test_ties_of_adapters_is_ties_of_their_differences(adapters: Path) -> None:
    keys = {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.6}}
    run_recipe(written(adapters, ["base+a", "b"], adapter={"rank": 16}, **keys), adapters / "out")
    whole = run_recipe(written(adapters, ["base+a", "base+b"], **keys), adapters / "whole").folder
    found, expected = weights(adapters / "out", adapters / "base"), read_values(whole)
    for name, values in found.items():
        # at full rank: what is written as a model is rounded once more, to float32
        assert np.abs(values - expected[name]).max() <= 2.0**-21 * np.abs(expected[name]).max(), (
            name
        )


def test_what_a_merge_changed_is_extracted(adapters: Path) -> None:
    """Not of one fine-tune, but of a merge of models, in one go."""
    keys = {"merge_method": "slerp", "parameters": {"t": 0.3}}
    models = ["base+a", "base+b"]
    whole = run_recipe(
        written(adapters, models, **keys | {"base_model": "base+a"}), adapters / "whole"
    ).folder
    stages = yaml.safe_dump(
        keys | {"name": "x", "base_model": "base+a", "models": [{"model": "base+b"}]}
    )
    last = written(adapters, ["x"], merge_method="passthrough", adapter={"rank": 16})
    last.write_text(stages + "---\n" + last.read_text())
    run_recipe(last, adapters / "out")
    found, expected = weights(adapters / "out", adapters / "base"), read_values(whole)
    for name, values in found.items():
        assert np.abs(values - expected[name]).max() <= 2.0**-21 * np.abs(expected[name]).max(), (
            name
        )


def test_killed_after_any_layer_it_goes_on_to_the_same_bytes(adapters: Path) -> None:
    recipe = written(adapters, ["a"], merge_method="passthrough", adapter={"energy": 0.9})
    once = run_recipe(recipe, adapters / "once")
    assert once.verified["layers"] == LAYERS
    wanted = contents(once.folder)
    for after in range(
        len(json.loads((adapters / "once/mergetool.json").read_text())["files"]) + 2
    ):
        out = adapters / f"killed{after}"
        done = subprocess.run([sys.executable, "-c", RUN, str(recipe), str(out), str(after)])
        assert done.returncode == -9
        assert not out.exists()
        assert contents(run_recipe(recipe, out).folder) == wanted
        assert not list(adapters.glob("*.partial"))


def test_the_same_command_finds_its_adapter_done_and_another_is_refused(adapters: Path) -> None:
    recipe = written(adapters, ["a"], merge_method="passthrough", adapter={"rank": 2})
    assert not run_recipe(recipe, adapters / "out").existed
    assert run_recipe(recipe, adapters / "out").existed
    other = written(adapters, ["a"], merge_method="passthrough", adapter={"rank": 1})
    with pytest.raises(OutputError, match="exists and is not this adapter"):
        run_recipe(other, adapters / "out")
    assert not run_recipe(other, adapters / "out", overwrite=True).existed


@pytest.mark.parametrize("kind", [{}, {"adapter": {"rank": 2}}])
@pytest.mark.parametrize("out", ["nest/a", "nest/a/out", "nest"])
def test_an_input_adapter_is_no_place_for_the_result(
    adapters: Path, kind: dict[str, Any], out: str
) -> None:
    (adapters / "nest").mkdir()
    (adapters / "a").rename(adapters / "nest" / "a")
    recipe = written(adapters, ["base+nest/a"], merge_method="passthrough", **kind)
    before = contents(adapters)
    with pytest.raises(OutputError, match=r"the folder of base\+nest/a"):
        run_recipe(recipe, adapters / out, overwrite=True)
    assert contents(adapters) == before


def test_a_changed_byte_is_found(adapters: Path) -> None:
    recipe = written(adapters, ["a"], merge_method="passthrough", adapter={"rank": 2})
    file = run_recipe(recipe, adapters / "out").folder / "adapter_model.safetensors"
    assert verify_folder(adapters / "out")["digests"] == "all equal"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerifyError, match="its bytes changed"):
        verify_folder(adapters / "out")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{",
            "\0",
            "[]",
            "{}",
            '{"plan": "x"}',
            '{"files": [1]}',
            '{"files": {}}',
            '{"files": null}',
        ),
        '{"files": {"adapter_model.safetensors": 1}}',
    ],
)
def test_a_damaged_provenance_is_found(adapters: Path, text: str) -> None:
    (adapters / "a" / "mergetool.json").write_text(text)
    with pytest.raises(VerifyError, match=r"a/mergetool\.json: (damaged|not readable|holds)"):
        verify_folder(adapters / "a")


def test_an_adapter_is_not_loaded_without_its_base(adapters: Path) -> None:
    with pytest.raises(RequestError, match=r"is an adapter.* merge it into its base"):
        check_loads(adapters / "a")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapter": {"rank": 0}}, "adapter.rank is 0"),
        ({"adapter": {"energy": 1.5}}, "adapter.energy is 1.5"),
        ({"adapter": {"ranks": 4}}, "unknown key 'ranks'"),
        ({"adapter": {}, "score": {}}, "adapter and score are both given"),
        ({"adapter": {"rank": 4}, "base_model": None}, "an adapter needs base_model"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    adapters: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_recipe(written(adapters, ["a"], merge_method="passthrough", **keys))


def test_without_rank_or_energy_only_what_is_exact_is_written(adapters: Path) -> None:
    keys = {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.5}, "adapter": {}}
    with pytest.raises(PlanError, match="give a rank or an energy"):
        run_recipe(written(adapters, ["a", "b"], **keys), adapters / "out")
    assert not list(adapters.glob("out*"))


def test_the_smallest_memory_that_is_named_does(adapters: Path) -> None:
    recipe = written(adapters, ["a"], merge_method="passthrough", adapter={"rank": 2})
    with pytest.raises(PlanError, match=r"\d+MiB is the least that would do") as caught:
        run_recipe(recipe, adapters / "out", memory="8MiB")
    least = str(caught.value).split("; ")[1].split()[0]
    peak = run_recipe(recipe, adapters / "out", memory=least).budget.peak
    assert peak <= int(least.removesuffix("MiB")) << 20


LAYERS = 6  # that adapter a changes
MEASURED = """
import sys
from pathlib import Path
from merge.methods import all_methods
from merge.pipeline import run_recipe
recipe, memory = sys.argv[1:]
result = run_recipe(recipe, Path(recipe).parent / "out", memory=memory)
status = Path("/proc/self/status").read_text()  # getrusage would tell the peak of the test's process
print(result.budget.peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.parametrize("wanted", [{"rank": 64}, {"energy": 0.5}])
def test_measured_peak_is_below_the_projected_one(tmp_path: Path, wanted: dict[str, Any]) -> None:
    """Layers of 1024 x 4096 at full rank: their factors and float64 blocks are what counts."""
    config = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1}
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**WIDE | config)).save_pretrained(tmp_path / name)
    recipe = written(tmp_path, ["tuned"], merge_method="passthrough", adapter=wanted)
    command = [sys.executable, "-c", MEASURED, str(recipe), "2GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    projected, measured = map(int, done.stdout.split()[-2:])
    assert measured <= projected
