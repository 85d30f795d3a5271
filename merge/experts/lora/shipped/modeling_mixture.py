"""A model with LoRA adapters as experts: each routed layer adds what they add, weighted for every token.

    y = W x + b + sum over experts i of g_i [ (c_i - 1) W x + B_i A_i x ]

The shares g come from a router; c is 1 but for DoRA, whose rows it stretches. Scales are in B. The ranks of
all experts stand one after another in `lora_A` [sum of ranks, in] and `lora_B` [out, sum of ranks], so that
any mix of ranks takes two matrix products; an expert without a layer has rank 0 there.

The file lies beside the weights and needs torch and transformers (4.57 or 5) alone. At its end are the
classes for the base at hand. `config.mixture` says what is routed; its top_k, temperature and normalise may
be changed while the model is in memory.

Where layers share a router, activation checkpoints must be those with use_reentrant False, and each forward
pass be followed by its backward pass: what is computed again takes the shares of the last forward pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def route(model: Any, config: Any) -> None:
    """Puts routed layers in the place of those that `config.mixture` names; raises ValueError.

    A body without its head lacks some of them: what is not in it is left out.
    """
    routers: dict[str, Router] = {}
    for name, told in config.mixture["modules"].items():
        place = _place(model, name)
        if place is None:
            if getattr(model, "base_model", None) is model:
                continue
            raise ValueError(f"config.mixture names {name!r}, which {type(model).__name__} lacks")
        site, base = config.mixture["sites"][name], model.get_submodule(place)
        if site == name:
            router = Router(_inner_size(base), config, base.weight.device)
        elif site in routers:
            router = routers[site]
        else:
            router = routers[site] = _put_at(model, site, config)
        routed = RoutedLinear(base, told["ranks"], router, dora=told["dora"], own=site == name)
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, routed)
    model.mixture_routers = [part for part in model.modules() if isinstance(part, Router)]
    model.register_forward_pre_hook(_forget_scores)


def mixture_scores(model: nn.Module) -> list[Tensor]:
    """What the routers of `model` said in its last forward pass, [..., experts] float32 each, in the order of
    its modules; their softmax are the probabilities. Empty unless model.config.output_router_logits is true.
    """
    return [
        scores for part in model.modules() if isinstance(part, Router) for scores in part.scores
    ]


class Router(nn.Module):
    """Tells for every token how much it is for each expert, in float32 whatever the model computes in.

    `scores`: while config.output_router_logits is true, what it said in the model's last forward pass.
    `gates`: the shares that it gave last, for the layers that it does not see itself.
    """

    bias: Tensor | None

    def __init__(self, size: int, config: Any, device: torch.device | None = None) -> None:
        super().__init__()
        experts = len(config.mixture["experts"])
        self.weight = nn.Parameter(torch.zeros(experts, size, dtype=torch.float32, device=device))
        self.register_parameter("bias", None)
        if config.mixture["bias"]:
            self.bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32, device=device))
        self.config = config
        self.scores: list[Tensor] = []
        self.gates: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., experts] float32 of x [..., in], over the temperature: their softmax over all experts
        are the probabilities."""
        mixture = self.config.mixture
        with _without_autocast(x):
            scores: Tensor = functional.linear(x.float(), self.weight.float())
            scores = scores.abs() if mixture["absolute"] else scores
            scores = scores if self.bias is None else scores + self.bias.float()
            scores = scores / mixture["temperature"]
        if getattr(self.config, "output_router_logits", False):
            self.scores.append(scores)
        return scores

    def gate(self, x: Tensor) -> Tensor:
        """The shares of the experts, [..., experts] float32: 0 but for the top_k that score highest."""
        mixture = self.config.mixture
        self.gates = shares(self(x), mixture["top_k"], normalise=mixture["normalise"])
        return self.gates


def shares(scores: Tensor, top_k: int, *, normalise: bool) -> Tensor:
    """The softmax of scores [..., experts] over the `top_k` highest, 0 elsewhere; not normalised: over all
    experts, of which the others are then left out."""
    if top_k >= scores.shape[-1]:
        return scores.softmax(-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen = chosen.scatter(-1, scores.topk(top_k, dim=-1).indices, True)
    if normalise:
        return scores.masked_fill(~chosen, float("-inf")).softmax(-1)
    return scores.softmax(-1).masked_fill(~chosen, 0.0)


class RoutedLinear(nn.Module):
    """A linear layer (or a Conv1D) `base_layer` with the updates of all experts. The base may be quantised.

    ranks: of each expert. own: the router sees what the layer sees; else it is another module's, which has
    seen its own input before.
    """

    router: Router | None
    dora: Tensor | None

    def __init__(
        self, base_layer: Any, ranks: list[int], router: Router, *, dora: bool, own: bool
    ) -> None:
        super().__init__()
        weight, total = base_layer.weight, sum(ranks)
        inner = _inner_size(base_layer)
        outer = weight.numel() // inner
        like = {"dtype": weight.dtype, "device": weight.device}
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(torch.zeros(total, inner, **like))
        self.lora_B = nn.Parameter(torch.zeros(outer, total, **like))
        self.register_parameter("dora", None)
        if dora:
            like["dtype"] = torch.float32
            self.dora = nn.Parameter(torch.zeros(len(ranks), outer, **like))
        self.router = router if own else None
        self._elsewhere = [] if own else [router]  # in a list: it is no part of this module
        self.ranks = list(ranks)

    @property
    def weight(self) -> Tensor:
        """The base's; some models look at its dtype."""
        return self.base_layer.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base_layer.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of x [..., in]."""
        out: Tensor = self.base_layer(x)
        gates = self._gates(x)
        low = functional.linear(x.to(self.lora_A.dtype), self.lora_A)
        added = functional.linear(_weighted(low, gates, self.ranks), self.lora_B)
        if self.dora is not None:
            with _without_autocast(x):
                stretched = gates @ self.dora.float()
            plain = out if self.bias is None else out - self.bias
            added = added + stretched.to(out.dtype) * plain
        return out + added.to(out.dtype)

    def _gates(self, x: Tensor) -> Tensor:
        if self.router is not None:
            return self.router.gate(x)
        router = self._elsewhere[0]
        gates = router.gates
        if gates is None or gates.shape[:-1].numel() != x.shape[:-1].numel():
            raise ValueError(
                "a routed layer sees other tokens than the router that it shares with others"
            )
        wanted = torch.is_grad_enabled() and router.weight.requires_grad
        if wanted and not gates.requires_grad:
            raise ValueError(
                "the gradient of a shared router is lost in reentrant checkpoints; give "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return gates.reshape(*x.shape[:-1], gates.shape[-1]).to(x.device)


def _weighted(low: Tensor, gates: Tensor, ranks: list[int]) -> Tensor:
    """low [..., sum of ranks], what belongs to each expert times its share."""
    gates = gates.to(low.dtype)
    if len(set(ranks)) == 1:
        each = low.reshape(*low.shape[:-1], len(ranks), ranks[0])
        return (each * gates.unsqueeze(-1)).flatten(-2)
    parts = torch.split(low, ranks, dim=-1)
    return torch.cat([part * gates[..., i : i + 1] for i, part in enumerate(parts)], dim=-1)


def _put_at(model: Any, site: str, config: Any) -> Router:
    """A router that sees the input of the module `site`, and is a part of it."""
    place = _place(model, site)
    if place is None:
        raise ValueError(f"config.mixture names {site!r}, which {type(model).__name__} lacks")
    module, size = model.get_submodule(place), config.get_text_config().hidden_size
    if hasattr(module, "router"):
        raise ValueError(f"{site!r} has a router of its own")
    module.router = Router(size, config, next(module.parameters()).device)
    module.register_forward_pre_hook(_gate, with_kwargs=True)
    return module.router  # type: ignore[no-any-return]


def _gate(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    module.router.gate(args[0] if args else kwargs["hidden_states"])


def _forget_scores(model: Any, _: Any) -> None:
    for router in model.mixture_routers:
        router.scores.clear()


def _place(model: Any, name: str) -> str | None:
    """Where the module is that the files call `name`: a body is without the prefix that it has in a whole
    model, and may be stored without it."""
    prefix, known = f"{model.base_model_prefix}.", {place for place, _ in model.named_modules()}
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in known), None)


def _inner_size(layer: Any) -> int:
    """The number of columns that a layer reads; a Conv1D is stored as [in, out]."""
    return int(layer.weight.shape[0 if type(layer).__name__ == "Conv1D" else 1])


def _without_autocast(x: Tensor) -> Any:
    """A context in which products keep their float32."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()
