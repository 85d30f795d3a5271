"""Quantised weights and the files of other formats: told by name, and refused before a weight is read.

A merge needs plain floats. What a quantised checkpoint stores are codes and scales, whose mean is the
mean of nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from merge.errors import SourceError
from merge.numerics import FLOATS
from merge.sources import TensorInfo

# as config.json calls a way to quantise: as people do; whatever else stands there is told as it is
METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
}
# endings of the names of tensors that one weight became; the first format whose endings are all there
WEIGHTS = (
    ("bitsandbytes 8-bit", (".SCB",)),
    ("bitsandbytes 4-bit (NF4)", (".quant_state.bitsandbytes__nf4",)),
    ("bitsandbytes 4-bit (FP4)", (".quant_state.bitsandbytes__fp4",)),
    ("bitsandbytes 4-bit", (".absmax", ".quant_map")),
    ("GPTQ", (".qweight", ".g_idx")),
    ("GPTQ or AWQ", (".qweight", ".scales")),
    ("compressed-tensors", (".weight_packed",)),
    ("MXFP4", ("_blocks", "_scales")),
    ("AQLM", (".codes", ".codebooks")),
    ("HQQ", (".W_q",)),
    ("EETQ", (".weight_scales",)),
    ("torchao", ("._weight_qdata",)),
    ("Quanto", ("._data", "._scale")),
    ("MLX", (".weight", ".scales", ".biases")),
    ("fp8 or int8 with scales", (".weight_scale_inv",)),
    ("fp8 or int8 with scales", (".weight_scale",)),
)
LOW_PRECISION = {
    "F8_E4M3": "fp8",
    "F8_E4M3FNUZ": "fp8",
    "F8_E5M2": "fp8",
    "F8_E5M2FNUZ": "fp8",
    "F8_E8M0": "the scales of MXFP4 or MXFP8",
    "F6_E2M3": "fp6",
    "F6_E3M2": "fp6",
    "F4": "fp4",
}
MAGIC = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file, as TensorFlow writes",
    b"\x93NUM": "a numpy file",
    b"version ": "the pointer of git LFS to a file that was not fetched (git lfs pull)",
}
ENDINGS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".npz": "numpy or MLX",
    ".tflite": "TensorFlow Lite",
    ".ot": "rust-bert",
    ".ckpt": "Lightning or TensorFlow",
}
CLASSES = {"bitsandbytes": "bitsandbytes", "hqq": "HQQ", "quanto": "Quanto", "torchao": "torchao"}
ORIGINAL = "merge the model that it was made from, or dequantise it first"


def refuse_declared(where: str, config: Mapping[str, Any]) -> None:
    """SourceError where config.json says that the weights are quantised: no file need be opened then.

    It is refused with plain floats too: a merge takes its config.json over, and transformers believes it.
    """
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if table.get(key):
                raise SourceError(
                    f"{where}: quantised with {_method(key, table[key])}, says {key} in config.json; "
                    f"{ORIGINAL}; if its weights are plain floats again, remove {key}"
                )


def _method(key: str, told: Any) -> str:
    told = told if isinstance(told, dict) else {}
    method = str(told.get("quant_method") or "")[:40]
    bits = next((n for n in ("4", "8") if told.get(f"load_in_{n}bit")), None)
    if bits:
        return f"bitsandbytes {bits}-bit"
    if method:
        return METHODS.get(method, method if method.isprintable() else repr(method))
    return "MLX" if key == "quantization" else "a method that it does not name"


def refuse_quantised(where: str, tensors: Mapping[str, TensorInfo]) -> None:
    """SourceError where names and dtypes of the tensors are those of quantised weights."""
    for format, endings in WEIGHTS:
        for name in tensors:
            stem = name.removesuffix(endings[0])
            if stem != name and all(stem + ending in tensors for ending in endings):
                raise SourceError(f"{where}: quantised, {format} (tensor {name!r}); {ORIGINAL}")
    for name, info in tensors.items():
        if name.endswith(".weight") and info.dtype not in FLOATS and len(info.shape) > 1:
            raise SourceError(f"{where}: quantised, {name!r} is stored as {info.dtype}; {ORIGINAL}")


def refuse_magic(file: str, first: bytes) -> None:
    """SourceError where the first bytes of a weight file are those of another format."""
    for magic, format in MAGIC.items():
        if first.startswith(magic):
            raise SourceError(
                f"{file}: is {format}; weights are read from safetensors or PyTorch files"
            )


def foreign_files(names: Iterable[str]) -> str:
    """What the names tell of weights in formats that are not read: 'x.gguf (GGUF)', or nothing."""
    told = ((name, ENDINGS.get("." + name.rpartition(".")[2])) for name in sorted(names))
    return ", ".join([f"{name} ({format})" for name, format in told if format][:3])
