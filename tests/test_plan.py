"""Recipe and models together: what fits, what does not, and what the plan promises."""

import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import (
    contents,
    drawn,
    family,
    shapes,
    stored,
    ties_recipe,
    typed,
    write_model,
    write_recipe,
)
from safetensors import safe_open

from merge.budget import make_budget
from merge.errors import OutputError, PlanError, RequestError, SourceError
from merge.pipeline import plan_recipe, run_recipe
from merge.plan import Plan, Step
from merge.sources.model import read_json

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def linear(folder: Path, *models: str, **keys: Any) -> Path:
    weights = {name: {"weight": 1.0} for name in models}
    return write_recipe(folder / "r.yaml", models=weights, merge_method="linear", **keys)


def refusal(recipe: Path, kind: type[RequestError] = PlanError) -> str:
    """The message for models that do not fit; nothing is written."""
    before = contents(recipe.parent)
    with pytest.raises(kind) as caught:
        run_recipe(recipe, recipe.parent / "out")
    assert contents(recipe.parent) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def step(plan: Plan, name: str) -> Step:
    return next(s for s in plan.steps if s.name == name)


def tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a folder by the safetensors library, as numpy arrays."""
    out: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            out |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return out


# -- which tensors ---------------------------------------------------------------------------------


def test_the_first_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    family(tmp_path)
    write_model(tmp_path / "wide", typed(drawn(1, shapes(hidden=10))))
    message = refusal(linear(tmp_path, "base", "wide"))
    assert f"wide: tensor '{EMBEDDING}'" not in message  # lm_head comes first in the order of names
    assert "wide: tensor 'lm_head.weight' has shape [16, 10], but [16, 8] in base" in message


def test_an_extra_tensor_is_refused_or_dropped_with_a_note(tmp_path: Path) -> None:
    family(tmp_path, "a")
    write_model(tmp_path / "deep", typed(drawn(1, shapes(layers=3))))
    message = refusal(linear(tmp_path, "base", "deep"))
    assert (
        "deep: has 3 tensors that base lacks, first 'model.layers.2.input_layernorm.weight'"
        in message
    )
    assert "extra_tensors: drop" in message
    plan = plan_recipe(linear(tmp_path, "base", "deep", extra_tensors="drop"))
    assert {s.name for s in plan.steps} == set(shapes())
    assert any("deep: dropped" in note for note in plan.notes)


def test_a_missing_tensor_is_refused_or_counts_as_unchanged(tmp_path: Path) -> None:
    models = family(tmp_path, "a")
    kept = {n: v for n, v in drawn(3).items() if "layers.1" not in n}
    models["short"] = write_model(tmp_path / "short", typed(kept))
    recipe = ties_recipe(tmp_path / "r.yaml", models)
    assert "short: lacks tensor 'model.layers.1." in refusal(recipe)
    result = run_recipe(
        ties_recipe(tmp_path / "r.yaml", models, missing_tensors="base"), tmp_path / "out"
    )
    assert any("short: lacks tensors of base" in note for note in result.plan.notes)
    names = [n for n in shapes() if "layers.1" in n]
    assert all(step(result.plan, n).operands[1].model == 0 for n in names)


def test_without_a_base_a_missing_tensor_stays_an_error(tmp_path: Path) -> None:
    family(tmp_path)
    norm = "model.norm.weight"
    write_model(tmp_path / "short", typed({n: v for n, v in drawn(3).items() if n != norm}))
    assert f"lacks tensor '{norm}'" in refusal(
        linear(tmp_path, "base", "short", missing_tensors="base")
    )


@pytest.fixture
def tied_and_untied(tmp_path: Path) -> Path:
    headless = {n: v for n, v in drawn(1).items() if n != HEAD}
    write_model(tmp_path / "tied", typed(headless), config={"tie_word_embeddings": True})
    write_model(tmp_path / "tied_with_head", typed(drawn(2)), config={"tie_word_embeddings": True})
    write_model(tmp_path / "untied", typed(drawn(3)), config={"tie_word_embeddings": False})
    return tmp_path


def test_a_stored_head_beside_a_tied_embedding_is_not_written(tied_and_untied: Path) -> None:
    for names in (("tied", "tied_with_head"), ("tied_with_head", "tied")):
        plan = plan_recipe(linear(tied_and_untied, *names))
        assert HEAD not in {s.name for s in plan.steps}


def test_a_model_with_an_own_head_unties_the_result(tied_and_untied: Path) -> None:
    result = run_recipe(linear(tied_and_untied, "tied", "untied"), tied_and_untied / "out")
    expected = (drawn(3)[HEAD] + drawn(1)[EMBEDDING]) * np.float32(0.5)
    np.testing.assert_allclose(tensors(result.folder)[HEAD], expected, rtol=1e-6)
    assert read_json(result.folder / "config.json")["tie_word_embeddings"] is False
    assert any("head of its own" in note for note in result.plan.notes)


def test_a_tied_model_lends_its_embedding_as_head(tied_and_untied: Path) -> None:
    result = run_recipe(linear(tied_and_untied, "untied", "tied"), tied_and_untied / "out")
    assert step(result.plan, HEAD).operands[1].tensor == EMBEDDING
    expected = (drawn(3)[HEAD] + drawn(1)[EMBEDDING]) * np.float32(0.5)
    np.testing.assert_allclose(tensors(result.folder)[HEAD], expected, rtol=1e-6)


def test_config_and_tensors_must_agree_about_tying(tied_and_untied: Path) -> None:
    recipe = linear(tied_and_untied, "untied", "tied", base_model="untied", tokenizer_source="tied")
    assert "tied: tie_word_embeddings is true in config.json, but false in untied" in refusal(
        recipe
    )


def test_integer_buffers_are_copied_and_rotary_buffers_left_out_with_a_note(tmp_path: Path) -> None:
    for seed, name in enumerate(["base", "a"]):
        values = typed(drawn(seed))
        values["model.position_ids"] = ("I64", np.arange(5) + seed)
        values["model.layers.0.rotary_emb.inv_freq"] = ("F32", np.ones(4, "<f4"))
        write_model(tmp_path / name, values)
    result = run_recipe(linear(tmp_path, "base", "a", out_dtype="float16"), tmp_path / "out")
    written = tensors(result.folder)
    assert written["model.position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert written["model.position_ids"].dtype == np.int64
    assert written[EMBEDDING].dtype == np.float16
    assert "model.layers.0.rotary_emb.inv_freq" not in written
    assert any("inv_freq" in note for note in result.plan.notes)


@pytest.mark.parametrize("out", [None, "float32", "float16", "bfloat16"])
def test_inputs_of_mixed_dtypes_merge_into_the_donors_or_the_wanted_one(
    tmp_path: Path, out: str | None
) -> None:
    values = drawn(1)
    for dtype in ("F32", "F16", "BF16", "F64"):
        write_model(tmp_path / dtype, typed(values, dtype))
    result = run_recipe(
        linear(tmp_path, "F16", "F32", "BF16", "F64", **({"out_dtype": out} if out else {})),
        tmp_path / "out",
    )
    wanted = {None: "F16", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[out]
    assert {s.dtype for s in result.plan.steps} == {wanted}
    kinds = ((values[HEAD], "F64"), (values[HEAD], "F32"), (values[HEAD], "F16"))
    mean = sum(stored(v, d).astype(np.float64) for v, d in kinds)
    wide = (stored(values[HEAD], "BF16").astype(np.uint32) << 16).view(np.float32)
    mean = (mean + wide) / 4
    if (
        wanted != "BF16"
    ):  # numpy has no bfloat16; the float32 sum of four is off by a few float32 units
        half_unit = 2.0**-11 if wanted == "F16" else 2.0**-22
        np.testing.assert_allclose(tensors(result.folder)[HEAD], mean, rtol=half_unit, atol=1e-6)


def test_tensors_of_narrow_dtypes_do_not_shift_wide_ones(tmp_path: Path) -> None:
    import torch

    values = {
        "a.mask": ("BOOL", np.array([True, False, True])),
        "b.scale": ("BF16", stored(np.ones(3, "<f4"), "BF16")),
        "c.weight": ("F32", np.arange(5, dtype="<f4")),
        "d.position": ("I64", np.arange(3)),
    }
    write_model(tmp_path / "base", values)
    run_recipe(linear(tmp_path, "base"), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.get_tensor("c.weight").tolist() == [0, 1, 2, 3, 4]
        assert opened.get_tensor("d.position").tolist() == [0, 1, 2]
        assert opened.get_tensor("b.scale").dtype == torch.bfloat16
        assert opened.get_tensor("a.mask").tolist() == [True, False, True]
        places = {
            n: opened.get_tensor(n).data_ptr() % opened.get_tensor(n).element_size() for n in values
        }
    assert set(places.values()) == {0}


def test_how_inputs_are_split_into_files_does_not_show(tmp_path: Path) -> None:
    written = []
    for shards in (1, 2, 5):
        models = family(tmp_path / str(shards), "a", "b", shards=shards)
        run_recipe(
            ties_recipe(tmp_path / str(shards) / "r.yaml", models), tmp_path / f"out{shards}"
        )
        written.append(contents(tmp_path / f"out{shards}")["model.safetensors"])
    assert len(set(written)) == 1


def test_empty_and_scalar_tensors_are_merged(tmp_path: Path) -> None:
    for name, value in (("base", 1.0), ("a", 3.0)):
        values = {
            "scalar": np.array(value, "<f4"),
            "none": np.ones((0, 4), "<f4"),
            "flat": np.ones((4, 0), "<f4"),
        }
        write_model(tmp_path / name, typed(values))
    run_recipe(linear(tmp_path, "base", "a"), tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert written["scalar"] == 2.0
    assert (written["none"].shape, written["flat"].shape) == ((0, 4), (4, 0))


def test_a_model_without_tensors_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {})
    assert "holds no tensors" in refusal(linear(tmp_path, "base"))


# -- values per tensor -----------------------------------------------------------------------------


def test_gradients_and_filters_resolve_to_one_value_per_tensor_and_model(tmp_path: Path) -> None:
    family(tmp_path, "a", like=shapes(layers=5))
    weight = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 2.0}]
    models = {"base": {"weight": [1.0, 3.0]}, "a": {"weight": weight}}
    plan = plan_recipe(write_recipe(tmp_path / "r.yaml", models=models, merge_method="linear"))
    for layer in range(5):
        own = 1 + layer / 2
        assert step(plan, f"model.layers.{layer}.mlp.up_proj.weight").parameters["weight"] == [
            own,
            layer / 4,
        ]
        assert step(plan, f"model.layers.{layer}.self_attn.q_proj.weight").parameters["weight"] == [
            own,
            2.0,
        ]
    assert step(plan, EMBEDDING).parameters["weight"] == [1.0, 2.0]
    assert step(plan, "model.norm.weight").parameters["weight"] == [3.0, 2.0]


def test_a_tensor_that_no_rule_fits_is_named_with_the_line_of_the_rules(tmp_path: Path) -> None:
    family(tmp_path)
    rules = {"base": {"weight": [{"filter": "mlp", "value": 1.0}]}}
    message = refusal(write_recipe(tmp_path / "r.yaml", models=rules, merge_method="linear"))
    assert re.search(r"r\.yaml:\d+: no rule of weight fits tensor 'lm_head.weight'", message)


def test_weights_that_sum_to_zero_are_refused_with_file_and_line(tmp_path: Path) -> None:
    family(tmp_path, "a")
    models = {"base": {"weight": 1.0}, "a": {"weight": -1.0}}
    message = refusal(write_recipe(tmp_path / "r.yaml", models=models, merge_method="linear"))
    assert re.search(r"r\.yaml:\d+: .*sum to 0", message)


def test_a_tokenizer_source_that_is_no_model_is_refused_with_its_line(tmp_path: Path) -> None:
    family(tmp_path, "a")
    message = refusal(linear(tmp_path, "base", "a", tokenizer_source="c"), SourceError)
    assert re.search(r"r\.yaml:\d+: the source of tokens is 'c'; it must be base, union", message)
    message = refusal(linear(tmp_path, "base", "a", tokenizer={"source": "unoin"}), SourceError)
    assert "the source of tokens is 'unoin' (did you mean 'union'?); it must be" in message


# -- memory and disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_the_smallest_memory_cap_that_is_named_does(tmp_path: Path, method: str) -> None:
    models = family(tmp_path, "a", "b", like={"w": (600, 700)})
    if method == "ties":
        recipe = ties_recipe(tmp_path / "r.yaml", models)
    else:
        recipe = linear(tmp_path, "base", "a", "b")
    with pytest.raises(
        PlanError, match=r"--memory 1MiB is too small .* (\d+)MiB is the least"
    ) as caught:
        run_recipe(recipe, tmp_path / "out", memory="1MiB")
    assert not list(tmp_path.glob("out*"))
    least = int(re.findall(r"(\d+)MiB", str(caught.value))[-1])
    with pytest.raises(PlanError):
        run_recipe(recipe, tmp_path / "out", memory=f"{least - 1}MiB")
    result = run_recipe(recipe, tmp_path / "out", memory=f"{least}MiB")
    assert result.budget.peak <= least << 20
    run_recipe(recipe, tmp_path / "roomy", memory="4GiB")
    assert contents(tmp_path / "out") == contents(tmp_path / "roomy")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ties_recipe(tmp_path / "r.yaml", family(tmp_path, "a"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    message = refusal(recipe)
    assert "the merge takes 2.66 kB and the disk has 1.00 kB free" in message
    assert "choose another output" in message


# -- the digest ------------------------------------------------------------------------------------


def test_the_digest_does_not_depend_on_memory_threads_or_place(tmp_path: Path) -> None:
    digests = set()
    for place in ("x", "y"):
        models = family(tmp_path / place, "a", "b")
        plan = plan_recipe(ties_recipe(tmp_path / place / "r.yaml", models))
        digests.add(plan.digest)
        for memory, threads in (("200MiB", 1), ("1GiB", 3)):
            make_budget(plan, memory, threads)
            digests.add(plan.digest)
    assert len(digests) == 1


def test_the_digest_depends_on_everything_that_changes_bytes(tmp_path: Path) -> None:
    models = family(tmp_path, "a", "b")
    plain: dict[str, Any] = {"a": {"weight": 0.5}, "b": {"weight": 0.5}}
    base = {"models": plain, "merge_method": "ties", "base_model": "base"}
    variants = [
        base,
        base | {"models": {"a": {"weight": 0.5}, "b": {"weight": 0.6}}},
        base | {"models": {"a": {"weight": 0.5}, "b": {"weight": 0.5, "density": 0.5}}},
        base | {"models": {"b": {"weight": 0.5}, "a": {"weight": 0.5}}},
        base | {"merge_method": "dare_ties"},
        base | {"merge_method": "dare_ties", "parameters": {"seed": 1}},
        base | {"parameters": {"lambda": 0.5}},
        base | {"out_dtype": "bfloat16"},
        base | {"shard_size": "1KB"},
        base | {"compat": "mergekit"},
    ]
    digests = [plan_recipe(write_recipe(tmp_path / "r.yaml", **keys)).digest for keys in variants]
    assert len(set(digests)) == len(variants)
    assert models


# -- places of the output --------------------------------------------------------------------------


def test_an_output_that_would_bury_an_input_is_refused(tmp_path: Path) -> None:
    models = family(tmp_path / "zoo", "a")
    recipe = ties_recipe(tmp_path / "zoo" / "r.yaml", models)
    before = contents(tmp_path)
    for output in (models["a"], models["base"] / "out", tmp_path / "zoo", tmp_path):
        with pytest.raises(OutputError, match="choose another output"):
            run_recipe(recipe, output, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", ["/", "x" * 250, "x" * 300])
def test_a_place_without_room_for_a_name_is_refused(tmp_path: Path, output: str) -> None:
    recipe = ties_recipe(tmp_path / "r.yaml", family(tmp_path, "a"))
    with pytest.raises(OutputError, match="no place for a model"):
        run_recipe(recipe, tmp_path / output)


def test_an_output_is_needed(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"r\.yaml:1: no output"):
        run_recipe(ties_recipe(tmp_path / "r.yaml", family(tmp_path, "a")))
