"""Quantised weights and the files of other formats: told by name, and refused before a weight is read.

A merge needs plain floats. What a quantised checkpoint stores are codes and scales, whose mean is the
mean of nothing.
"""

from collections.abc import Iterable

from merge.errors import SourceError

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
