"""Arrow's rows are the top right singular vectors of the products, which are never formed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from grounds import base as made
from grounds import ground_of, read
from hypothesis import given
from hypothesis import strategies as st
from peft import ArrowConfig, create_arrow_model
from peft_models import adapter, loaded, merged_by_peft
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from merge import run_recipe
from merge.errors import PlanError
from merge.experts.assembling import Ground
from merge.experts.assembly import Factors, Site
from merge.experts.routers.arrow import input_direction
from merge.experts.routers.rows import router_source
from merge.sources.adapter import factors_of

MIXED: list[dict[str, Any]] = [
    {"r": 3, "target_modules": ["q_proj", "down_proj"]},
    {"r": 8, "use_rslora": True, "target_modules": "all-linear"},
    {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 20}},
]
Q, V, DOWN = (
    Site(f"model.layers.1.{part}.router.weight", f"model.layers.1.{part}", cols)
    for part, cols in (("self_attn.q_proj", 16), ("self_attn.v_proj", 16), ("mlp.down_proj", 24))
)


def near(row: Any, product: Any) -> None:
    """`row` is the top right singular vector of `product`, to a millionth."""
    _, values, vectors = np.linalg.svd(product.astype(np.float64))
    assert values[0] > values[1] * (1 + 1e-6), "the case does not tell which one is first"
    assert abs(row.astype(np.float64) @ vectors[0]) > 1 - 1e-6


@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(2, 40), st.integers(0, 2**31), st.booleans()
)
def test_a_row_is_the_top_right_singular_vector(
    rank: int, outs: int, ins: int, seed: int, tiny: bool
) -> None:
    random = np.random.default_rng(seed)
    b, a = (random.standard_normal(s).astype(np.float32) for s in ((outs, rank), (rank, ins)))
    found = input_direction(b * np.float32(1e-15 if tiny else 1), a)
    assert abs(np.linalg.norm(found) - 1) < 1e-12
    product = b.astype(np.float64) @ a.astype(np.float64)
    largest = np.linalg.svd(product)[1][0]
    assert np.linalg.norm(product @ found) > largest * (1 - 1e-9)
    assert found[np.argmax(np.abs(found))] > 0


def test_no_change_has_no_direction() -> None:
    assert not input_direction(np.zeros((5, 2), np.float32), np.ones((2, 7), np.float32)).any()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("arrow")
    base = made(folder / "base", "llama")
    return base, [adapter(base, folder / f"a{i}", **case) for i, case in enumerate(MIXED)]


def adapted(ground: Ground, site: Site) -> dict[int, Factors]:
    """The factors of each expert at a module, by PEFT's files."""
    found = {}
    for i, expert in enumerate(ground.experts):
        assert expert.adapter is not None
        known = factors_of(ground.base, expert.adapter)
        assert known is not None
        if factors := known.get(f"{site.module}.weight"):
            found[i] = Factors(factors.rank, factors.load)
    return found


def test_rows_are_those_of_the_whole_differences_of_peft(
    lora: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = lora
    ground = ground_of(base, [{"adapter": a.name} for a in adapters], {"mode": "arrow"})
    sites = [Q, V, DOWN]
    source = router_source(ground, sites, {site.tensor: adapted(ground, site) for site in sites})
    plain = merged_by_peft(base, into=tmp_path / "plain")
    merged = [merged_by_peft(base, a, into=tmp_path / a.name) for a in adapters]
    for site in sites:
        rows, name = read(source, site.tensor), f"{site.module}.weight"
        assert (rows == read(source, site.tensor, by_grains=True)).all()
        for i, row in enumerate(rows):
            if i in adapted(ground, site):
                near(row, merged[i][name] - plain[name])
            else:
                assert not row.any()
    assert not read(source, V.tensor)[0].any()


def test_an_expert_that_does_not_adapt_a_module_is_not_read(
    lora: tuple[Path, list[Path]],
) -> None:
    base, adapters = lora
    ground = ground_of(base, [{"adapter": a.name} for a in adapters], {"mode": "arrow"})
    asked: list[int] = []

    def told(number: int, factors: Factors) -> Factors:
        def load() -> Any:
            asked.append(number)
            return factors.load()

        return Factors(factors.rank, load)

    known = {i: told(i, f) for i, f in adapted(ground, V).items()}
    source = router_source(ground, [V], {V.tensor: known})
    assert asked == []
    source.rows(V.tensor, 0, 3)
    assert asked == [1, 2]


def test_signs_that_mean_nothing_are_no_rows_of_a_router_that_counts_them(
    lora: tuple[Path, list[Path]],
) -> None:
    base, adapters = lora
    ground = ground_of(
        base, [{"adapter": a.name} for a in adapters], {"mode": "arrow"}, format="dense"
    )
    with pytest.raises(PlanError, match=r"mixture.yaml:\d+: mode arrow counts the size of a score"):
        router_source(ground, [Q], {})


def pointed(base: Path, folder: Path, seed: int) -> Path:
    """An adapter whose products have a first singular value far above the others: PEFT's 15 rounds of power
    iteration then end within float32 of the direction."""
    adapter(base, folder, r=3, target_modules=["q_proj", "down_proj"])
    file, random = folder / "adapter_model.safetensors", np.random.default_rng(seed)
    tensors = {
        name: random.standard_normal(t.shape, np.float32) / 2 for name, t in load_file(file).items()
    }
    for name in tensors:
        tensors[name][0] *= 8 if "lora_A" in name else 1
    save_file(tensors, file)
    return folder


def test_a_mixture_by_arrow_computes_what_peft_s_arrow_does(tmp_path: Path) -> None:
    base = made(tmp_path / "base", "llama")
    file = base / "model.safetensors"
    save_file({name: t / 4 for name, t in load_file(file).items()}, file)  # logits of about 1
    adapters = [pointed(base, tmp_path / f"a{i}", i) for i in range(4)]
    recipe = {
        "base_model": "base",
        "experts": [{"adapter": a.name} for a in adapters],
        "router": {"mode": "arrow", "top_k": 2, "temperature": 0.7},
    }
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(tmp_path / "mixture.yaml", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    )
    theirs = create_arrow_model(
        loaded(base), [str(a) for a in adapters], ArrowConfig(top_k=2, router_temperature=0.7)
    )
    ids = torch.arange(36).reshape(3, 12) + 3
    with torch.no_grad():
        ours, theirs, plain = (
            model.eval()(input_ids=ids).logits for model in (ours, theirs, loaded(base))
        )
    assert (theirs - plain).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-5
