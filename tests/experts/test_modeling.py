"""The layers that the modelling file of a mixture brings: the equation at its top, and how routers choose."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from merge.experts.lora.shipped.modeling_mixture import (
    RoutedLinear,
    Router,
    mixture_scores,
    route,
    shares,
)


def config(experts: int = 3, **told: Any) -> Any:
    names = [f"e{i}" for i in range(experts)]
    mixture = {
        "experts": names, "top_k": experts, "temperature": 1.0, "normalise": True, "absolute": False,
        "bias": False, "modules": {}, "sites": {},
    }  # fmt: skip
    return SimpleNamespace(mixture=mixture | told)


def drawn(module: nn.Module, seed: int = 1) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))


@pytest.mark.parametrize("ranks", [[2, 2, 2], [1, 0, 3]])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_adds_what_each_expert_adds_times_its_share(
    ranks: list[int], transposed: bool, bias: bool
) -> None:
    base = Conv1D(5, 4) if transposed else nn.Linear(4, 5, bias=bias)
    layer = RoutedLinear(base, ranks, Router(4, config()), dora=True, own=True)
    drawn(layer)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    weight = base.weight.T if transposed else base.weight
    plain, b = x @ weight.T, base.bias if base.bias is not None else torch.zeros(5)
    assert layer.router is not None
    assert layer.dora is not None
    gates = (x @ layer.router.weight.T).softmax(-1)
    wanted, first = plain + b, 0
    for i, rank in enumerate(ranks):
        columns = slice(first, first + rank)
        low = x @ layer.lora_A[columns].T @ layer.lora_B[:, columns].T
        wanted = wanted + gates[..., i, None] * (low + layer.dora[i] * plain)
        first += rank
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_before_anything_is_loaded_a_layer_is_its_base() -> None:
    base = nn.Linear(4, 5)
    layer = RoutedLinear(base, [1, 2], Router(4, config(2)), dora=True, own=True)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), base(x))


def test_shares_by_hand() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]])
    every = scores.softmax(-1)
    torch.testing.assert_close(shares(scores, 3, normalise=True), every)
    torch.testing.assert_close(shares(scores, 9, normalise=False), every)
    two = shares(scores, 2, normalise=True)
    e = torch.e
    torch.testing.assert_close(two[0], torch.tensor([0.0, e / (1 + e), 1 / (1 + e)]))
    torch.testing.assert_close(two[1], torch.tensor([0.5, 0.5, 0.0]))
    kept = shares(scores, 2, normalise=False)
    torch.testing.assert_close(kept, every.masked_fill(two == 0, 0))
    assert torch.equal(shares(scores, 1, normalise=True)[0], torch.tensor([0.0, 1.0, 0.0]))


def test_what_the_config_says_of_scores() -> None:
    told = config(2, absolute=True, temperature=0.5, bias=True)
    router = Router(2, told)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        assert router.bias is not None
        router.bias.copy_(torch.tensor([0.25, 0.0]))
    torch.testing.assert_close(router(torch.tensor([[3.0, 1.0]])), torch.tensor([[6.5, 4.0]]))
    told.mixture["temperature"] = 1.0  # while it is in memory
    torch.testing.assert_close(router(torch.tensor([[3.0, 1.0]])), torch.tensor([[3.25, 2.0]]))


def test_routers_think_in_float32() -> None:
    """Two experts whose scores bfloat16 cannot tell apart."""
    router = Router(2, config(2, top_k=1))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1e-3]]))
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        gates = router.gate(x)
    assert gates.dtype == torch.float32
    assert gates.tolist() == [[0.0, 1.0]]


class Body(nn.Module):
    """Two blocks of one layer each, and a head outside of them."""

    base_model_prefix = ""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 2)
        drawn(self)
        route(self, told)
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return (
            hidden_states
            + self.up(hidden_states.flatten(0, -2)).reshape(hidden_states.shape).relu()
        )


def told(sites: dict[str, str]) -> Any:
    modules = {name: {"ranks": [1, 1, 1], "dora": False} for name in sites}
    found = config(3, modules=modules, sites=sites)
    found.get_text_config = lambda: SimpleNamespace(hidden_size=4)
    return found


def test_a_router_of_a_block_sees_what_comes_into_it() -> None:
    model = Body(told({"blocks.0.up": "blocks.0", "blocks.1.up": "blocks.1", "head": "head"}))
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.get_submodule("blocks.0.router").config.output_router_logits = True
    model(torch.randn(2, 3, 4))
    scores = mixture_scores(model)
    routers = [block.get_submodule("router").weight for block in model.blocks]
    for i, weight in enumerate(routers):
        torch.testing.assert_close(scores[i], seen[i] @ weight.T)
    assert len(scores) == 3
    model(torch.randn(1, 1, 4))
    assert {tuple(s.shape) for s in mixture_scores(model)} == {(1, 1, 3)}


def test_one_router_serves_the_whole_model() -> None:
    model = Body(told({"blocks.0.up": "blocks.0", "blocks.1.up": "blocks.0"}))
    names = [name for name, _ in model.named_parameters() if "router" in name]
    assert names == ["blocks.0.router.weight"]
    assert model(torch.randn(2, 3, 4)).shape == (2, 3, 2)


def test_other_tokens_than_the_routers_are_refused() -> None:
    model = Body(told({"blocks.0.up": "blocks.0", "blocks.1.up": "blocks.0"}))
    with pytest.raises(ValueError, match="sees other tokens"):
        model.blocks[1](torch.randn(2, 3, 4))


def test_a_gradient_that_would_be_lost_is_an_error() -> None:
    model = Body(told({"blocks.0.up": "blocks.0", "blocks.1.up": "blocks.0"}))
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        model.blocks[0](x)
    with pytest.raises(ValueError, match="use_reentrant"):
        model.blocks[1](x)


def test_a_layer_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"names 'blocks\.7\.up', which Body lacks"):
        Body(told({"blocks.7.up": "blocks.7.up"}))
