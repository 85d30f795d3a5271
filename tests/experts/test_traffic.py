"""What routers do with tokens, where that is known: tokens are unit vectors, and routers read them off."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ran import Ran
from real import saved
from routed_models import adapter, in_one_process, mixture
from safetensors.torch import load_file, save_file
from stock_moe import mixtral, qwen3
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from merge.errors import RequestError, RunError
from merge.experts.routers.traffic import traffic_of
from merge.experts.texts import read_texts

SIZE = 16  # tokens, and as many dimensions: token t is the unit vector t
LAYERS = {
    "vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": SIZE - 1,
    "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**LAYERS, num_local_experts=3, num_experts_per_tok=1),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **LAYERS, head_dim=8, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=8,
        norm_topk_prob=True,
    ),
    "llama": lambda: LlamaConfig(**LAYERS),
}  # fmt: skip
SCORE = 2.0  # of the expert that a token is for; 0 of the others
LENGTH = math.sqrt(SIZE)  # of a normalised unit vector, but for the epsilon of the norm


def transparent(folder: Path, kind: str) -> Path:
    """A model through which tokens pass as unit vectors: no layer adds anything; with a tokenizer."""
    saved(folder, CONFIGS[kind]())
    rewritten(folder, _transparent)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(SIZE)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    ends = f"w{SIZE - 1}"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=ends).save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    tensors = {n: change(n, t).contiguous() for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _transparent(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "embed_tokens" in name:
        return torch.eye(SIZE)
    if "norm" in name:
        return torch.ones_like(tensor)
    if name.endswith("gate.weight"):
        return by_token(3)
    adds = "o_proj" in name or "down_proj" in name or name.endswith(".w2.weight")
    return torch.zeros_like(tensor) if adds else tensor


def by_token(experts: int) -> torch.Tensor:
    """[experts, SIZE]: a router that sends token t to expert t modulo `experts`."""
    rows = torch.arange(SIZE)[None] % experts == torch.arange(experts)[:, None]
    return rows * SCORE / LENGTH


def check(load: Any, tokens: list[int], experts: int) -> None:
    """That `load` is what such a router does with these tokens."""
    counts = np.bincount(np.array(tokens) % experts, minlength=experts)
    assert load.tokens == len(tokens)
    assert load.chosen.tolist() == counts.tolist()
    shares = counts / len(tokens)
    assert load.share.tolist() == shares.tolist()
    most = math.exp(SCORE) / (math.exp(SCORE) + experts - 1)
    rest = (1 - most) / (experts - 1)
    # the norm's epsilon and float32
    assert load.probability == pytest.approx(shares * most + (1 - shares) * rest, abs=1e-4)
    assert load.imbalance == pytest.approx(max(shares) * experts)
    assert load.entropy == pytest.approx(-sum(p * math.log2(p) for p in shares if p))


@pytest.fixture
def texts(tmp_path: Path) -> Mapping[str, Path]:
    plain, pairs = tmp_path / "plain.txt", tmp_path / "pairs.jsonl"
    plain.write_text("w0 w3 w6 w1\n\nw9 w12\n")
    lines = [{"prompt": "w1 w4 ", "completion": "w7"}, {"text": "w2"}]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"plain.txt": plain, "pairs.jsonl": pairs}


TOKENS = {"plain.txt": [0, 3, 6, 1, 9, 12], "pairs.jsonl": [1, 4, 7, 2]}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_routers_of_a_stock_mixture_are_counted(
    kind: str, texts: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = transparent(tmp_path / "m", kind)
    found = traffic_of(folder, {name: read_texts([file]) for name, file in texts.items()})
    assert found.experts == ("0", "1", "2")
    assert found.top_k == 1
    for name, tokens in TOKENS.items():
        assert len(found.loads[name]) == 2
        for load in found.loads[name].values():
            check(load, tokens, 3)
        assert list(found.by_layer(name)) == ["layer 0", "layer 1"]
        assert found.tokens(name) == len(tokens)
        assert found.whole(name).share.tolist() == found.by_layer(name)["layer 0"].share.tolist()


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters on a transparent Llama, routed by token at each module."""
    folder = tmp_path_factory.mktemp("routed")
    model = transparent(folder / "base", "llama")
    adapters = {
        name: adapter(model, folder / name, seed, target_modules=["q_proj", "v_proj"])
        for seed, name in enumerate(("red", "green", "blue"))
    }
    with in_one_process():
        made = mixture(folder, model, adapters, router={"mode": "uniform", "top_k": 1})
    rewritten(made, lambda n, t: by_token(3) if n.endswith("router.weight") else t)
    return made


def test_the_routers_of_a_mixture_of_adapters_are_counted(
    routed: Path, texts: Mapping[str, Path]
) -> None:
    found = traffic_of(routed, {name: read_texts([file]) for name, file in texts.items()})
    assert found.experts == ("red", "green", "blue")
    for name, tokens in TOKENS.items():
        sites = {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"}
        assert set(found.loads[name]) == sites
        for load in found.loads[name].values():
            check(load, tokens, 3)
        assert found.by_layer(name)["layer 1"].chosen.sum() == 2 * len(tokens)


@pytest.mark.parametrize("make", [mixtral, qwen3])
def test_texts_side_by_side_count_as_each_alone(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all lengths, so that there is padding; float32 sums in another order."""
    folder, lines = make(tmp_path / "m"), tmp_path / "lines.txt"
    lines.write_text("".join(f"{'sort ba=' * (1 + i % 5)}{i}\n" for i in range(30)))
    found = []
    for together in (2048, 1, 100):
        monkeypatch.setattr("merge.experts.routers.traffic.TOGETHER", together)
        found.append(traffic_of(folder, {"a": read_texts([lines])}).loads["a"])
    for others in found[1:]:
        for site, load in found[0].items():
            assert load.tokens == others[site].tokens
            assert load.chosen.tolist() == others[site].chosen.tolist()
            assert load.mass == pytest.approx(others[site].mass, abs=1e-4)


def test_a_text_that_does_not_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("sort\nsort ab\n{}\nsort cd\n")
    folder = mixtral(tmp_path / "m")
    tensors = dict(load_file(folder / "model.safetensors"))
    lost = json.loads((folder / "config.json").read_text())
    brace = max(AutoTokenizer.from_pretrained(folder)("sort")["input_ids"]) + 1
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:brace]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:brace]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(lost | {"vocab_size": brace}))
    plain = "abcdefghijklmnopqrstuvwxyz"
    bad = next(c for c in plain if max(AutoTokenizer.from_pretrained(folder)(c).input_ids) >= brace)
    good = next(c for c in plain if max(AutoTokenizer.from_pretrained(folder)(c).input_ids) < brace)
    lines.write_text(f"{good}\n{good}{good}\n{bad}\n{good}\n")
    with pytest.raises(RunError, match=r"lines.txt:3: the model does not run on it"):
        traffic_of(folder, {"a": read_texts([lines])})


def test_files_stand_side_by_side(
    routed: Path, texts: Mapping[str, Path], command: Callable[..., Ran], tmp_path: Path
) -> None:
    picture = tmp_path / "routing.png"
    given = [part for file in texts.values() for part in ("--text", file)]
    told = command("routing", routed, *given, "--plot", picture)
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    head = next(line for line in lines if line.startswith("texts"))
    assert [head.index(name) for name in ("red", "green", "blue")] == sorted(
        head.index(name) for name in ("red", "green", "blue")
    )
    assert any(line.startswith("plain.txt") and "83.3" in line for line in lines)  # 5 of 6 are red
    assert any(line.startswith("pairs.jsonl") and "75.0" in line for line in lines)
    assert sum(line.startswith("layer 0") for line in lines) == 2
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_machines_get_every_router(
    routed: Path, texts: Mapping[str, Path], command: Callable[..., Ran]
) -> None:
    told = command("routing", routed, "--text", texts["plain.txt"], "--limit", 1, "--json")
    data = json.loads(told.out)
    assert data["experts"] == ["red", "green", "blue"]
    (one,) = data["texts"]
    assert one["tokens"] == 4
    assert one["all"]["share"] == [0.75, 0.25, 0.0]
    assert one["all"]["largest_over_fair"] == 2.25
    assert len(one["routers"]) == 4


def test_what_has_no_routers_or_no_texts_is_one_line(
    tmp_path: Path, texts: Mapping[str, Path], command: Callable[..., Ran]
) -> None:
    model = transparent(tmp_path / "dense", "llama")
    plain = texts["plain.txt"]
    assert "is no mixture" in command("routing", model, "--text", plain).error
    assert "cannot be read" in command("routing", model, "--text", tmp_path / "none.txt").error
    missing = tmp_path / "none" / "x.png"
    assert "no such folder" in command("routing", model, "--text", plain, "--plot", missing).error
    with pytest.raises(RequestError, match="tokenizer"):
        traffic_of(saved(tmp_path / "mute", CONFIGS["mixtral"]()), {"a": read_texts([plain])})
