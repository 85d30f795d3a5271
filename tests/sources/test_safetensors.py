"""A hostile or broken weight file is a SourceError of one line, never anything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import drawn, typed, write_model, write_raw, write_tensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from merge.errors import ReadError, SourceError
from merge.sources.safetensors import parse_header
from merge.sources.weights import open_safetensors, weight_files

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]},
}


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_safetensors(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def changed(**entries: Any) -> dict[str, Any]:
    return GOOD | {name: GOOD.get(name, {}) | entry for name, entry in entries.items()}


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (changed(a={"data_offsets": [0, 15]}), "has 15 bytes, not 16"),
        (changed(a={"data_offsets": [-16, 0]}), "whole numbers"),
        (changed(a={"data_offsets": [16, 0]}), "not 16"),
        (changed(b={"data_offsets": [1 << 40, (1 << 40) + 3]}), "belong to none"),
        (changed(b={"data_offsets": [8, 11]}), "overlap"),
        (changed(b={"shape": [20], "data_offsets": [16, 36]}), "cut off"),
        (
            changed(b={"shape": [2], "data_offsets": [16, 18]}),
            "1 bytes at its end belong to no tensor",
        ),
        (changed(b={"shape": [2], "data_offsets": [17, 19]}), "belong to none"),
        (changed(a={"shape": [-2, -2]}), "whole numbers"),
        (changed(a={"shape": [2.0, 2]}), "whole numbers"),
        (changed(a={"shape": [True, 4]}), "whole numbers"),
        (changed(a={"shape": "22"}), "whole numbers"),
        (changed(a={"shape": [1 << 70, 0], "data_offsets": [0, 0]}), "whole numbers"),
        (changed(a={"shape": [1 << 40, 0], "data_offsets": [0, 0]}), "holds nothing"),
        (changed(a={"dtype": "F8_E4M3", "shape": [16]}), "'F8_E4M3'"),
        (changed(a={"dtype": ["F32"]}), "F32"),
        (changed(a={"dtype": "Q4_K"}), "dequantise"),
        (GOOD | {"a": 5}, "has no dtype"),
        (GOOD | {"a": {}}, "has no dtype"),
        (GOOD | {"a\nb": GOOD["a"]}, "cannot be the name"),
        (GOOD | {"\ud800": GOOD["a"]}, "cannot be the name"),
        (GOOD | {"x" * 5000: GOOD["a"]}, "cannot be the name"),
        ([], "list"),
        (None, "NoneType"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, part: str) -> None:
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), bytes(19))
    message = refusal(tmp_path)
    assert part in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (1 << 63).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (9).to_bytes(8, "little") + b"not json!",
        (0).to_bytes(8, "little"),
        (50_000).to_bytes(8, "little") + b"[" * 50_000,
        (12).to_bytes(8, "little") + b"9" * 12,
        (25).to_bytes(8, "little") + b'{"__metadata__":{},"a":1}',
        (14).to_bytes(8, "little") + b'{"a":1, "a":1}',
        (6004).to_bytes(8, "little") + b'{"a"' + b":" + b"1" * 5998 + b"}",
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, typed({"a": np.ones((2, 3), "<f4")}))
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refusal(tmp_path)


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": "../escape.safetensors"}, "'../escape.safetensors' is not in this folder"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' is not in this folder"),
        ({"a": ".."}, "is not in this folder"),
        ({"a": "x\0y"}, "is not in this folder"),
        ({"a": "\ud800"}, "is not in this folder"),
        ({"a": ""}, "model"),
        ({"a": "gone.safetensors"}, "gone.safetensors: missing, though the index names it"),
        (
            {"a": "one.safetensors", "c": "one.safetensors"},
            "says that 'c' is in one.safetensors, but it is in no file",
        ),
        ({"a": "two.safetensors"}, "says that 'a' is in two.safetensors, but it is in no file"),
        (
            {"a": "one.safetensors", "b": "three.safetensors"},
            "tensor 'a' is in one.safetensors and in three.safetensors",
        ),
        ({}, "names no tensors"),
        ([], "not a shard index"),
        (None, "not a shard index"),
        ({"a": 5}, "5"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, part: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    one, two = (typed({name: np.ones(3, "<f4")}) for name in "ab")
    write_tensors(tmp_path / "escape.safetensors", one)
    write_tensors(model / "one.safetensors", one)
    write_tensors(model / "two.safetensors", two)
    write_tensors(model / "three.safetensors", one | two)
    index(model, weight_map)
    assert part in refusal(model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', "[" * 100_000, '"x"'])
def test_garbage_as_an_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refusal(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    assert "found nothing" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "missing")
    (tmp_path / "model.safetensors").mkdir()
    refusal(tmp_path)


def test_a_single_weight_file_of_another_name_is_taken(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", typed({"a": np.ones(3, "<f4")}))
    assert weight_files(tmp_path) == ["weights.safetensors"]


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_are_read_as_the_library_reads_them(tmp_path: Path, shards: int) -> None:
    model = write_model(tmp_path / "m", typed(drawn(1)), shards=shards)
    expected: dict[str, Any] = {}
    for file in weight_files(model):
        expected |= load_file(model / file)
    source = open_safetensors(model)
    assert source.tensors.keys() == expected.keys()
    for name, info in source.tensors.items():
        for first, end in ((0, info.rows), (1, info.rows), (info.rows // 2, info.rows // 2)):
            out = bytearray((end - first) * info.row_bytes)
            source.read(name, first, end, memoryview(out))
            assert bytes(out) == expected[name][first:end].tobytes()
            mapped = source.mapped(name, first, end)
            assert mapped is None or mapped.tobytes() == bytes(out)


@pytest.mark.parametrize("before", range(4))
def test_only_rows_at_multiples_of_their_values_size_are_mapped(
    tmp_path: Path, before: int
) -> None:
    tensors = {"a": ("U8", np.zeros(before, np.uint8)), "b": ("F32", np.arange(6, dtype="f4"))}
    write_tensors(tmp_path / "model.safetensors", tensors)
    source = open_safetensors(tmp_path)
    info = source.tensors["b"]
    mapped = source.mapped("b", 1, 4)
    assert (mapped is not None) == (info.offset % 4 == 0)
    if mapped is not None:
        assert mapped.tolist() == [[1.0], [2.0], [3.0]]
        assert not mapped.flags.writeable


def test_a_file_that_shrinks_after_opening_is_a_read_error(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m", typed(drawn(1))) / "model.safetensors"
    source = open_safetensors(file.parent)
    file.write_bytes(file.read_bytes()[:-10])
    name, info = max(source.tensors.items(), key=lambda item: item[1].offset)
    with pytest.raises(ReadError, match=r"model\.safetensors: ends inside tensor"):
        source.read(name, 0, info.rows, memoryview(bytearray(info.nbytes)))


@pytest.mark.parametrize("mapped_before", [True, False])
def test_a_mapped_file_that_shrinks_is_a_read_error(tmp_path: Path, mapped_before: bool) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((2, 8), np.float32), "b": np.ones((2, 8), np.float32)}, file)
    source = open_safetensors(tmp_path)
    if mapped_before:
        assert source.mapped("a", 0, 2) is not None
    file.write_bytes(file.read_bytes()[:-10])
    for name in ("a", "b") if mapped_before else ("b",):
        with pytest.raises(ReadError, match=r"model\.safetensors: ends inside tensor"):
            source.mapped(name, 0, 2)


# -- laws over drawn headers -----------------------------------------------------------------------

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 40)
    | st.floats()
    | st.sampled_from(["F32", "BF16", "BOOL", "F8_E5M2", ""])
    | st.text(max_size=4)
    | st.lists(st.integers(-2, 20), max_size=4)
)


@st.composite
def mutated_headers(draw: Callable[..., Any]) -> bytes:
    header = json.loads(json.dumps(GOOD))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3))
        if draw(st.booleans()) or not isinstance(header.get(name), dict):
            header[name] = draw(VALUES | st.just(GOOD["a"]))
        else:
            header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(VALUES)
    text = bytearray(json.dumps(header).encode())
    for _ in range(draw(st.integers(0, 2))):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return bytes(text)


@given(mutated_headers(), st.integers(0, 40))
def test_any_header_gives_tensors_inside_the_file_or_a_source_error(text: bytes, data: int) -> None:
    size = 8 + len(text) + data
    try:
        tensors = parse_header("file", size, text)
    except SourceError:
        with pytest.raises(SourceError, match=r"\Afile: [^\n]+\Z"):
            parse_header("file", size, text)
        return
    for info in tensors.values():
        assert 8 + len(text) <= info.offset <= info.offset + info.nbytes <= size
