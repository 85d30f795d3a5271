"""Laws of fetching from the hub, each against a real server on this machine in a fresh process."""

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import TOKEN, HubServer, commit_of
from safetensors.numpy import save_file

import merge
from merge.sources.safetensors import INDEX, SINGLE
from merge.sources.weights import PICKLED, open_safetensors, open_weights

DRIVER = """
import json, sys
from dataclasses import asdict
from merge.errors import MergetoolError
from merge.sources.hub import fetch, fetch_adapter, peek

def answer(call):
    action, repo, revision, offline = call
    try:
        if action != "peek":
            fetching = {"fetch": fetch, "adapter": fetch_adapter}[action]
            folder, commit = fetching(repo, revision, offline=offline)
            return {"folder": str(folder), "commit": commit}
        folder, commit, source = peek(repo, revision, offline=offline)
        name, info = next(iter(source.tensors.items()))
        tensors = {n: asdict(i) for n, i in source.tensors.items()}
        out = {"folder": str(folder), "commit": commit, "tensors": tensors}
        try:
            source.read(name, 0, info.rows, memoryview(bytearray(info.nbytes)))
        except MergetoolError as error:
            out["unread"] = type(error).__name__
        return out
    except MergetoolError as error:
        return {"error": type(error).__name__, "message": str(error), "exit": error.exit_code}

print(json.dumps([answer(call) for call in json.loads(sys.argv[1])]))
"""
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
"""

BESIDE = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"eos_token_id": 1}',
    "tokenizer.json": b'{"model": {"vocab": {"a": 0}}}',
    "tokenizer.model": b"\x0a\x05pieces",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b\n",
    "modeling_own.py": b"raise SystemExit('must never be run')\n",
    "LICENSE": b"free\n",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "tokenizer.bin": b"pickle",
    "model-q4.gguf": b"GGUF",
    "training.pt": b"pickle",
    "model.onnx": b"onnx",
    "consolidated.safetensors": b"the weights a second time",
    "original/params.json": b"{}",
    "original/consolidated.safetensors": b"and a third time",
    "onnx/config.json": b"{}",
    "picture.png": b"png",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def single(folder: Path, seed: int = 0, rows: int = 300) -> Path:
    """A model in one file, 300 x 128 float32 and 64 float16: 154 kB."""
    random = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": random.random((rows, 128), np.float32),
        "model.norm.weight": random.random(64, np.float32).astype(np.float16),
    }
    write(folder, BESIDE)
    save_file(tensors, folder / SINGLE)
    return folder


def sharded(folder: Path) -> Path:
    """A model in two shards with an index."""
    random = np.random.default_rng(7)
    index: dict[str, str] = {}
    write(folder, BESIDE)
    for part in (1, 2):
        file = f"model-0000{part}-of-00002.safetensors"
        tensors = {f"layers.{part}.{i}": random.random((200, 50), np.float32) for i in range(3)}
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    one = write(single(tmp_path / "one"), UNWANTED)
    two = single(tmp_path / "two", seed=1)
    shards = write(sharded(tmp_path / "shards"), UNWANTED)
    repositories = {
        "lab/one": {"main": one, "v2": two},
        "lab/shards": {"main": shards},
        "lab/gated": {"main": one},
        "lab/private": {"main": two},
    }
    with HubServer(repositories, gated=("lab/gated",), private=("lab/private",)) as server:
        yield server


def environment(hub: HubServer, home: Path, extra: dict[str, str]) -> dict[str, str]:
    hidden = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP", "http")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "PYTHONPATH": str(Path(merge.__path__[0]).parent),
    }
    return kept | own | extra


def command(calls: tuple[tuple[str, str, str | None, bool], ...], driver: str) -> list[str]:
    return [sys.executable, "-c", driver, json.dumps(calls)]


def call(
    hub: HubServer,
    home: Path,
    *calls: tuple[str, str, str | None, bool],
    driver: str = DRIVER,
    **extra: str,
) -> list[dict[str, Any]]:
    """What the calls (function, repository, revision, offline) give, in a process of their own."""
    env = environment(hub, home, extra)
    done = subprocess.run(command(calls, driver), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr, "no progress bars without a terminal"
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def refused(answer: dict[str, Any], *words: str) -> None:
    """One line of a SourceError with these words."""
    assert answer.get("error") == "SourceError", answer
    assert answer["exit"] == 2
    assert "\n" not in answer["message"]
    for word in words:
        assert word in answer["message"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def wanted(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in UNWANTED}


def checkpoints(folder: Path) -> Path:
    """A model in two files of torch.save with an index, and what a trainer leaves."""
    import torch

    left = {"training_args.bin": b"pickle", "optimizer.pt": b"pickle", "flax_model.msgpack": b""}
    write(folder, BESIDE | left)
    index: dict[str, str] = {}
    for part in (1, 2):
        file = f"pytorch_model-0000{part}-of-00002.bin"
        tensors = {f"layers.{part}.{i}": torch.full((200, 50), float(i)) for i in range(3)}
        torch.save(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / PICKLED.index).write_text(json.dumps({"weight_map": index}))
    return folder


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def weight_requests(hub: HubServer) -> list[Any]:
    return [r for r in hub.requests if r.server == "store"]


def test_the_folder_holds_the_wanted_files_byte_for_byte(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    names = ("one", "shards")
    got = call(hub, home, *(("fetch", f"lab/{name}", None, False) for name in names))
    for answer, name in zip(got, names, strict=True):
        assert contents(Path(answer["folder"])) == wanted(tmp_path / name)
        assert Path(answer["folder"]).is_relative_to(home)
    assert not any(r.path.endswith(unwanted) for r in hub.requests for unwanted in UNWANTED)


def test_a_revision_gives_its_files_and_its_commit(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    folders = {"main": tmp_path / "one", "v2": tmp_path / "two"}
    revisions = {None: "main", "v2": "v2", commit_of(folders["v2"]): "v2"}
    got = call(hub, home, *(("fetch", "lab/one", revision, False) for revision in revisions))
    for answer, name in zip(got, revisions.values(), strict=True):
        assert answer["commit"] == commit_of(folders[name])
        assert contents(Path(answer["folder"])) == wanted(folders[name])


def test_a_second_fetch_and_a_peek_transfer_no_file(hub: HubServer, home: Path) -> None:
    first = call(hub, home, ("fetch", "lab/shards", None, False))
    hub.requests.clear()
    again = ("fetch", "lab/shards", None, False), ("peek", "lab/shards", None, False)
    second, peeked = call(hub, home, *again)
    assert [second] == first
    assert "unread" not in peeked
    assert not [r for r in hub.requests if "/resolve/" in r.path or r.server == "store"]


def test_after_a_fetch_no_server_is_needed(hub: HubServer, home: Path) -> None:
    first = call(hub, home, ("fetch", "lab/one", None, False))
    hub.__exit__(None, None, None)
    given = ("fetch", "lab/one", None, True), ("peek", "lab/one", None, True)
    by_argument, peeked, unreachable = call(hub, home, *given, ("fetch", "lab/one", None, False))
    (by_variable,) = call(hub, home, ("fetch", "lab/one", None, False), HF_HUB_OFFLINE="1")
    assert [by_argument] == [by_variable] == [unreachable] == first
    assert "unread" not in peeked


def test_offline_asks_the_hub_nothing(hub: HubServer, home: Path) -> None:
    actions = [(action, "lab/one", None, True) for action in ("fetch", "peek")]
    for answer in call(hub, home, *actions):
        refused(answer, "model 'lab/one'", "not complete in the cache", "fetch it online once")
    (answer,) = call(hub, home, ("fetch", "lab/one", "v2", False), HF_HUB_OFFLINE="1")
    refused(answer, "model 'lab/one@v2'", "not complete in the cache", str(home))
    assert not hub.requests


def test_headers_alone_are_no_model_offline(hub: HubServer, home: Path) -> None:
    names = ("lab/one", "lab/shards")
    call(hub, home, *(("peek", name, None, False) for name in names))
    actions = [(action, name, None, True) for name in names for action in ("fetch", "peek")]
    for answer in call(hub, home, *actions):
        refused(answer, "not complete in the cache")


def test_an_unreachable_hub_is_one_line(hub: HubServer, home: Path) -> None:
    hub.__exit__(None, None, None)
    for answer in call(hub, home, ("fetch", "lab/one", None, False), ("peek", "a/b", None, False)):
        refused(answer, hub.url, "check the network", "--offline")


def test_wrong_requests_are_refused_in_words(hub: HubServer, home: Path, tmp_path: Path) -> None:
    add = hub.repositories.__setitem__
    coded = {"config.json": b"{}", "model-q4.gguf": b"GGUF", "unet/x.safetensors": b""}
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    several = {"config.json": b"{}", "a.safetensors": b"", "b.safetensors": b""}
    add("lab/coded", {"main": write(tmp_path / "coded", coded)})
    add("lab/adapter", {"main": write(tmp_path / "adapter", adapter)})
    add("lab/several", {"main": write(tmp_path / "several", several)})
    cases: list[tuple[str, str | None, tuple[str, ...]]] = [
        ("lab/none", None, ("not on the hub", "private", "HF_TOKEN")),
        ("lab/private", None, ("not on the hub", "private", "HF_TOKEN")),
        ("lab/gated", None, ("gated", "accept its licence", f"{hub.url}/lab/gated", "HF_TOKEN")),
        ("lab/one", "v3", ("model 'lab/one@v3'", "no such revision", "branch, a tag or a commit")),
        ("lab/one", "0" * 40, ("no such revision",)),
        ("lab/one", "../../v2", ("not a revision",)),
        ("lab/one", "/etc", ("not a revision",)),
        ("lab/..", None, ("not a hub id", "owner/name")),
        ("lab/coded", None, ("found model-q4.gguf (GGUF)", "convert the weights")),
        ("lab/adapter", None, ("no config.json", "adapters")),
        ("lab/several", None, ("no model.safetensors", "a.safetensors, b.safetensors")),
    ]
    actions = [(action, repo, rev, False) for repo, rev, _ in cases for action in ("fetch", "peek")]
    answers = call(hub, home, *actions)
    for number, (repo, _, words) in enumerate(cases):
        for answer in answers[2 * number : 2 * number + 2]:
            refused(answer, repo, *words)
    assert not weight_requests(hub), "refused before a weight was fetched"


def test_an_adapter_is_two_files(hub: HubServer, home: Path, tmp_path: Path) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    pickled = {"adapter_model.bin": b"pickle"}
    places = {
        "whole": adapter | pickled | UNWANTED | BESIDE,
        "part": {"adapter_config.json": b"{}"},
    }
    for name, files in places.items():
        hub.repositories[f"lab/{name}"] = {"main": write(tmp_path / name, files)}
    (got,) = call(hub, home, ("adapter", "lab/whole", None, False))
    folder = Path(got["folder"])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == adapter
    assert got["commit"] == folder.name
    (again, part, none, model) = call(
        hub,
        home,
        ("adapter", "lab/whole", None, True),
        ("adapter", "lab/part", None, False),
        ("adapter", "lab/none", None, False),
        ("adapter", "lab/whole", "v9", True),
    )
    assert again == got
    refused(part, "lab/part", "with adapter_model.safetensors or adapter_model.bin")
    refused(none, "lab/none", "not on the hub")
    refused(model, "lab/whole@v9", "not complete in the cache")


def test_an_adapter_of_old_is_fetched_as_it_is(hub: HubServer, home: Path, tmp_path: Path) -> None:
    old = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}
    hub.repositories["lab/old"] = {"main": write(tmp_path / "old", old | BESIDE)}
    got, again = call(
        hub, home, *[("adapter", "lab/old", None, offline) for offline in (False, True)]
    )
    assert contents(Path(got["folder"])) == old
    assert again == got


def test_the_token_opens_and_stays_with_the_hub(hub: HubServer, home: Path) -> None:
    closed = ("lab/gated", "lab/private")
    actions = [(action, repo, None, False) for action in ("peek", "fetch") for repo in closed]
    for answer in call(hub, home, *actions, HF_TOKEN=TOKEN):
        assert "folder" in answer
    assert weight_requests(hub)
    assert not any(r.token for r in weight_requests(hub))
    (answer,) = call(hub, home / "other", ("fetch", "lab/gated", None, False), HF_TOKEN="hf_wrong")
    refused(answer, "gated", "accept its licence")


def test_a_broken_connection_goes_on_where_it_broke(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    large = single(tmp_path / "large", rows=48_000)  # the library writes pieces of 10 MiB
    hub.repositories["lab/large"] = {"main": large}
    hub.faults.cut[SINGLE] = 1
    (got,) = call(hub, home, ("fetch", "lab/large", None, False))
    assert contents(Path(got["folder"])) == wanted(large)
    assert [r.range for r in weight_requests(hub)] == [None, f"bytes={10 << 20}-"]


def test_half_a_file_is_an_error_and_the_next_call_completes(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    hub.faults.short["model-00002-of-00002.safetensors"] = 1
    failed, got = call(hub, home, *[("fetch", "lab/shards", None, False)] * 2)
    refused(failed, "could not be fetched whole", "run the same command again")
    assert contents(Path(got["folder"])) == wanted(tmp_path / "shards")
    whole = "model-00001-of-00002.safetensors"
    size = (tmp_path / "shards" / whole).stat().st_size
    assert hub.sent(whole) == size, "what had arrived is not fetched again"


def test_a_killed_fetch_is_completed_by_the_next(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    hub.faults.stall[SINGLE] = 1
    calls = (("fetch", "lab/one", None, False),)
    env = environment(hub, home, {})
    with subprocess.Popen(command(calls, DRIVER), env=env, stderr=subprocess.PIPE) as killed:
        assert hub.faults.held.wait(30)
        killed.kill()
    offline, got = call(hub, home, ("fetch", "lab/one", None, True), *calls)
    refused(offline, "not complete in the cache")
    assert contents(Path(got["folder"])) == wanted(tmp_path / "one")


def test_a_disk_that_refuses_is_one_line(hub: HubServer, home: Path, tmp_path: Path) -> None:
    (failed,) = call(hub, home, ("fetch", "lab/one", None, False), driver=LIMITED + DRIVER)
    refused(failed, "cannot write to the cache", str(home), "File too large", "HF_HOME")
    (got,) = call(hub, home, ("fetch", "lab/one", None, False))
    assert contents(Path(got["folder"])) == wanted(tmp_path / "one")


def test_peek_fetches_headers_alone_and_knows_all_tensors(hub: HubServer, home: Path) -> None:
    names = ("lab/one", "lab/shards")
    peeks = call(hub, home, *(("peek", name, None, False) for name in names))
    sent = hub.sent(".safetensors")
    got = call(hub, home, *(("fetch", name, None, False) for name in names))
    folders = [Path(answer["folder"]) for answer in got]
    assert sent == sum(header_bytes(f) for folder in folders for f in folder.glob("*.safetensors"))
    for peeked, fetched, folder in zip(peeks, got, folders, strict=True):
        assert peeked["unread"] == "ReadError"
        assert {key: peeked[key] for key in fetched} == fetched
        opened = open_safetensors(folder).tensors.items()
        assert peeked["tensors"] == {n: vars(i) | {"shape": list(i.shape)} for n, i in opened}


def test_peek_does_without_ranges(hub: HubServer, home: Path) -> None:
    hub.faults.no_ranges = True
    peeked, fetched = call(
        hub, home, ("peek", "lab/shards", None, False), ("fetch", "lab/shards", None, False)
    )
    opened = open_safetensors(Path(fetched["folder"])).tensors
    assert {n: i["offset"] for n, i in peeked["tensors"].items()} == {
        n: i.offset for n, i in opened.items()
    }


def test_checkpoints_of_torch_are_fetched_where_there_is_nothing_else(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    model = checkpoints(tmp_path / "checkpoints")
    hub.repositories["lab/checkpoints"] = {"main": model}
    actions = [(action, "lab/checkpoints", None, False) for action in ("peek", "fetch", "peek")]
    peeked, fetched, again = call(hub, home, *actions)
    offline = [(action, "lab/checkpoints", None, True) for action in ("fetch", "peek")]
    assert call(hub, home, *offline) == [fetched, again]
    left = {"training_args.bin", "optimizer.pt", "flax_model.msgpack"}
    found = contents(Path(fetched["folder"]))
    assert found == {n: data for n, data in contents(model).items() if n not in left}
    opened = open_weights(Path(fetched["folder"])).tensors.items()
    assert again["tensors"] == {n: vars(i) | {"shape": list(i.shape)} for n, i in opened}
    known = {n: vars(i) | {"shape": list(i.shape), "offset": 0} for n, i in opened}
    assert peeked["tensors"] == known
    assert peeked["unread"] == "ReadError"


def test_safetensors_are_preferred_to_a_checkpoint_with_an_index(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    model = single(checkpoints(tmp_path / "both"))
    hub.repositories["lab/both"] = {"main": model}
    peeked, fetched = call(hub, home, *((a, "lab/both", None, False) for a in ("peek", "fetch")))
    assert peeked["tensors"].keys() == open_safetensors(Path(fetched["folder"])).tensors.keys()
    assert not [r for r in weight_requests(hub) if r.path.endswith(".bin")]


def test_a_peek_at_a_checkpoint_reads_little_of_it(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    hub.repositories["lab/checkpoints"] = {"main": checkpoints(tmp_path / "checkpoints")}
    call(hub, home, ("peek", "lab/checkpoints", None, False))
    ranges = [r for r in weight_requests(hub) if r.sent]
    assert {r.path.rpartition(".")[2] for r in ranges} == {"bin"}
    assert all(r.range is not None for r in ranges)
    sizes = [f.stat().st_size for f in (tmp_path / "checkpoints").glob("pytorch_model-*.bin")]
    assert sum(r.sent for r in ranges) < sum(sizes) / 10


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised with GPTQ"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised with MLX"),
    ],
)
def test_quantised_models_are_refused_before_a_weight_is_fetched(
    hub: HubServer, home: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    model = single(tmp_path / "quantised")
    (model / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    hub.repositories["lab/quantised"] = {"main": model}
    actions = [(action, "lab/quantised", None, False) for action in ("peek", "fetch")]
    for answer in call(hub, home, *actions):
        refused(answer, "model 'lab/quantised'", words, "merge the model that it was made from")
    assert not weight_requests(hub)


def test_nothing_that_a_repository_says_is_trusted(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    def repository(name: str, files: dict[str, bytes]) -> None:
        hub.repositories[f"evil/{name}"] = {"main": write(tmp_path / name, BESIDE | files)}

    def index(file: str) -> bytes:
        return json.dumps({"weight_map": {"w": file}}).encode()

    def header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text

    entry = b'{"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}'
    endless = b'{"w": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'
    cases: dict[str, tuple[dict[str, bytes], str]] = {
        "leaves-too": ({PICKLED.index: index("../../x.bin")}, "only plain names are read"),
        "no-checkpoint": ({"odd.bin": b"pickle"}, "no file of torch.save"),
        "no-archive": ({"odd.bin": b"PK\x03\x04" + bytes(100)}, "broken archive"),
        "codes": ({SINGLE: b"GGUF" + bytes(100)}, "is a GGUF file"),
        "leaves": ({INDEX: index("../../config.json")}, "only plain names are read"),
        "pickles": ({INDEX: index("pytorch_model.bin"), "pytorch_model.bin": b""}, "is read"),
        "absent": ({INDEX: index("gone.safetensors")}, "gone.safetensors"),
        "large": ({SINGLE: (1 << 62).to_bytes(8, "little") + b"{}"}, f"header of {1 << 62} bytes"),
        "tiny": ({SINGLE: b"abc"}, "unreadable safetensors header"),
        "cut": ({SINGLE: header(entry)}, "the file is cut off"),
        "nested": ({SINGLE: header(b"[" * 200_000)}, "unreadable safetensors header"),
        "endless": ({SINGLE: header(endless)}, "has no dtype, shape and data_offsets"),
        "empty": ({SINGLE: header(b"")}, "unreadable safetensors header"),
    }
    for name, (files, _) in cases.items():
        repository(name, files)
    peeks = [("peek", f"evil/{name}", None, False) for name in cases]
    fetches = [("fetch", f"evil/{name}", None, False) for name in ("absent", "pickles")]
    *answers, gone, pickle = call(hub, home, *peeks, *fetches)
    for answer, (_, words) in zip(answers, cases.values(), strict=True):
        refused(answer, words)
    refused(gone, "gone.safetensors is not there")
    refused(pickle, "only *.safetensors is read")
    assert hub.sent("pytorch_model.bin") == 0


def test_bars_show_on_a_terminal(hub: HubServer, home: Path) -> None:
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = environment(hub, home, {})
    calls = (("fetch", "lab/shards", None, False),)
    with subprocess.Popen(
        command(calls, DRIVER), env=env, stdout=subprocess.DEVNULL, stderr=writer
    ) as shown:
        os.close(writer)
        seen = b""
        while chunk := read_terminal(reader):
            seen += chunk
    os.close(reader)
    assert shown.returncode == 0
    assert b"%|" in seen


def read_terminal(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 16)
    except OSError:  # Linux tells so that the other end is closed
        return b""
