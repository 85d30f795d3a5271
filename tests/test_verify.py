"""Whatever happens to a finished output afterwards is found."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import drawn, family, ties_recipe, typed, write_model, write_tensors

from merge.errors import RequestError, VerifyError
from merge.experts.checks.loading import check_loads
from merge.pipeline import run_recipe
from merge.sources.weights import open_safetensors
from merge.verify import verify_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Finished outputs by number of weight files."""
    folder = tmp_path_factory.mktemp("finished")
    models = family(folder, "a", "b")
    outputs = {1: "1GB", 2: "2KB"}
    for files, size in outputs.items():
        run_recipe(ties_recipe(folder / "r.yaml", models, shard_size=size), folder / str(files))
        assert len(list((folder / str(files)).glob("*.safetensors"))) == files
    return {files: folder / str(files) for files in outputs}


@pytest.fixture(params=[1, 2])
def out(request: pytest.FixtureRequest, finished: dict[int, Path], tmp_path: Path) -> Path:
    """A finished output of one or two weight files, to be damaged."""
    return shutil.copytree(finished[request.param], tmp_path / "out")


def found(folder: Path) -> str:
    with pytest.raises(VerifyError) as caught:
        verify_folder(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_an_untouched_output_passes(out: Path) -> None:
    facts = verify_folder(out)
    assert facts["digests"] == "all equal"
    assert facts["tensors"] == len(drawn(0))
    assert facts["bytes"] == sum(value.nbytes for value in drawn(0).values())


def test_a_flipped_bit_anywhere_in_a_weight_file_is_found(out: Path) -> None:
    chosen = random.Random(0)
    for file in out.glob("*.safetensors"):
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        places = [*range(8), header - 1, header, len(whole) - 1, whole.index(b"pt")]
        places += chosen.sample(range(header), 40) + chosen.sample(range(header, len(whole)), 40)
        for place in places:
            content = bytearray(whole)
            content[place] ^= 1 << chosen.randrange(8)
            file.write_bytes(content)
            found(out)
        file.write_bytes(whole)
    verify_folder(out)


def test_a_weight_file_of_another_length_is_found(out: Path) -> None:
    file = next(out.glob("*.safetensors"))
    whole = file.read_bytes()
    for content in (whole + b"\0", whole[:-1], b"", whole + bytes(4096)):
        file.write_bytes(content)
        assert file.name in found(out)


def test_a_changed_index_is_found(finished: dict[int, Path], tmp_path: Path) -> None:
    out = shutil.copytree(finished[2], tmp_path / "out")
    file = out / "model.safetensors.index.json"
    whole = file.read_text()
    data = json.loads(whole)
    for change in (
        whole.replace("total_size", "total_bytes"),
        whole + " ",
        "{",
        json.dumps({**data, "weight_map": {}}),
    ):
        file.write_text(change)
        assert "index" in found(out)
    file.unlink()
    found(out)


def test_a_stray_weight_file_is_found(out: Path) -> None:
    write_tensors(out / "extra.safetensors", typed({"x": np.ones(2, "<f4")}))
    assert "extra.safetensors" in found(out)


def rewritten(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Writes the single weight file of `out` anew, well formed, after `change` of its tensors."""
    tensors = {}
    source = open_safetensors(out)
    for name, info in source.tensors.items():
        memory = bytearray(info.nbytes)
        source.read(name, 0, info.rows, memoryview(memory))
        tensors[name] = (info.dtype, np.frombuffer(memory, "<f4").reshape(info.shape))
    change(tensors)
    write_tensors(out / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda t: t.update({"more": t["model.norm.weight"]}), "'more' is not in mergetool.json"),
        (
            lambda t: t.update({"model.norm.wait": t.pop("model.norm.weight")}),
            "'model.norm.wait' is not in mergetool.json",
        ),
        (
            lambda t: t.update({"model.norm.weight": ("F32", np.ones((2, 4), "<f4"))}),
            "is F32 [2, 4], not F32 [8]",
        ),
        (
            lambda t: t.update({"model.norm.weight": ("I32", np.ones(8, "<i4"))}),
            "is I32 [8], not F32 [8]",
        ),
        (lambda t: t.update({"model.norm.weight": ("F32", np.ones(8, "<f4"))}), "header changed"),
        (lambda t: None, "header changed"),
    ],
)
def test_a_well_formed_file_of_other_tensors_is_found(
    finished: dict[int, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], part: str
) -> None:
    out = shutil.copytree(finished[1], tmp_path / "out")
    rewritten(out, change)
    assert part in found(out)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"plan": 1, "outputs": 5, "files": {}}', '{"outputs": {"a": 1}}', "\0"],
)
def test_a_damaged_provenance_is_found(out: Path, text: str) -> None:
    (out / "mergetool.json").write_text(text)
    found(out)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_change_of_any_file_but_the_card_is_found(out: Path, file: str) -> None:
    (out / "README.md").write_text("mine")
    verify_folder(out)
    with (out / file).open("ab") as stream:
        stream.write(b" ")
    assert file in found(out)


def test_an_emptied_list_of_files_is_found(out: Path) -> None:
    data = json.loads((out / "mergetool.json").read_text())
    (out / "mergetool.json").write_text(json.dumps(data | {"files": {}}))
    assert "mergetool.json" in found(out)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    found(tmp_path)
    with pytest.raises(RequestError, match="no such folder"):
        verify_folder(tmp_path / "missing")
    write_tensors(tmp_path / "model.safetensors", typed(drawn(1)))
    assert "config.json" in found(tmp_path)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_a_foreign_model_is_searched_for_values_that_are_not_finite(
    tmp_path: Path, dtype: str
) -> None:
    values = drawn(1)
    model = write_model(tmp_path / "m", typed(values, dtype))
    assert verify_folder(model)["digests"].startswith("no mergetool.json")
    values["lm_head.weight"][2, 3] = np.nan
    write_model(model, typed(values, dtype))
    assert "'lm_head.weight' holds NaN or infinity in element 19" in found(model)


# -- loading with transformers ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def loadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that transformers saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("loadable")
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "m")
    return folder / "m"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            "'model.norm.weight' is missing when loaded as LlamaForCausalLM",
        ),
        (
            lambda t: t.update({"model.more.weight": t["model.norm.weight"]}),
            "'model.more.weight' is not expected",
        ),
        (
            lambda t: t.update({"model.norm.weight": ("F32", np.ones(9, "<f4"))}),
            "model.norm.weight",
        ),
    ],
)
def test_a_tensor_that_transformers_does_not_place_is_named(
    loadable: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], part: str
) -> None:
    model = shutil.copytree(loadable, tmp_path / "m")
    assert check_loads(model) == {
        "loads_as": "LlamaForCausalLM",
        "compared": True,
        "forward": True,
    }
    rewritten(model, change)
    with pytest.raises(VerifyError) as caught:
        check_loads(model)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_transformers_does_not_know_is_one_line(
    loadable: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(loadable, tmp_path / "m")
    (model / "config.json").write_text(
        '{"model_type": "no_such_model", "architectures": ["NoSuchModel"]}'
    )
    with pytest.raises(VerifyError, match="cannot be loaded with transformers") as caught:
        check_loads(model)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_hidden_layers": 20}, "num_hidden_layers 20, but the files hold 12 tensors"),
        ({"intermediate_size": 4000}, r"\d+ parameters, but the files hold \d+"),
    ],
)
def test_a_config_of_a_larger_model_is_found_before_it_fills_the_memory(
    loadable: Path, tmp_path: Path, change: dict[str, int], what: str
) -> None:
    model = shutil.copytree(loadable, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(VerifyError, match=rf"config\.json describes {what}"):
        check_loads(model)


def test_a_model_that_is_no_language_model_loads_as_what_it_says(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "m")
    assert check_loads(tmp_path / "m") == {
        "loads_as": "ViTForImageClassification",
        "compared": True,
        "forward": False,  # it takes no tokens
    }
