"""Whose rows a result has, whatever tokens two models on a real tokenizer have added, in whatever order.

The laws are told by an account of owners that knows nothing of how steps are made: a row of the result is
owned by every model that has its token or, where it stands for no token, a row of that number without one.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import EMBED, HEAD
from families import typed, write_model, write_recipe
from hypothesis import example, given, settings
from hypothesis import strategies as st
from methods.cases import Case, needs_base, read_values
from numbered import INNER, Rows, Table, grown, rows_of, write_rows
from numpy.typing import NDArray

from merge.pipeline import run_recipe
from merge.sources.model import read_json

POOL = ("<|im_end|>", "<|im_start|>", "<|tool|>", "[PAD]", "<|über|>")
CASES = {
    "llama2": Case("linear", 2, {"weight": [1.0, 0.5]}),
    "gpt2": Case("slerp", 2, {}, {"t": 0.3}),
    "mistral_v1": Case("ties", 2, {"weight": [0.5, 0.25], "density": [0.5, 0.71]}),
    "mistral_v3": Case("dare_ties", 2, {"weight": [0.5, 0.25], "density": [0.5, 0.71]}, {"seed": 7}),
}  # fmt: skip


@dataclass(frozen=True)
class Added:
    """What a model has on top of its tokenizer: tokens in this order, then rows without a token."""

    tokens: tuple[str, ...]
    padding: int


added = st.builds(Added, st.lists(st.sampled_from(POOL), unique=True).map(tuple), st.integers(0, 3))
# some tokens are of all, some of two, some of one, under other ids; and rows without a token meet tokens
TANGLED = (
    Added(("<|im_end|>", "<|tool|>"), 3),
    Added(("<|tool|>", "[PAD]", "<|im_start|>"), 0),
    Added(("[PAD]", "<|tool|>", "<|über|>"), 2),
)


@dataclass(frozen=True)
class Family:
    """Models on one real tokenizer, in a folder of their own."""

    folder: Path
    table: Table
    told: Mapping[str, Any]
    case: Case

    @property
    def names(self) -> list[str]:
        """The models, the one first whose ids are kept."""
        return [*["base"] * needs_base(self.case), "m0", "m1"]

    def write(self, models: Mapping[str, Added], tied: bool, **orders: NDArray[Any]) -> None:
        """Anew, with the same values at every call."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for seed, (name, own) in enumerate(models.items(), start=1):
            order = orders.get(name)
            table = grown(self.table, own.tokens, inside=order is not None)
            write_rows(
                self.folder / name, table, self.told, seed=seed, tied=tied, padding=own.padding,
                order=order,
            )  # fmt: skip

    def merged(self) -> Path:
        """The folder of the result, with the ids of the first model."""
        tokenizer = {"source": self.names[0]}
        return run_recipe(
            self.recipe(self.folder, [0, 1], tokenizer=tokenizer), self.folder / "out"
        ).folder

    def recipe(self, folder: Path, chosen: Sequence[int], **keys: Any) -> Path:
        """That of the case for some of its models."""
        models = {f"m{i}": {k: v[i] for k, v in self.case.own.items()} for i in chosen}
        if self.case.method == "slerp" or self.names[0] == "base":
            keys["base_model"] = self.names[0]
        if self.case.shared:
            keys["parameters"] = dict(self.case.shared)
        return write_recipe(folder / "r.yaml", models=models, merge_method=self.case.method, **keys)


def family(name: str, real_tokenizers: Path, folder: Path) -> Family:
    table = read_json(real_tokenizers / name / "tokenizer.json")
    told = read_json(real_tokenizers / name / "tokenizer_config.json")
    return Family(folder, table, told, CASES[name])


def owners_of(result: Rows, models: Mapping[str, Rows]) -> dict[tuple[str, ...], list[int]]:
    """Rows of the result, ascending, by the models that own them."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row in range(len(result.values[EMBED])):
        text = result.texts.get(row)
        owners = tuple(name for name, own in models.items() if own.of(text, row) >= 0)
        found.setdefault(owners, []).append(row)
    return found


@pytest.mark.parametrize("name", CASES)
def test_rows_of_one_model_are_copied_and_those_of_several_merged_as_if_alone(
    name: str, real_tokenizers: Path, tmp_path: Path
) -> None:
    """To the bit. Of models whose base lacks a row there is the mean by weight, rounded to bfloat16."""
    made = family(name, real_tokenizers, tmp_path / "models")

    @settings(max_examples=2)
    @example(list(TANGLED), False)
    @given(st.lists(added, min_size=3, max_size=3), st.booleans())
    def law(drawn: list[Added], tied: bool) -> None:
        made.write(dict(zip(made.names, drawn, strict=False)), tied)
        result = rows_of(made.merged())
        models = {name: rows_of(made.folder / name) for name in made.names}
        assert (HEAD in result.values) != tied
        assert result.texts.keys() >= models[made.names[0]].texts.keys()
        for text in {text for own in models.values() for text in own.ids}:
            assert text in result.ids
        for owners, rows in owners_of(result, models).items():
            for kind, values in result.values.items():
                own = {
                    name: models[name].values[kind][
                        [models[name].of(result.texts.get(row), row) for row in rows]
                    ]
                    for name in owners
                }
                check(made, kind, values[rows], own, tmp_path / "alone")

    law()


def check(
    made: Family, kind: str, found: NDArray[Any], own: Mapping[str, NDArray[Any]], folder: Path
) -> None:
    """Rows of a result's embedding or head against those of their owners, [rows, cols] each."""
    if len(own) == 1:
        assert np.array_equal(found, next(iter(own.values())))
    elif made.names[0] == "base" and "base" not in own and own:
        weights = made.case.own["weight"]
        mean = (weights[0] * own["m0"] + weights[1] * own["m1"]) / sum(weights)
        assert (np.abs(found - mean) <= 2.0**-8 * np.abs(mean)).all()
    elif own:
        shutil.rmtree(folder, ignore_errors=True)
        for name, rows in own.items():
            stored = typed(dict.fromkeys((EMBED, HEAD), rows.astype(np.float32)), "BF16")
            write_model(folder / name, stored)
        alone = made.recipe(folder, [i for i in (0, 1) if f"m{i}" in own])
        assert np.array_equal(found, read_values(run_recipe(alone, folder / "out").folder)[kind])
    else:
        assert np.isfinite(found).all()  # stands for nothing in any model


@pytest.mark.parametrize("name", ["gpt2", "mistral_v1"])
def test_the_order_of_a_models_ids_changes_no_row(
    name: str, real_tokenizers: Path, tmp_path: Path
) -> None:
    """The last model's tokens, all of them, have other ids, and its rows go with them: every token of
    the result has the bits that it had, and every other tensor is as it was."""
    made = family(name, real_tokenizers, tmp_path / "models")
    size = 1 + max(made.table["model"]["vocab"].values())

    @settings(max_examples=1)
    @example(list(TANGLED), True, 1)
    @given(st.lists(added, min_size=3, max_size=3), st.booleans(), st.integers(0, 99))
    def law(drawn: list[Added], tied: bool, seed: int) -> None:
        models = dict(zip(made.names, drawn, strict=False))
        tokens = size + len(models["m1"].tokens)
        results = []
        for order in (np.arange(tokens), np.random.default_rng(seed).permutation(tokens)):
            made.write(models, tied, m1=order)
            out = made.merged()
            results.append((rows_of(out), read_values(out)[INNER]))
        (before, inner), (after, other) = results
        assert after.ids.keys() == before.ids.keys()
        first = rows_of(made.folder / made.names[0])
        assert all(before.ids[text] == after.ids[text] == i for text, i in first.ids.items())
        spare = [i for i in range(len(before.values[EMBED])) if i not in before.texts]
        ids = [[*(each.ids[text] for text in before.ids), *spare] for each in (before, after)]
        for kind, values in before.values.items():
            assert np.array_equal(after.values[kind][ids[1]], values[ids[0]])
        assert np.array_equal(inner, other)

    law()
