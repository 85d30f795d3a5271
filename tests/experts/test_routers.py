"""Routers that nobody trained: shares, chance, and what the base makes of prompts and texts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import contents, typed, write_tensors
from grounds import base as made
from grounds import digest, ground_of, read, tokenized
from numpy.typing import NDArray
from peft_models import WIDE, adapter, loaded, saved
from real import LLAMA
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import merge.experts.routers.passes
from merge.errors import PlanError, RunError
from merge.experts.assembling import Ground
from merge.experts.assembly import Site
from merge.experts.routers.passes import TOGETHER
from merge.experts.routers.reading import ENVIRONMENT, Asked, Inputs
from merge.experts.routers.rows import bias_of, router_source
from merge.sources.opening import open_model

PLAIN = Site("router.weight", "model.layers.1.mlp", 16)
PROMPTS = [
    {"positive_prompts": ["red green", "one cat two dog three hen", "blue"], "negative_prompts": ["cow"]},
    {"positive_prompts": ["seven"], "negative_prompts": ["black white cow cow", "six five"]},
    {"positive_prompts": ["four hen cow cat dog"]},
]  # fmt: skip
MODULES: dict[str, dict[str, int]] = {
    "llama": {"model.layers.0": 16, "model.layers.1.self_attn.v_proj": 16, "model.layers.1.mlp": 16,
              "model.layers.1.mlp.down_proj": 24, "lm_head": 16},
    "phi3": {"model.layers.0.self_attn.qkv_proj": 16, "model.layers.1": 16,
             "model.layers.1.mlp.down_proj": 24},
    "bert": {"bert.encoder.layer.0": 16, "bert.encoder.layer.1.attention.self.query": 16,
             "bert.encoder.layer.1.output.dense": 24},
    "gpt2": {"transformer.h.0": 16, "transformer.h.1.mlp.c_fc": 16},
    "tied": {"model.layers.1.mlp.up_proj": 16, "lm_head": 16},
}  # fmt: skip


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base of each kind beside a second model, each in a folder of its own."""
    folder, done = tmp_path_factory.mktemp("bases"), {}

    def one(kind: str) -> Path:
        if kind not in done:
            done[kind] = made(folder / kind / "base", kind)
            made(folder / kind / "other", kind)
        return done[kind]

    return one


def adapters(base: Path, count: int) -> list[dict[str, Any]]:
    """Entries of so many experts, all the same adapter."""
    folder = base.parent / "lora"
    if not folder.is_dir():
        adapter(base, folder, target_modules=["v_proj"])
    return [{"adapter": folder.name, "name": f"e{i}"} for i in range(count)]


def prompted(base: Path, mode: str, **router: Any) -> Ground:
    experts = [{"source_model": "other"} | prompts for prompts in PROMPTS]
    return ground_of(base, experts, {"mode": mode, **router})


# -- shares and chance -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.01, 50.0])
def test_a_softmax_of_the_biases_gives_the_shares(
    bases: Callable[[str], Path], temperature: float
) -> None:
    router = {"weights": [3, 0, 1, 4], "temperature": temperature}
    ground = ground_of(bases("llama"), adapters(bases("llama"), 4), router)
    source = router_source(ground, [PLAIN], {})
    assert source.tensors[bias_of(PLAIN)].shape == (4, 1)
    assert not read(source, PLAIN.tensor).any()
    scores = read(source, bias_of(PLAIN))[:, 0].astype(np.float64) / temperature
    powers = np.exp(scores - scores.max())
    assert np.allclose(powers / powers.sum(), [3 / 8, 0, 1 / 8, 1 / 2], rtol=1e-5, atol=0)


def test_uniform_is_zero_and_has_no_bias(bases: Callable[[str], Path]) -> None:
    ground = ground_of(bases("llama"), adapters(bases("llama"), 2), {"mode": "uniform"})
    source = router_source(ground, [PLAIN], {})
    assert [*source.tensors] == [PLAIN.tensor]
    assert not read(source, PLAIN.tensor).any()


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_chance_follows_the_seed_the_router_and_the_expert(
    bases: Callable[[str], Path], mode: str
) -> None:
    wide = [
        Site("a.weight", "model.layers.0.mlp", 3000),
        Site("b.weight", "model.layers.1.mlp", 3000),
    ]

    def drawn(seed: int) -> NDArray[np.float64]:
        router = {"mode": mode, "seed": seed}
        ground = ground_of(bases("llama"), adapters(bases("llama"), 100), router)
        source = router_source(ground, wide, {})
        both = [read(source, site.tensor) for site in wide]
        assert (both[0] == read(source, "a.weight", by_grains=True)).all()
        return np.stack(both).astype(np.float64)

    first = drawn(0)
    assert (first == drawn(0)).all()
    assert np.allclose(np.linalg.norm(first, axis=2), 1, atol=1e-6)
    rows = np.concatenate([first.reshape(-1, 3000), drawn(1).reshape(-1, 3000)])
    likeness = rows @ rows.T - np.eye(len(rows))
    assert np.abs(likeness).max() < 6 / np.sqrt(3000)  # six standard deviations of independent rows
    values = np.sort(rows.ravel() * np.sqrt(3000))
    if mode == "random":  # shares of the normal distribution within 1, 2 and 3 deviations
        for deviations, share in ((1, 0.682689), (2, 0.954500), (3, 0.997300)):
            assert abs(np.mean(np.abs(values) < deviations) - share) < 0.003
    else:
        assert np.abs(values).max() < np.sqrt(3) * 1.05
        assert abs(np.mean(values < np.sqrt(3) / 2) - 0.75) < 0.003


# -- what the base makes of prompts ----------------------------------------------------------------


def seen(folder: Path, modules: dict[str, int], text: str) -> dict[str, NDArray[np.float64]]:
    """By module, the vectors [tokens, width] that it reads, by a plain forward pass of transformers."""
    found: dict[str, NDArray[np.float64]] = {}

    def caught(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = args[0] if args else kwargs["hidden_states"]
            found.setdefault(name, read[0].double().numpy())

        return hook

    model, tokenizer = loaded(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(caught(name), with_kwargs=True)
    with torch.no_grad():
        model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    return found


def expected(folder: Path, modules: dict[str, int], mode: str) -> dict[str, NDArray[np.float64]]:
    """Router rows of PROMPTS, [experts, width] by module. [EOS], the last token, is none of a prompt."""
    last = mode in ("hidden", "hidden_last")
    rows: dict[str, list[Any]] = {name: [] for name in modules}
    for expert in PROMPTS:
        means = []
        for key in ("positive_prompts", "negative_prompts"):
            told = [seen(folder, modules, text) for text in expert.get(key, [])]
            means.append({n: [v[n][-2] if last else v[n].mean(0) for v in told] for n in modules})
        for name in modules:
            positive, negative = (np.mean(m[name], 0) if m[name] else 0.0 for m in means)
            rows[name].append((positive - negative) / np.linalg.norm(positive - negative))
    return {name: np.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("llama", "hidden"), ("llama", "hidden_avg"), ("phi3", "hidden_last"), ("bert", "hidden_avg"),
     ("bert", "hidden"), ("gpt2", "hidden"), ("tied", "hidden_avg")],
)  # fmt: skip
@pytest.mark.usefixtures("here")
def test_hidden_rows_are_what_the_routers_read_in_a_plain_forward_pass(
    bases: Callable[[str], Path], kind: str, mode: str
) -> None:
    base, modules = bases(kind), MODULES[kind]
    sites = [Site(f"{name}.router.weight", name, cols) for name, cols in modules.items()]
    source = router_source(prompted(base, mode), sites, {})
    for name, rows in expected(base, modules, mode).items():
        assert np.abs(read(source, f"{name}.router.weight") - rows).max() < 1e-5, name


@pytest.mark.usefixtures("here")
def test_a_base_in_bfloat16_is_computed_in_float32(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    loaded(bases("llama")).to(torch.bfloat16).save_pretrained(folder)
    loaded(bases("llama")).save_pretrained(tmp_path / "other")
    tokenized(folder)
    modules = {PLAIN.module: PLAIN.cols}
    source = router_source(prompted(folder, "hidden"), [PLAIN], {})
    rows = expected(folder, modules, "hidden")[PLAIN.module]
    assert np.abs(read(source, PLAIN.tensor) - rows).max() < 1e-5


def test_a_real_model_reads_prompts_as_transformers_does() -> None:
    if not LLAMA.is_dir():
        pytest.skip("the real model does not lie beside the repository")
    modules = {"model.layers.0": 64, "model.layers.4.mlp": 64}
    texts = ["Once upon a time", "The cat sat on the mat and"]
    asked = Asked.of(
        open_model(str(LLAMA)), modules=modules, statistic="last", texts={"k": texts}, files={}
    )
    inputs, plain = Inputs(asked), [seen(LLAMA, modules, text) for text in texts]
    for name in modules:
        wanted = np.mean([vectors[name][-1] for vectors in plain], 0)
        assert np.abs(inputs.vector("k", name) - wanted).max() < 1e-5 * np.abs(wanted).max()


def asked_inputs(base: Path, texts: dict[str, list[str]], statistic: str) -> Inputs:
    modules = {"model.layers.0": 16, "model.layers.1.mlp.down_proj": 24}
    return Inputs(
        Asked.of(open_model(str(base)), modules=modules, statistic=statistic, texts=texts, files={})
    )


@pytest.mark.parametrize("statistic", ["last", "mean"])
@pytest.mark.usefixtures("here")
def test_a_prompt_reads_the_same_to_the_bit_beside_others_and_alone(
    bases: Callable[[str], Path], statistic: str
) -> None:
    texts = {
        f"{i}": [prompt] for i, prompt in enumerate(["cow", "one two three four five", "red hen"])
    }
    together = {"all": [prompt for prompts in texts.values() for prompt in prompts]}
    inputs = asked_inputs(bases("llama"), texts | together, statistic)
    for module in ("model.layers.0", "model.layers.1.mlp.down_proj"):
        first, second, third = (inputs.vector(key, module) for key in texts)
        assert (inputs.vector("all", module) == (first + second + third) / 3).all()
        assert not (first == second).all()


@pytest.mark.usefixtures("here")
def test_more_prompts_than_run_side_by_side_count_all(bases: Callable[[str], Path]) -> None:
    prompts = [f"{i % 20} cat" for i in range(2 * TOGETHER + 7)]
    inputs = asked_inputs(bases("llama"), {"all": prompts} | {p: [p] for p in prompts[:20]}, "last")
    module = "model.layers.1.mlp.down_proj"
    mean = np.mean([inputs.vector(prompt, module) for prompt in prompts], axis=0)
    assert np.allclose(inputs.vector("all", module), mean, rtol=1e-12)


def test_nothing_runs_before_the_first_row_is_read(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = made(tmp_path / "base", "llama")
    made(tmp_path / "other", "llama")
    source = router_source(prompted(base, "hidden"), [PLAIN], {})
    (base / "tokenizer.json").write_text("no tokenizer")
    with pytest.raises(RunError, match="base: prompts cannot be read: "):
        source.rows(PLAIN.tensor, 0, 1)


def test_no_file_is_left(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    inputs = asked_inputs(bases("llama"), {"k": ["cow"]}, "last")
    inputs.vector("k", "model.layers.0")
    assert contents(tmp_path) == {}
    assert np.isfinite(inputs.vector("k", "model.layers.1.mlp.down_proj")).all()


@pytest.mark.usefixtures("here")
def test_cheap_embed_is_the_mean_of_the_rows_of_tokens(bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    sites = [PLAIN, Site("other.weight", "model.layers.0", 16)]
    source = router_source(prompted(base, "cheap_embed"), sites, {})
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def mean(texts: list[str]) -> Any:
        return np.mean([table[tokenizer(text).input_ids].mean(0) for text in texts], axis=0)

    for i, expert in enumerate(PROMPTS):
        row = mean(expert["positive_prompts"])
        row -= mean(expert["negative_prompts"]) if "negative_prompts" in expert else 0
        assert np.abs(read(source, PLAIN.tensor)[i] - row / np.linalg.norm(row)).max() < 1e-6
    assert (read(source, PLAIN.tensor) == read(source, "other.weight")).all()


# -- what it makes of texts ------------------------------------------------------------------------


def texted(base: Path, **files: str) -> list[dict[str, Any]]:
    """Experts with a file of texts each."""
    for name, text in files.items():
        (base.parent / name.replace("_", ".")).write_text(text)
    return [
        entry | {"texts": [name.replace("_", ".")]}
        for entry, name in zip(adapters(base, len(files)), files, strict=True)
    ]


@pytest.mark.usefixtures("here")
def test_centroids_are_means_over_tokens_less_the_mean_over_experts(
    bases: Callable[[str], Path],
) -> None:
    base, modules = bases("llama"), {PLAIN.module: PLAIN.cols}
    lines = (
        json.dumps({"text": "red cat"})
        + "\n\n"
        + json.dumps({"prompt": "one ", "completion": "two"})
    )
    experts = texted(base, a_txt="cow hen hen\n\nblue\n", b_jsonl=lines, c_txt="six")
    source = router_source(ground_of(base, experts, {"mode": "centroids"}), [PLAIN], {})
    texts = [["cow hen hen", "blue"], ["red cat", "one two"], ["six"]]
    vectors = [[seen(base, modules, text)[PLAIN.module] for text in group] for group in texts]
    means = np.stack([np.concatenate(group).mean(axis=0) for group in vectors])
    rows = means - means.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(read(source, PLAIN.tensor) - rows).max() < 1e-5


@pytest.mark.usefixtures("here")
def test_texts_that_change_after_they_were_planned_with_are_told(
    bases: Callable[[str], Path],
) -> None:
    base = bases("llama")
    experts = texted(base, one_txt="cow hen\n", two_txt="dog\n")
    source = router_source(ground_of(base, experts, {"mode": "centroids"}), [PLAIN], {})
    (base.parent / "two.txt").write_text("cat\n")
    with pytest.raises(RunError, match=r"two\.txt changed since this was planned; run it again"):
        source.rows(PLAIN.tensor, 0, 1)


def test_a_folder_of_texts_is_all_of_its_files_and_the_tiny_family_has_some(
    bases: Callable[[str], Path],
) -> None:
    base = bases("llama")
    (base.parent / "many").mkdir()
    (base.parent / "many" / "a.txt").write_text("cow\n")
    (base.parent / "many" / "b.txt").write_text("hen\n")
    first, second = adapters(base, 2)
    experts = [first | {"texts": "many"}, second | {"texts": ["zoo:texts/sort.jsonl"]}]
    ground = ground_of(base, experts, {"mode": "centroids"})
    assert [file.name for file in ground.texts] == ["a.txt", "b.txt", "sort.jsonl"]
    experts = [first | {"texts": "zoo:texts/nothing.jsonl"}]
    with refused(r"mixture.yaml:\d+: texts: .* there are zoo:texts/elements.jsonl, zoo:texts/rev"):
        _ = ground_of(base, experts, {"mode": "centroids"}).texts


@pytest.mark.usefixtures("here")
def test_of_a_long_text_the_first_tokens_count(
    bases: Callable[[str], Path],
) -> None:
    """GPT-2 as it is here has 8 positions: of both texts [BOS] and the words up to seven."""
    base = bases("gpt2")
    site = Site("router.weight", "transformer.h.1.mlp.c_fc", 16)
    (base.parent / "x.txt").write_text("one two three four five six seven cat dog\n")
    (base.parent / "y.txt").write_text("one two three four five six seven\n")
    (base.parent / "z.txt").write_text("hen\n")
    kinds = [["x.txt", "z.txt"], ["y.txt", "z.txt"]]
    experts = [[{"source_model": "other", "texts": [name]} for name in names] for names in kinds]
    rows = [
        read(router_source(ground_of(base, e, {"mode": "centroids"}), [site], {}), site.tensor)
        for e in experts
    ]
    assert (rows[0] == rows[1]).all()
    assert rows[0].any()


# -- both formats, the same bytes ------------------------------------------------------------------


def test_only_where_a_model_has_no_temperature_are_rows_divided_by_it(
    bases: Callable[[str], Path],
) -> None:
    base, router = bases("llama"), {"mode": "random", "temperature": 0.25}
    dense = router_source(ground_of(base, [{"source_model": "other"}] * 2, router), [PLAIN], {})
    routed = router_source(ground_of(base, adapters(base, 2), router), [PLAIN], {})
    assert (read(dense, PLAIN.tensor) == 4 * read(routed, PLAIN.tensor)).all()


AGAIN = """
import sys
from pathlib import Path
from grounds import digest
from test_routers import PLAIN, prompted
from merge.experts.routers.rows import router_source
for mode in ("random", "hidden_avg"):
    print(digest(router_source(prompted(Path(sys.argv[1]), mode), [PLAIN], {})))
"""


def test_the_same_bytes_in_every_process(bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    here = [
        digest(router_source(prompted(base, mode), [PLAIN], {}))
        for mode in ("random", "hidden_avg")
    ]
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-c", AGAIN, str(base)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == here


PEAK = """
import resource, sys
from pathlib import Path
from merge.experts.routers.reading import Asked, write_inputs
from merge.sources import Source
from merge.sources.opening import open_model
from merge.sources.positioned import stored_source
from merge.sources.safetensors import read_header
modules = {"model.layers.1.mlp": 128, "lm_head": 128}
texts = {str(i): ["cat", "red dog"] for i in range(int(sys.argv[3]))}
asked = Asked.of(open_model(sys.argv[1]), modules=modules, statistic="mean", texts=texts, files={})
write_inputs(asked, Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


def test_memory_is_that_of_the_largest_module_whatever_the_base_and_the_experts(
    tmp_path: Path,
) -> None:
    """164 MB of layers and 102 MB of embedding and head, against 7 MB; the largest other module has 1 MB."""

    def peak(folder: Path, experts: int) -> int:
        command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "found"), str(experts)]
        env = os.environ | ENVIRONMENT
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return int(done.stdout)

    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 128}
    special = {key: WIDE[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    folders = []
    for name, layers, vocabulary in (("small", 2, 40), ("large", 48, 100_000)):
        config = LlamaConfig(
            **sizes, **special, intermediate_size=2048, num_hidden_layers=layers, vocab_size=vocabulary,
            tie_word_embeddings=False,
        )  # fmt: skip
        folders.append(tokenized(saved(LlamaForCausalLM(config), tmp_path / name)))
    small, large = peak(folders[0], 2), peak(folders[1], 20)
    assert sum(f.stat().st_size for f in folders[1].glob("*.safetensors")) > 250 << 20
    assert large - small < 32 << 20


# -- what cannot be --------------------------------------------------------------------------------


def refused(match: str) -> Any:
    return pytest.raises(PlanError, match=match)


def test_requests_that_cannot_be_are_refused_before_anything_runs(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("llama")
    other = {"source_model": "other"}

    def source(expert: dict[str, Any], mode: str, site: Site = PLAIN) -> None:
        router_source(ground_of(base, [other | expert], {"mode": mode}), [site], {})

    with refused(r"mixture.yaml:\d+: a prompt is empty"):
        source({"positive_prompts": ["cat", " "]}, "hidden")
    with refused("positive and negative prompts are the same"):
        source({"positive_prompts": ["cat"], "negative_prompts": ["cat"]}, "hidden")
    with refused(r"mixture.yaml:\d+: texts: nowhere.txt: cannot be read \(No such file"):
        source({"texts": ["nowhere.txt"]}, "centroids")
    (base.parent / "blank.txt").write_text("\n \n")
    with refused("blank.txt holds none"):
        source({"texts": ["blank.txt"]}, "centroids")
    (base.parent / "bad.jsonl").write_text('{"text": "cat"}\n{"other": "dog"}\n')
    with refused("bad.jsonl:2: holds no text"):
        source({"texts": ["bad.jsonl"]}, "centroids")
    (base.parent / "worse.jsonl").write_text("cat\n")
    with refused("worse.jsonl:1: is not JSON"):
        source({"texts": ["worse.jsonl"]}, "centroids")
    with refused("base holds no tensor of 'model.layers.7.mlp'"):
        source({"positive_prompts": ["cat"]}, "hidden", Site("r", "model.layers.7.mlp", 16))
    with refused("cheap_embed gives rows of 16 numbers, and the router before 'model.layers.1.mlp"):
        source(
            {"positive_prompts": ["cat"]},
            "cheap_embed",
            Site("r", "model.layers.1.mlp.down_proj", 24),
        )


def test_a_base_that_is_made_by_the_recipe_is_to_be_written_first(
    bases: Callable[[str], Path],
) -> None:
    base = bases("llama")
    adapters(base, 1)
    both = base.parent / "base+lora"
    ground = ground_of(
        both, [{"source_model": "other", "positive_prompts": ["cat"]}], {"mode": "hidden"}
    )
    with refused("router mode hidden runs the base, and base\\+lora is itself made by this recipe"):
        router_source(ground, [PLAIN], {})


def test_a_base_without_tokenizer_reads_no_texts(tmp_path: Path) -> None:
    base = made(tmp_path / "base", "llama")
    made(tmp_path / "other", "llama")
    (base / "tokenizer.json").unlink()
    with refused("base has no tokenizer"):
        router_source(prompted(base, "hidden"), [PLAIN], {})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("architecture", "transformers cannot build 'Nothing'"),
        ("weight", "'model.layers.0.mlp.up_proj.weight', which is no tensor of the base"),
        ("shape", r"tensor 'model.layers.0.mlp.up_proj.weight' has shape \[8, 16\]"),
        ("nan", "what module 'model.layers.1.mlp' reads is not finite"),
        ("width", "does not read vectors of 17 numbers"),
        ("long", r"prompt 'cat cat cat cat .*' has 1026 tokens; at most 1024 are read"),
        ("tokens", "row 39 is looked up, but 'model.embed_tokens.weight' has 30 rows"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_base_that_does_not_run_ends_in_one_line(damage: str, told: str, tmp_path: Path) -> None:
    base = made(tmp_path / "base", "llama")
    tensors = dict(load_file(base / "model.safetensors"))
    config = json.loads((base / "config.json").read_text())
    up, prompt, cols = "model.layers.0.mlp.up_proj.weight", "19 cat", 16
    if damage == "architecture":
        config["architectures"] = ["Nothing"]
    elif damage == "weight":
        tensors["model.layers.0.mlp.upward.weight"] = tensors.pop(up)
    elif damage == "shape":
        tensors[up] = tensors[up][:8]
    elif damage == "nan":
        tensors[up][3, 4] = np.nan
    elif damage == "width":
        cols = 17
    elif damage == "long":
        config["max_position_embeddings"], prompt = 4096, "cat " * 1024
    else:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:30]
        config["vocab_size"] = 30
    (base / "config.json").write_text(json.dumps(config))
    write_tensors(base / "model.safetensors", typed(tensors))
    asked = Asked.of(
        open_model(str(base)), modules={"model.layers.1.mlp": cols}, statistic="last",
        texts={"k": [prompt]}, files={},
    )  # fmt: skip
    inputs = Inputs(asked)
    for _ in range(2):  # the second time without another try
        with pytest.raises(RunError, match=told) as caught:
            inputs.vector("k", "model.layers.1.mlp")
        assert "\n" not in str(caught.value)


def test_what_runs_side_by_side_has_no_more_tokens_than_memory_is_meant_for() -> None:
    texts = [([1] * length, 0) for length in (1000, 1000, 1000, 1, *[2] * 100)]
    groups = [*merge.experts.routers.passes._groups(texts)]
    assert [text for group in groups for text in group] == texts
    assert [len(group) for group in groups] == [2, 64, 38]
