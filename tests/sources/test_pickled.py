"""PyTorch checkpoints give the bytes that torch gives, and no pickle is ever run."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import contents, drawn, family, ties_recipe, typed, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import merge
from merge import run_recipe
from merge.errors import ReadError, SourceError
from merge.sources import Source, TensorInfo
from merge.sources.pickled import parse_checkpoint, read_checkpoint
from merge.sources.positioned import stored_source
from merge.sources.weights import PICKLED, open_weights, weight_files

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # the old format has none of them
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
GRID = torch.arange(24.0).reshape(4, 6)


def save(value: Any, file: Path, zipped: bool = True) -> Path:
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file


def saved(value: Any, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, row by row."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def rows(source: Source, name: str, first: int, end: int) -> bytes:
    out = bytearray((end - first) * source.tensors[name].row_bytes)
    source.read(name, first, end, memoryview(out))
    return bytes(out)


def check(source: Source, expected: dict[str, torch.Tensor]) -> None:
    """Names, shapes and all bytes, read whole and in two pieces."""
    assert source.tensors.keys() == expected.keys()
    for name, info in source.tensors.items():
        assert info.shape == tuple(expected[name].shape)
        half = info.rows // 2
        pieces = rows(source, name, 0, half) + rows(source, name, half, info.rows)
        assert rows(source, name, 0, info.rows) == pieces == raw(expected[name]), name


def refusal(file: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read_checkpoint(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert len(message.splitlines()) == 1
    return message


@FORMATS
def test_every_dtype_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    kinds = FLOATS + INTEGERS + (UNSIGNED if zipped else ())
    tensors = {str(kind): torch.arange(12).reshape(3, 4).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "none": torch.zeros(3, 0)}
    file = save(OrderedDict(tensors), tmp_path / "m.bin", zipped)
    check(stored_source(read_checkpoint(file)), torch.load(file))


@FORMATS
def test_views_and_parameters_are_read_where_they_lie(tmp_path: Path, zipped: bool) -> None:
    marked = torch.nn.Parameter(GRID + 1)
    marked.origin = "a parameter with attributes is saved by another function"  # type: ignore[attr-defined]
    tensors = {
        "whole": GRID,
        "tied": GRID,
        "transposed": GRID.t(),
        "part": GRID[1:3],
        "columns": GRID[1:, 2:5],
        "transposed part": GRID[1:3, 2:5].t(),
        "column": GRID[:, 3],
        "one row": GRID[2:3, ::2],
        "one column": GRID[:, 2:3],
        "cut cube": torch.arange(24).reshape(2, 3, 4)[:, :, 1:3],
        "parameter": torch.nn.Parameter(GRID * 2, requires_grad=False),
        "marked": marked,
    }
    file = save(tensors, tmp_path / "m.pt", zipped)
    found = read_checkpoint(file)
    check(stored_source(found), torch.load(file, weights_only=False))
    assert found["tied"] == found["whole"], "what is tied is stored once"
    assert found["transposed"].strides == (1, 6)
    assert found["part"].strides is None


def test_reading_a_transposed_tensor_tells_what_it_takes(tmp_path: Path) -> None:
    tensors = {"plain": GRID, "transposed": GRID.t(), "columns": GRID[:, :3]}
    source = stored_source(read_checkpoint(save(tensors, tmp_path / "m.bin")))
    assert [source.scratch(name, 2) for name in tensors] == [0, 2 * 4 * 4, 0]


@pytest.mark.parametrize(
    "tensor",
    [GRID[::2, ::2], torch.zeros(2, 3, 4).transpose(1, 2), GRID.reshape(2, 2, 6).permute(2, 1, 0)],
)
def test_other_strides_are_refused_with_what_to_do(tmp_path: Path, tensor: torch.Tensor) -> None:
    message = refusal(save({"odd": tensor}, tmp_path / "m.bin"))
    assert "'odd'" in message
    assert ".contiguous()" in message


def test_an_expanded_tensor_is_no_way_to_be_huge(tmp_path: Path) -> None:
    huge = torch.zeros(1, 8).expand(1 << 36, 8)
    assert "goes beyond its storage" in refusal(save({"huge": huge}, tmp_path / "m.bin"))


@FORMATS
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t, "epoch": 3, "hyper": {"lr": [0.1, None, True]}},
        lambda t: {"model": t, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        lambda t: {0: {"step": 7}, "net": t},
        lambda t: {"net": t, "args": Namespace(lr=0.1), "best": np.float64(0.5)},
        lambda t: {"net": t, "random": np.random.default_rng(0).random(3)},
        lambda t: t | {"extra": {"nested": (1, 2.5, b"bytes", {"a", "b"})}, "note": None},
        lambda t: t | {"size": torch.Size([2, 3]), "device": torch.device("cpu")},
    ],
)
def test_the_table_of_tensors_is_found(
    tmp_path: Path, zipped: bool, wrap: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    tensors = {"a": GRID, "b": GRID.t().contiguous()}
    file = save(wrap(tensors), tmp_path / "m.pth", zipped)
    check(stored_source(read_checkpoint(file)), tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers_is_the_same_in_either_format(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    merged = []
    for kind in ("safetensors", "pickled"):
        for seed, name in enumerate(("base", "one")):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).to(torch.bfloat16)
            model.save_pretrained(tmp_path / kind / name)
            if kind == "pickled":
                (tmp_path / kind / name / "model.safetensors").unlink()
                save(model.state_dict(), tmp_path / kind / name / PICKLED.single)
        models = {name: tmp_path / kind / name for name in ("base", "one")}
        recipe = ties_recipe(tmp_path / kind / "r.yaml", models)
        merged.append(run_recipe(recipe, tmp_path / kind / "out").folder / "model.safetensors")
    assert merged[0].read_bytes() == merged[1].read_bytes()
    assert LlamaForCausalLM.from_pretrained(merged[1].parent)


def test_a_real_module_gives_its_state(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    file = save(module.state_dict(), tmp_path / "m.bin")
    check(stored_source(read_checkpoint(file)), dict(module.state_dict()))


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (
            {"model": {"a": GRID}, "ema": {"a": GRID}},
            "2 tables of tensors ('model', 'ema'), not one",
        ),
        ({"deep": {"net": {"a": GRID}}}, "no table of tensors"),
        ({}, "no table of tensors"),
        ([GRID], "no table of tensors"),
        (GRID, "no table of tensors"),
        ({"a": GRID, "more": {"b": [GRID]}}, "holds tensors in a table below"),
        ({"a": GRID, 7: GRID}, "name is of type int, no text"),
        ({"a\nb": GRID}, "cannot be the name of a tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "stored as 'C64'"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "'F8_E4M3', which is fp8"),
        ({"a": torch.eye(3).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.nn.Linear(2, 2)}, "'torch.nn.modules.linear.Linear', code"),
    ],
)
def test_what_is_no_table_of_plain_tensors_is_refused(
    tmp_path: Path, value: Any, part: str
) -> None:
    assert part in refusal(save(value, tmp_path / "m.bin"))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_of_torch_is_refused(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(GRID, 0.1, 0, torch.qint8)
    assert "_rebuild_qtensor" in refusal(save({"a": quantised}, tmp_path / "m.bin"))


class Attack:
    """Unpickling it runs a command."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@FORMATS
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (exec, "builtins.exec"),
        (getattr, "getattr"),
    ],
)
def test_an_attack_is_named_and_never_run(
    tmp_path: Path, zipped: bool, function: Callable[..., Any], name: str
) -> None:
    mark = tmp_path / "ran"
    command = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    arguments = (command, "upper") if function is getattr else (command,)
    hidden = {"a": GRID, "b": Attack(function, *arguments)}
    file = save(hidden, tmp_path / "m.bin", zipped)
    if function is os.system:
        torch.load(file, weights_only=False)
        assert mark.exists(), "the attack works where pickles are run"
        mark.unlink()
    message = refusal(file)
    assert name in message.replace("__builtin__", "builtins")
    assert "never run" in message
    assert not mark.exists()


def with_pickle(text: bytes, **entries: bytes) -> bytes:
    """A checkpoint in which `text` is the pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in ({"data.pkl": text, "data/0": bytes(64)} | entries).items():
            archive.writestr(f"m/{name}", data)
    return out.getvalue()


def parsed(data: bytes) -> dict[str, TensorInfo]:
    return parse_checkpoint("m.bin", len(data), lambda start, end: data[start:end])


HUNDRED_THOUSAND = (
    b"\x80\x02}(" + b"".join(b"J%bN" % struct.pack("<i", i) for i in range(100_000)) + b"uq\x00"
)
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n)R"
BOMBS = {
    "a table named often": HUNDRED_THOUSAND + b"0}(" + b"Nh\x00" * 100_000 + b"u.",
    "a list named often": (
        HUNDRED_THOUSAND + b"0}(X\x01\x00\x00\x00a" + TENSOR + b"h\x00h\x00" * 100_000 + b"u."
    ),
    "a nested name": b"\x80\x02})" + b"\x85" * 300_000 + TENSOR + b"s.",
    "a doubled name": b"\x80\x02})" + b"q\x00h\x00\x86" * 100 + TENSOR + b"s.",
    "a number as a name": b"\x80\x02}\x8b\x00\x00\x01\x00" + b"\x7f" * 65536 + TENSOR + b"s.",
    "a memo place of 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "memo places that collide": b"\x80\x02}" + b"p%d\n" % ((1 << 61) - 1) + b".",
    "doubling": b"\x80\x02]q\x00" + b"(h\x00h\x00tq\x00" * 100_000 + b".",
    "a text of 2^62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a.",
    "bytes of 2^62": b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"a.",
    "nested lists": b"\x80\x02" + b"](" * 100_000 + b".",
    "deep lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "a deep table": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 100_000 + b"}" + b"s" * 100_000 + b".",
    "a number of 100,000 digits": b"I" + b"9" * 100_000 + b"\n.",
    "marks": b"(" * 300_000 + b".",
    "no stop": b"\x80\x02}",
    "nothing": b"",
    "an unknown opcode": b"\x80\x02\xff.",
    "an extension": b"\x80\x02\x82\x01.",
    "attributes of a global": b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.",
    "a table as a key": b"\x80\x02}}}s.",
    "a call of data": b"\x80\x02})R.",
    "a global without text": b"\x80\x04K\x01K\x02\x93.",
    "an entry of a list": b"\x80\x02]K\x01K\x02s.",
    "tables from one list": (
        HUNDRED_THOUSAND + b"\x85q\x010(" + b"ccollections\nOrderedDict\nh\x01R" * 100_000 + b"l."
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_is_a_bomb_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match=r"\Am\.bin: not read as a PyTorch checkpoint[^\n]+\Z"):
        parsed(with_pickle(BOMBS[name]))


GIB4 = struct.pack("<I", 0xFFFFFFF0)
LIMITED = """
import resource, sys
from pathlib import Path
from merge.errors import SourceError
from merge.sources.pickled import read_checkpoint
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
try:
    read_checkpoint(Path(sys.argv[1]))
except SourceError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("record", "at", "part"),
    [
        (b"PK\x01\x02", slice(20, 28), "data.pkl has 4294967280 bytes, over"),
        (b"PK\x05\x06", slice(12, 16), "4294967280 bytes at once, over"),
    ],
    ids=["of the pickle", "of the list of entries"],
)
def test_sizes_are_looked_at_before_memory_is_taken(
    tmp_path: Path, record: bytes, at: slice, part: str
) -> None:
    """A sparse file of 8 GiB that says it is mostly this, read with 1 GiB of memory."""
    data = bytearray(with_pickle(b"\x80\x02}."))
    entries, lying = data.index(b"PK\x01\x02"), data.index(record)
    data[lying + at.start : lying + at.stop] = GIB4 * ((at.stop - at.start) // 4)
    file = tmp_path / "m.bin"
    with file.open("wb") as out:
        out.write(data[:entries])
        out.seek(1 << 33)
        out.write(data[entries:])
    env = os.environ | {"PYTHONPATH": str(Path(merge.__path__[0]).parent)}
    command = [sys.executable, "-c", LIMITED, str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert part in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (with_pickle(b"}.", byteorder=b"big"), "big-endian"),
        (with_pickle(b"}.", **{"data/1": b""}).replace(b"data/1", b"data/0"), "two entries"),
        (with_pickle(b"}.").replace(b"data.pkl", b"meta.pkl"), "0 entries data.pkl"),
        (b"hello", "no file of torch.save"),
        (b"", "no file of torch.save"),
        (b"GGUF" + bytes(100), "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "broken archive"),
    ],
)
def test_an_archive_that_lies_is_refused(data: bytes, part: str) -> None:
    with pytest.raises(SourceError) as caught:
        parsed(data)
    assert part in str(caught.value)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    file = save({"a": GRID}, tmp_path / "m.bin")
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert "compressed" in refusal(packed)


@FORMATS
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    whole = saved({"a": GRID, "b": torch.ones(3)}, zipped)
    for length in range(len(whole)):
        with pytest.raises(SourceError, match=r"\Am\.bin: [^\n]+\Z"):
            parsed(whole[:length])


def test_a_file_that_shrinks_after_opening_is_a_read_error(tmp_path: Path) -> None:
    file = save({"a": GRID, "t": GRID.t()}, tmp_path / "m.bin")
    source = stored_source(read_checkpoint(file))
    file.write_bytes(file.read_bytes()[:300])
    for name in "at":
        with pytest.raises(ReadError, match=r"m\.bin: ends inside tensor"):
            rows(source, name, 0, 4)


# -- folders ---------------------------------------------------------------------------------------


def pickled(folder: Path, zipped: bool = True) -> dict[str, torch.Tensor]:
    """Turns a folder of safetensors into one of torch.save, file by file; gives all tensors."""
    out: dict[str, torch.Tensor] = {}
    names = {}
    for i, file in enumerate(sorted(folder.glob("*.safetensors")), start=1):
        total = len(list(folder.glob("*.safetensors"))) + i - 1
        single = file.name == "model.safetensors"
        name = PICKLED.single if single else f"pytorch_model-{i:05d}-of-{total:05d}.bin"
        tensors = load_file(file)
        save(tensors, folder / name, zipped)
        names |= dict.fromkeys(tensors, name)
        out |= tensors
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.unlink()
        (folder / PICKLED.index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return out


@FORMATS
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_checkpoints_is_a_model(tmp_path: Path, zipped: bool, shards: int) -> None:
    model = write_model(tmp_path / "m", typed(drawn(1)), shards=shards)
    expected = pickled(model, zipped)
    (model / "training_args.bin").write_bytes(b"what trainers leave beside it")
    assert len(weight_files(model)) == shards
    check(open_weights(model), expected)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", typed(drawn(1)))
    (model / PICKLED.single).write_bytes(b"never looked at")
    (model / PICKLED.index).write_text("nor this")
    assert weight_files(model) == ["model.safetensors"]
    assert open_weights(model).tensors


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": "../escape.bin"}, "'../escape.bin' is not in this folder"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' is not in this folder"),
        ({"a": "gone.bin"}, "gone.bin: missing, though the index names it"),
        ({"a": "config.json"}, "only *.bin, *.pt, *.pth is read"),
        ({"a": "one.bin", "c": "one.bin"}, "says that 'c' is in one.bin, but it is in no file"),
    ],
)
def test_an_index_that_lies_is_refused(
    tmp_path: Path, weight_map: dict[str, str], part: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save({"a": GRID}, tmp_path / "escape.bin")
    save({"a": GRID}, model / "one.bin")
    (model / PICKLED.index).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError) as caught:
        open_weights(model)
    assert part in str(caught.value)


@FORMATS
def test_a_merge_of_checkpoints_is_the_merge_of_the_same_safetensors(
    tmp_path: Path, zipped: bool
) -> None:
    merged = []
    for kind, shards in (("safetensors", 1), ("pickled", 2)):
        folder = tmp_path / kind
        models = family(folder, "one", "two", dtype="BF16", shards=shards)
        if kind == "pickled":
            for model in models.values():
                pickled(model, zipped)
        merged.append(run_recipe(ties_recipe(folder / "r.yaml", models), folder / "out").folder)
    plain, ours = (contents(folder) for folder in merged)
    different = {name for name in plain if plain[name] != ours.get(name)}
    assert plain.keys() == ours.keys()
    assert different <= {"mergetool.json"}, "which tells the names and sizes of the inputs' files"
    assert (ours.keys() & {PICKLED.single, PICKLED.index}) == set()


def test_transposed_tensors_are_merged_as_if_they_were_not(tmp_path: Path) -> None:
    merged = []
    for kind in ("plain", "transposed"):
        models = family(tmp_path / kind, "one", like={"w.weight": (700, 900), "b.weight": (30,)})
        if kind == "transposed":
            tensors = pickled(models["one"])
            save(
                {n: t.t().contiguous().t() for n, t in tensors.items()},
                models["one"] / PICKLED.single,
            )
        recipe = ties_recipe(tmp_path / kind / "r.yaml", models)
        merged.append(run_recipe(recipe, tmp_path / kind / "out").folder / "model.safetensors")
    assert merged[0].read_bytes() == merged[1].read_bytes()


def test_a_changed_input_is_noticed(tmp_path: Path) -> None:
    models = family(tmp_path, "one")
    for model in models.values():
        pickled(model)
    recipe = ties_recipe(tmp_path / "r.yaml", models)
    assert not run_recipe(recipe, tmp_path / "out").existed
    assert run_recipe(recipe, tmp_path / "out").existed
    other = write_model(tmp_path / "other", typed(drawn(9)))
    pickled(other)
    shutil.copy(other / PICKLED.single, models["one"] / PICKLED.single)
    with pytest.raises(merge.errors.MergetoolError, match="out"):
        run_recipe(recipe, tmp_path / "out")


# -- laws over drawn files -------------------------------------------------------------------------

ORIGINALS = [
    saved({"a": GRID, "t": GRID.t(), "p": torch.nn.Parameter(torch.ones(2)), "n": 1}, zipped)
    for zipped in (True, False)
]
PICKLES = [
    zipfile.ZipFile(io.BytesIO(ORIGINALS[0])).read("archive/data.pkl"),
    pickle.dumps({"a": [1, (2.5, None)], "b": {"c": b"x", 3: True}}, protocol=4),
    pickle.dumps(OrderedDict(a=1), protocol=0),
]
PATCHES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.integers(0, 3)), max_size=6)


def patched(data: bytes, patches: list[tuple[float, int, int]]) -> bytes:
    """`data` with bytes replaced, put in, left out, and numbers of four bytes made huge."""
    out = bytearray(data)
    for where, value, kind in patches:
        at = int(where * (len(out) - 1))
        if kind == 0:
            out[at] = value
        elif kind == 1:
            out.insert(at, value)
        elif kind == 2:
            del out[at]
        else:
            out[at : at + 4] = bytes([value]) * 4
    return bytes(out)


def gives_tensors_or_a_source_error(data: bytes) -> None:
    try:
        tensors = parsed(data)
    except SourceError:
        with pytest.raises(SourceError, match=r"\Am\.bin: [^\n]+\Z"):
            parsed(data)
        return
    for info in tensors.values():
        row, column = info.strides or (info.cols, 1)
        last = (info.rows - 1) * row + (info.cols - 1) * column + 1 if info.nbytes else 0
        assert 0 <= info.offset <= info.offset + last * info.itemsize <= len(data)


@settings(max_examples=400)
@given(st.sampled_from(ORIGINALS), PATCHES)
def test_any_file_gives_tensors_inside_it_or_a_source_error(
    original: bytes, patches: list[tuple[float, int, int]]
) -> None:
    gives_tensors_or_a_source_error(patched(original, patches))


@settings(max_examples=400)
@given(st.sampled_from(PICKLES), PATCHES)
def test_any_pickle_gives_tensors_inside_the_file_or_a_source_error(
    original: bytes, patches: list[tuple[float, int, int]]
) -> None:
    gives_tensors_or_a_source_error(
        with_pickle(patched(original, patches), **{"data/1": bytes(96)})
    )


@given(st.binary(max_size=60))
def test_any_opcodes_give_a_source_error(text: bytes) -> None:
    gives_tensors_or_a_source_error(with_pickle(b"\x80\x02" + text + b"."))
