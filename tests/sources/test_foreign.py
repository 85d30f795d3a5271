"""Quantised and foreign weights are refused by the name of their format, before a weight is read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import drawn, typed, write_model, write_tensors

from merge.errors import SourceError
from merge.sources import weights
from merge.sources.opening import open_model
from merge.sources.weights import weight_files

PLAIN = np.ones((4, 4), "<f4")
CODES = np.ones((4, 4), "<i4")
LINEAR = "model.layers.0.self_attn.q_proj"


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_model(str(folder))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes 4-bit",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes 8-bit"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization_config": {"quant_method": "a new\none"}}, "'a new\\none'"),
        ({"quantization_config": {"bits": 4}}, "does not name"),
        ({"quantization_config": "int8"}, "does not name"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "HQQ"),
    ],
)
def test_a_config_that_says_quantised_is_believed_before_any_file_is_opened(
    tmp_path: Path, config: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain floats too: the merge would have that config and be taken for quantised."""
    model = write_model(tmp_path / "m", typed(drawn(1)), config=config)
    monkeypatch.setattr(weights, "stored_source", lambda _: pytest.fail("weights were opened"))
    message = refusal(model)
    assert name in message
    assert "if its weights are plain floats again, remove" in message


@pytest.mark.parametrize("nothing", [None, {}, False])
def test_a_config_that_says_nothing_is_no_reason(tmp_path: Path, nothing: Any) -> None:
    config = {"quantization_config": nothing}
    assert open_model(str(write_model(tmp_path / "m", typed(drawn(1)), config=config)))


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"weight": CODES.astype("i1"), "SCB": PLAIN}, "bitsandbytes 8-bit"),
        (
            {"weight": CODES.astype("u1"), "weight.absmax": PLAIN}
            | {"weight.quant_state.bitsandbytes__nf4": CODES.astype("u1")},
            "bitsandbytes 4-bit (NF4)",
        ),
        ({"weight": CODES, "weight.absmax": PLAIN, "weight.quant_map": PLAIN}, "bitsandbytes 4"),
        ({"qweight": CODES, "qzeros": CODES, "scales": PLAIN, "g_idx": CODES}, ", GPTQ ("),
        ({"qweight": CODES, "qzeros": CODES, "scales": PLAIN}, "GPTQ or AWQ"),
        ({"weight_packed": CODES, "weight_scale": PLAIN}, "compressed-tensors"),
        ({"weight": CODES.astype("i1"), "weight_scale": PLAIN}, "fp8 or int8 with scales"),
        ({"weight": PLAIN, "weight_scale_inv": PLAIN}, "fp8 or int8 with scales"),
        ({"down_blocks": CODES.astype("u1"), "down_scales": CODES.astype("u1")}, "MXFP4"),
        ({"codes": CODES, "codebooks": PLAIN, "scales": PLAIN}, "AQLM"),
        ({"W_q": CODES, "scale": PLAIN, "zero": PLAIN}, "HQQ"),
        ({"weight": CODES.astype("i1"), "weight_scales": PLAIN}, "EETQ"),
        ({"_weight_qdata": CODES, "_weight_scale": PLAIN}, "torchao"),
        ({"weight": CODES, "scales": PLAIN, "biases": PLAIN}, "MLX"),
        ({"weight": CODES}, "is stored as I32"),
    ],
)
def test_quantised_weights_are_told_by_their_tensors(
    tmp_path: Path, stored: dict[str, Any], name: str
) -> None:
    kinds = {"<f4": "F32", "<i4": "I32", "|i1": "I8", "|u1": "U8"}
    tensors = {f"{LINEAR}.{part}": (kinds[v.dtype.str], v) for part, v in stored.items()}
    message = refusal(write_model(tmp_path / "m", typed(drawn(1)) | tensors))
    assert name in message
    assert "merge the model that it was made from" in message


@pytest.mark.parametrize(
    "name", ["codec.codebooks", "x.scales", "x.biases", "down_blocks.0.weight", "x.absmax", "codes"]
)
def test_names_that_merely_look_alike_are_plain(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "m", typed(drawn(1)) | {name: ("F32", PLAIN)})
    assert name in open_model(str(model)).source.tensors


def test_buffers_of_integers_are_no_codes(tmp_path: Path) -> None:
    buffers = {"embeddings.position_ids": ("I64", np.arange(4).reshape(1, 4))}
    assert open_model(str(write_model(tmp_path / "m", typed(drawn(1)) | buffers)))


def test_low_precision_is_named(tmp_path: Path) -> None:
    header = {"a.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    write_model(tmp_path / "m", typed(drawn(1)))
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "stored as 'F8_E4M3', which is fp8" in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    ("file", "format"),
    [
        ("model-q4_k_m.gguf", "GGUF"),
        ("model.onnx", "ONNX"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("weights.npz", "numpy or MLX"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path: Path, file: str, format: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).touch()
    message = refusal(tmp_path)
    assert f"found {file} ({format})" in message
    assert "convert the weights to safetensors" in message
    write_tensors(tmp_path / "model.safetensors", typed(drawn(1)))
    assert weight_files(tmp_path) == ["model.safetensors"], "beside weights it does no harm"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("first", "format"), [(b"GGUF\x03\0\0\0", "GGUF"), (b"\x89HDF\r\n\x1a\n", "HDF5")]
)
def test_a_file_under_a_wrong_name_is_told_by_its_first_bytes(
    tmp_path: Path, name: str, first: bytes, format: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(first + bytes(100))
    assert f"{name}: is a" in refusal(tmp_path)
    assert format in refusal(tmp_path)


def test_a_folder_and_a_file_of_another_format_are_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for label in (tmp_path, file):
        with pytest.raises(SourceError, match=r"model\.gguf \(GGUF\)"):
            open_model(str(label))


def test_a_model_after_a_plus_is_no_adapter() -> None:
    with pytest.raises(
        SourceError, match="zoo:sorter is a model; what follows a plus is an adapter"
    ):
        open_model("zoo:base+zoo:sorter")
