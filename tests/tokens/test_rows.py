"""Rows of embeddings and heads: merged among those who own the token, copied where one model does."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import drawn, typed, write_model, write_recipe, write_tensors
from methods.cases import CASES, Case, needs_base, read_values, recipe_of
from numpy.typing import NDArray
from ran import Ran

from merge.errors import PlanError
from merge.methods import all_methods
from merge.pipeline import run_recipe
from merge.sources.model import read_json

PIECES = [chr(ord("a") + i) for i in range(16)]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INNER = "model.layers.0.mlp.up_proj.weight"
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def write_tokens(
    folder: Path,
    tokens: Sequence[str],
    seed: int,
    *,
    tied: bool = False,
    dtype: str = "BF16",
    padding: int = 0,
    order: NDArray[Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A model whose rows are those of PIECES, then of `tokens`, then of nothing; drawn near a base's.

    order: a permutation of all rows that have a token; the tokenizer follows it.
    """
    texts = [*PIECES, *tokens]
    rows = len(texts) + padding
    shapes = {EMBED: (rows, 8), INNER: (8, 8)} | ({} if tied else {HEAD: (rows, 8)})
    near = {
        n: v[: len(PIECES)]
        for n, v in drawn(0, {EMBED: (16, 8), HEAD: (16, 8), INNER: (8, 8)}).items()
    }
    values = drawn(seed, shapes)
    for name, value in values.items():
        value[: len(PIECES)] = near[name] + np.float32(0.1) * value[: len(PIECES)]
    order = np.arange(len(texts)) if order is None else order
    place = {text: int(order[i]) for i, text in enumerate(texts)}
    for name in {EMBED, HEAD} & values.keys():
        values[name][order] = values[name][: len(texts)].copy()
    told = {"vocab_size": rows, "tie_word_embeddings": tied, "eos_token_id": place["a"]}
    write_model(folder, typed(values, dtype), config=told | dict(config or {}))
    write_tokenizer(folder, place)
    return folder


def write_tokenizer(folder: Path, place: Mapping[str, int]) -> None:
    vocab = {text: i for text, i in place.items() if text in PIECES}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": text, "special": True, **flags}
        for text, i in sorted(place.items(), key=lambda item: item[1])
        if text not in PIECES
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    told = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None}
    told |= {"post_processor": None, "decoder": None, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(told))


def ids_of(folder: Path) -> dict[str, int]:
    tokenizer = read_json(folder / "tokenizer.json")
    added = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    return {**tokenizer["model"]["vocab"], **added}


def names_of(case: Case) -> list[str]:
    apart = needs_base(case) and all_methods()[case.method].base != "first"
    return [f"m{i}" for i in range(case.models)] + ["base"] * apart


@every_case
@pytest.mark.parametrize("tied", [False, True])
def test_a_row_of_one_model_is_copied_and_a_row_of_all_merged_as_if_alone(
    case: Case, tied: bool, tmp_path: Path
) -> None:
    """Rows of one model are its own to the bit; rows that all own are those of a merge of nothing else."""
    if case.method == "passthrough" and "scale" in case.own:
        pytest.skip("scales the one model that there is")
    for seed, name in enumerate(names_of(case), start=1):
        write_tokens(tmp_path / "own" / name, [f"<{name}>"], seed, tied=tied)
        whole = read_values(tmp_path / "own" / name)
        alone = {n: v[: len(PIECES)].astype(np.float32) for n, v in whole.items()}
        write_model(
            tmp_path / "alone" / name, typed(alone, "BF16"), config={"tie_word_embeddings": tied}
        )
    results = {}
    for kind in ("own", "alone"):
        results[kind] = run_recipe(recipe_of(tmp_path / kind, case), tmp_path / kind / "out").folder
    found, alone = read_values(results["own"]), read_values(results["alone"])
    ids = ids_of(results["own"])
    for name in {EMBED, HEAD} & found.keys():
        assert np.array_equal(found[name][: len(PIECES)], alone[name])
        for model in names_of(case):
            row = read_values(tmp_path / "own" / model)[name][len(PIECES)]
            assert np.array_equal(found[name][ids[f"<{model}>"]], row)
    assert np.array_equal(found[INNER], alone[INNER])


@every_case
def test_the_order_of_a_models_tokens_changes_nothing(case: Case, tmp_path: Path) -> None:
    """A model whose rows and vocabulary are permuted together gives the same bytes."""
    names = names_of(case)
    if len(names) == 1:
        pytest.skip("there is no other model")
    first = "base" if "base" in names else "m0"
    permuted = next(name for name in reversed(names) if name != first)
    order = np.random.default_rng(5).permutation(len(PIECES) + 1)
    folders = []
    for kind, given in (("plain", None), ("permuted", order)):
        for seed, name in enumerate(names, start=1):
            own = given if name == permuted else None
            write_tokens(tmp_path / kind / name, ["<x>"], seed, order=own)
        keys = {"tokenizer": {"source": first}}
        recipe = recipe_of(tmp_path / kind, case, **keys)
        folders.append(run_recipe(recipe, tmp_path / kind / "out").folder)
    before, after = (
        read_values(tmp_path / kind / permuted)[EMBED] for kind in ("plain", "permuted")
    )
    assert np.array_equal(after[order], before)
    assert not np.array_equal(after, before)
    found = [read_values(folder) for folder in folders]
    for name, values in found[0].items():
        assert np.array_equal(found[1][name], values)


def test_two_models_share_a_row_that_their_base_lacks(tmp_path: Path) -> None:
    """It is their mean by weight: there is nothing to take a difference from."""
    for seed, (name, tokens) in enumerate(
        {"base": [], "m0": ["<x>", "<y>"], "m1": ["<y>"]}.items()
    ):
        write_tokens(tmp_path / name, tokens, seed, dtype="F32")
    case = Case("ties", 2, {"weight": [3.0, 1.0], "density": [0.5, 0.5]})
    result = run_recipe(recipe_of(tmp_path, case), tmp_path / "out")
    own = [read_values(tmp_path / name)[EMBED] for name in ("m0", "m1")]
    found, ids = read_values(result.folder)[EMBED], ids_of(result.folder)
    expected = np.float32(0.75) * own[0][17] + np.float32(0.25) * own[1][16]
    assert np.abs(found[ids["<y>"]] - expected).max() <= 2.0**-23
    assert np.array_equal(found[ids["<x>"]], own[0][16])
    assert result.plan.config["vocab_size"] == len(found) == 18


def test_padding_is_kept_trimmed_or_rounded_up(tmp_path: Path) -> None:
    for seed, (name, tokens) in enumerate({"base": [], "m0": ["<x>"]}.items()):
        write_tokens(tmp_path / name, tokens, seed, padding=4, dtype="F32")
    case = Case("task_arithmetic", 1, {"weight": [0.5]})
    rows = {}
    for number, section in enumerate(
        [{}, {"keep_padding": False}, {"pad_to_multiple_of": 16}, {"size": 19}]
    ):
        recipe = recipe_of(tmp_path, case, tokenizer=section)
        folder = run_recipe(recipe, tmp_path / f"out{number}").folder
        rows[number] = read_values(folder)[EMBED]
        assert read_json(folder / "config.json")["vocab_size"] == len(rows[number])
    assert [len(r) for r in rows.values()] == [20, 17, 32, 19]
    base, m0 = (read_values(tmp_path / name)[EMBED] for name in ("base", "m0"))
    expected = base[18:20] + np.float32(0.5) * (m0[18:20] - base[18:20])  # padding in both
    assert np.abs(rows[0][18:20] - expected).max() <= 2.0**-22
    mean = base[: len(PIECES)].mean(axis=0)
    assert np.abs(rows[2][-1] - mean).max() <= 2.0**-22
    refused = recipe_of(tmp_path, case, tokenizer={"size": 16})
    with pytest.raises(
        PlanError, match=r"recipe.yaml:\d+: tokenizer.size is 16; the tokens need 17 rows"
    ):
        run_recipe(refused, tmp_path / "out")


@pytest.mark.parametrize("missing", ["base", "mean"])
def test_missing_rows_are_the_bases_or_the_mean(missing: str, tmp_path: Path) -> None:
    """A model that lacks a token counts with the base's row of it, or with the mean of its own rows."""
    for seed, (name, tokens) in enumerate({"base": ["<x>"], "m0": ["<x>"], "m1": []}.items()):
        write_tokens(tmp_path / name, tokens, seed, dtype="F32")
    case = Case("linear", 2, {"weight": [1.0, 1.0]})
    recipe = recipe_of(tmp_path, case, base_model="base", tokenizer={"missing": missing})
    found = read_values(run_recipe(recipe, tmp_path / "out").folder)[HEAD]
    base, m0, m1 = (read_values(tmp_path / name)[HEAD] for name in ("base", "m0", "m1"))
    other = base[16] if missing == "base" else m1.mean(axis=0)
    assert np.abs(found[16] - (m0[16] + other) / 2).max() <= 2.0**-22


def test_rows_are_taken_from_where_the_recipe_says(tmp_path: Path) -> None:
    """Also in the words of mergekit, and for embedding and head apart."""
    for seed, (name, tokens) in enumerate({"m0": ["<x>", "<y>"], "m1": ["<x>"]}.items()):
        write_tokens(tmp_path / name, tokens, seed, dtype="F32")
    tokens = {
        "<x>": {"source": "m1", "force": True},
        "<y>": {"embed": "zero", "apply": "always"},
        "<new>": {"source": {"kind": "model_token", "model": "m0", "token": "a"}},
        "<mean>": {},
    }
    case = Case("linear", 2, {"weight": [1.0, 1.0]})
    recipe = recipe_of(tmp_path, case, tokenizer={"tokens": tokens})
    result = run_recipe(recipe, tmp_path / "out")
    found, ids = read_values(result.folder), ids_of(result.folder)
    m0, m1 = (read_values(tmp_path / name) for name in ("m0", "m1"))
    for name in (EMBED, HEAD):
        assert np.array_equal(found[name][ids["<x>"]], m1[name][16])
        assert np.array_equal(found[name][ids["<new>"]], m0[name][0])
        mean = m0[name][: len(PIECES)].mean(axis=0)
        assert np.abs(found[name][ids["<mean>"]] - mean).max() <= 2.0**-22
    assert not found[EMBED][ids["<y>"]].any()
    assert np.array_equal(found[HEAD][ids["<y>"]], m0[HEAD][17])


def test_one_model_is_rewritten_without_naming_a_method(tmp_path: Path) -> None:
    write_tokens(tmp_path / "m", ["<x>"], 1)
    text = "model: m\ntokenizer: {tokens: {<new>: {embed: 'model:m:<x>', head: mean}}, size: 24}\n"
    (tmp_path / "r.yaml").write_text(text)
    folder = run_recipe(tmp_path / "r.yaml", tmp_path / "out").folder
    before, after, ids = read_values(tmp_path / "m"), read_values(folder), ids_of(folder)
    for name in (EMBED, HEAD):
        assert np.array_equal(after[name][:17], before[name])
        assert len(after[name]) == 24
    assert np.array_equal(after[EMBED][ids["<new>"]], before[EMBED][16])
    assert np.array_equal(after[INNER], before[INNER])


def test_bytes_do_not_depend_on_threads_and_memory(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "m0", "m1")):
        write_tokens(tmp_path / name, [f"<{name}>", "<x>"], seed)
    case = Case("dare_ties", 2, {"weight": [0.5, 0.5], "density": [0.5, 0.5]}, {"seed": 3})
    recipe = recipe_of(tmp_path, case)
    one = run_recipe(recipe, tmp_path / "one", threads=1).folder
    two = run_recipe(recipe, tmp_path / "two", threads=4, memory="300MiB", fuse=True).folder
    for file in ("model.safetensors", "tokenizer.json", "config.json", "mergetool.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_a_merge_of_merges_of_other_tokens_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("m0", "m1", "m2")):
        write_tokens(tmp_path / name, [f"<{name}>"], seed)
    text = "name: x\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: m0}, {model: m1}]\n---\n"
    text += "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: x}, {model: m2}]\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PlanError, match="x: its models have other tokens"):
        run_recipe(tmp_path / "r.yaml", tmp_path / "out")


def test_tied_and_untied_models_with_tokens_of_their_own_give_a_whole_model(tmp_path: Path) -> None:
    """The tied base counts with its embedding as head; a new token's rows are its owner's."""
    write_tokens(tmp_path / "base", [], 0, tied=True, dtype="F32")
    write_tokens(tmp_path / "m0", ["<x>"], 1, dtype="F32")
    case = Case("task_arithmetic", 1, {"weight": [0.5]})
    result = run_recipe(recipe_of(tmp_path, case), tmp_path / "out")
    found, base, m0 = (read_values(f) for f in (result.folder, tmp_path / "base", tmp_path / "m0"))
    assert read_json(result.folder / "config.json")["tie_word_embeddings"] is False
    for name in (EMBED, HEAD):
        assert np.array_equal(found[name][16], m0[name][16])
        expected = base[EMBED] + np.float32(0.5) * (m0[name][:16] - base[EMBED])
        assert np.abs(found[name][:16] - expected).max() <= 2.0**-22


def test_an_adapter_that_was_saved_with_a_tokenizer_brings_its_tokens(tmp_path: Path) -> None:
    write_tokens(tmp_path / "base", [], 0, dtype="F32")
    write_tokens(tmp_path / "grown", ["<x>"], 1, dtype="F32")
    rows = read_values(tmp_path / "grown")
    saved = {f"base_model.model.{n}": ("F32", rows[n].astype("<f4")) for n in (EMBED, HEAD)}
    (tmp_path / "adapter").mkdir()
    write_tensors(tmp_path / "adapter" / "adapter_model.safetensors", saved)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    config |= {"modules_to_save": ["embed_tokens", "lm_head"], "base_model_name_or_path": "base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tokenizer = (tmp_path / "grown" / "tokenizer.json").read_bytes()
    (tmp_path / "adapter" / "tokenizer.json").write_bytes(tokenizer)
    entry = {"model": "base+adapter", "parameters": {"weight": 0.5}}
    recipe = write_recipe(
        tmp_path / "r.yaml", models=[entry], base_model="base", merge_method="task_arithmetic"
    )
    result = run_recipe(recipe, tmp_path / "out")
    found, base = read_values(result.folder), read_values(tmp_path / "base")
    assert ids_of(result.folder)["<x>"] == 16
    for name in (EMBED, HEAD):
        assert np.array_equal(found[name][16], rows[name][16])
        expected = base[name] + np.float32(0.5) * (rows[name][:16] - base[name])
        assert np.abs(found[name][:16] - expected).max() <= 2.0**-22


def test_some_owners_of_three_are_merged_by_their_own_weights(tmp_path: Path) -> None:
    """Also where these add up to nothing, and where those of all add up to 1 without division."""
    for seed, (name, tokens) in enumerate({"m0": [], "m1": ["<x>"], "m2": ["<x>"]}.items()):
        write_tokens(tmp_path / name, tokens, seed, dtype="F32")
    own = [read_values(tmp_path / name)[EMBED][16] for name in ("m1", "m2")]
    for number, (weights, shared) in enumerate(
        [([1.0, 0.0, 0.0], {}), ([0.5, 0.25, 0.25], {"normalize": False})]
    ):
        case = Case("linear", 3, {"weight": weights}, shared)
        found = run_recipe(recipe_of(tmp_path, case), tmp_path / f"out{number}").folder
        assert np.abs(read_values(found)[EMBED][16] - (own[0] + own[1]) / 2).max() <= 2.0**-22


def test_a_model_that_is_scaled_is_scaled_in_every_row(tmp_path: Path) -> None:
    write_tokens(tmp_path / "m0", ["<x>"], 1, dtype="F32")
    case = Case("passthrough", 1, {"scale": [0.5]})
    recipe = recipe_of(tmp_path, case, tokenizer={"size": 20})
    found = read_values(run_recipe(recipe, tmp_path / "out").folder)
    for name, values in read_values(tmp_path / "m0").items():
        assert np.array_equal(found[name][: len(values)], values / 2)


def test_a_stage_whose_rows_are_plain_meets_a_model_whose_are_not(tmp_path: Path) -> None:
    order = np.random.default_rng(5).permutation(len(PIECES))
    for seed, name in enumerate(("m0", "m1", "m2")):
        write_tokens(tmp_path / name, [], seed, order=order if name == "m2" else None)
    text = "name: x\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: m0}, {model: m1}]\n---\n"
    text += "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: x}, {model: m2}]\n"
    (tmp_path / "r.yaml").write_text(f"{text}tokenizer: {{source: base}}\n")
    with pytest.raises(PlanError, match=r"r\.yaml:8: x: is a merge of the same file"):
        run_recipe(tmp_path / "r.yaml", tmp_path / "out")


def test_equal_vocabularies_before_other_numbers_of_rows_can_be_merged(tmp_path: Path) -> None:
    for seed, padding in enumerate((0, 4)):
        write_tokens(tmp_path / f"m{seed}", [], seed, padding=padding, dtype="F32")
    case = Case("linear", 2, {"weight": [1.0, 1.0]})
    found = read_values(run_recipe(recipe_of(tmp_path, case), tmp_path / "out").folder)[EMBED]
    own = [read_values(tmp_path / name)[EMBED] for name in ("m0", "m1")]
    assert np.abs(found - (own[0] + own[1][:16]) / 2).max() <= 2.0**-22


def test_the_files_beside_are_those_of_the_result(tmp_path: Path) -> None:
    """added_tokens.json is edited; of a lender that is not merged all files count, and the model's own ids in
    its generation_config.json go."""
    write_tokens(tmp_path / "m0", ["<x>"], 0, dtype="F32")
    write_tokens(tmp_path / "m1", ["<y>"], 1, dtype="F32")
    order = np.random.default_rng(5).permutation(len(PIECES))
    write_tokens(tmp_path / "lender", [], 2, order=order)
    (tmp_path / "m0" / "added_tokens.json").write_text('{"<x>": 16}')
    (tmp_path / "m0" / "tokenizer.model").write_bytes(b"old")
    generation = {"eos_token_id": 0, "temperature": 0.5}
    (tmp_path / "m0" / "generation_config.json").write_text(json.dumps(generation))
    case = Case("linear", 2, {"weight": [1.0, 1.0]})
    out = run_recipe(recipe_of(tmp_path, case), tmp_path / "out").folder
    assert read_json(out / "added_tokens.json") == {"<x>": 16, "<y>": 17}
    (tmp_path / "r.yaml").write_text("model: m0\ntokenizer: {source: lender}\n")
    out = run_recipe(tmp_path / "r.yaml", tmp_path / "lent").folder
    assert not (out / "added_tokens.json").exists()
    assert not (out / "tokenizer.model").exists()
    new = {"eos_token_id": int(order[0]), "temperature": 0.5}
    assert read_json(out / "generation_config.json") == new


def test_the_mean_is_that_of_ordinary_tokens_whoever_asks_for_it(tmp_path: Path) -> None:
    """For all tokens that a model lacks, for one that the recipe names, for rows without a token."""
    write_tokens(tmp_path / "m0", ["<s>"], 0, padding=3, dtype="F32")
    write_tokens(tmp_path / "m1", ["<x>"], 1, dtype="F32")
    own = [read_values(tmp_path / name)[EMBED].astype(np.float32) for name in ("m0", "m1")]
    means = [rows[: len(PIECES)].mean(axis=0, dtype=np.float64) for rows in own]
    tokens = {"<new>": {"embed": "mean", "head": "mean"}}
    case = Case("linear", 2, {"weight": [1.0, 1.0]})
    recipe = recipe_of(tmp_path, case, tokenizer={"missing": "mean", "tokens": tokens, "size": 24})
    folder = run_recipe(recipe, tmp_path / "out").folder
    found, ids = read_values(folder)[EMBED], ids_of(folder)
    expected = {
        ids["<x>"]: (means[0] + own[1][16]) / 2,
        ids["<s>"]: (own[0][16] + means[1]) / 2,
        ids["<new>"]: (means[0] + means[1]) / 2,
        23: (means[0] + means[1]) / 2,
    }
    for row, values in expected.items():
        assert np.abs(found[row] - values).max() <= 2.0**-22


def test_an_error_about_rows_names_the_line_that_is_to_blame(tmp_path: Path) -> None:
    write_tokens(tmp_path / "m0", ["<s>"], 0)
    write_tokens(tmp_path / "m1", ["<x>"], 1)
    write_tokens(tmp_path / "outside", ["<y>"], 2)
    case = Case("linear", 2, {"weight": [1.0, 1.0]})
    for section, key, what in (
        ({"missing": "base"}, "missing", "tokenizer.missing is base, but the recipe has no"),
        ({"source": "outside"}, "source", "1 tokens of the result are in none of the merged"),
    ):
        recipe = recipe_of(tmp_path, case, tokenizer={"keep_padding": True, **section})
        with pytest.raises(PlanError, match=rf"recipe\.yaml:\d+: {what}") as caught:
            run_recipe(recipe, tmp_path / "out")
        line = int(str(caught.value).partition("recipe.yaml:")[2].partition(":")[0])
        assert recipe.read_text().splitlines()[line - 1].strip().startswith(f"{key}:")


def test_a_model_that_unify_misspells_is_refused_with_the_nearest(tmp_path: Path) -> None:
    for seed, name in enumerate(("m0", "m1")):
        write_tokens(tmp_path / name, [], seed)
    case = Case("linear", 2, {"weight": [1.0, 1.0]})
    stop = {"unify": {"from": "a", "to": "b", "models": ["m1x"]}}
    what = r"recipe\.yaml:\d+: 'm1x' \(did you mean 'm1'\?\) is none of the models: m0, m1"
    with pytest.raises(PlanError, match=what):
        run_recipe(recipe_of(tmp_path, case, stop=stop), tmp_path / "out")


def test_a_run_tells_of_the_rows_that_it_made(tmp_path: Path, command: Callable[..., Ran]) -> None:
    write_tokens(tmp_path / "m0", [], 0)
    write_tokens(tmp_path / "outside", ["<x>", "<y>"], 1)
    (tmp_path / "r.yaml").write_text("model: m0\ntokenizer: {source: outside, missing: mean}\n")
    ran = command("run", "r.yaml", "-o", "out")
    made = read_json(tmp_path / "out" / "mergetool.json")["rows_made"]
    (line,) = [line for line in ran.out.splitlines() if line.startswith("rows made: ")]
    for rows in made:
        error = f"{rows['median_error']:.2f}"
        assert (
            f"2 of {rows['tensor']} of m0 by mean, median error {error} on tokens held out" in line
        )
    told = json.loads(command("run", "r.yaml", "-o", "out", "--json").out)
    assert {rows["tensor"] for rows in made} == {EMBED, HEAD}
    assert told["rows_made"] == [{k: v for k, v in rows.items() if k != "errors"} for rows in made]
