"""Which tensors of a mixture are its routers, by exact name: a word such as gate would also fit gate_proj."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.errors import RequestError
from merge.experts.configs import check_configs
from merge.sources.inside import is_routed
from merge.sources.model import Model


@dataclass(frozen=True)
class Family:
    """Of a stock MoE: how its routers' names end in files and, by versions of transformers, in memory.
    `renormalised`: whether the shares of the chosen experts add up to 1; with `by_config`, unless config.json
    says otherwise. `sigmoid`: a share is the sigmoid of a score, else they are a softmax over experts."""

    stored: str
    loaded: tuple[str, ...]
    renormalised: bool
    by_config: bool = True
    sigmoid: bool = False


def _plain(renormalised: bool, **more: bool) -> Family:
    return Family(".mlp.gate.weight", (".mlp.gate.weight",), renormalised, **more)


FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(
        ".block_sparse_moe.gate.weight",
        (".mlp.gate.weight", ".block_sparse_moe.gate.weight"),
        renormalised=True,
        by_config=False,
    ),
    "qwen2_moe": _plain(False),
    "qwen3_moe": _plain(False),
    "olmoe": _plain(False),
    "deepseek_v2": _plain(False, by_config=False),
    "deepseek_v3": _plain(True, sigmoid=True),
    "glm4_moe": _plain(True, sigmoid=True),
}


@dataclass(frozen=True)
class Gates:
    """The routers of a mixture: each tensor by its name in the files -> what it may be called in memory.

    `experts`, `top_k`: how many there are and how many a token gets. `renormalised`: the shares of those add
    up to 1. `sigmoid`: as of a Family. `routed`: it runs by the modelling file that mergetool writes.
    """

    names: Mapping[str, tuple[str, ...]]
    experts: int
    top_k: int
    renormalised: bool
    sigmoid: bool = False
    routed: bool = False


def gates_of(model: Model) -> Gates:
    """The routers of an opened mixture; raises RequestError where it is none that is known."""
    check_configs([model])
    if not is_routed(model.config):
        return _of_stock(model)
    mixture = model.config.get("mixture")
    return _of_routed(model, mixture if isinstance(mixture, dict) else {})


def check_trainable(model: Model, gates: Gates) -> None:
    """Raises RequestError where the loss does not depend on the routers."""
    chosen = min(gates.top_k, gates.experts)
    if chosen == 1 and gates.renormalised:
        found = "there is one expert" if gates.experts == 1 else "top_k is 1"
        raise RequestError(
            f"{model.label}: {found} and its share is always 1, so that the gradient of every router is "
            "exactly 0; make the mixture with top_k: 2, or with normalise: false where its format allows that"
        )


def _of_routed(model: Model, mixture: Mapping[str, Any]) -> Gates:
    try:
        sites = list(dict.fromkeys(map(str, mixture["sites"].values())))
        endings = ("router.weight", "router.bias") if mixture["bias"] else ("router.weight",)
        names = [f"{site}.{ending}" for site in sites for ending in endings]
        counts = len(mixture["experts"]), int(mixture["top_k"])
        renormalised = bool(mixture["normalise"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RequestError(f"{model.label}: config.json has a damaged table `mixture`") from None
    for name in names:
        if name not in model.source.tensors:
            raise RequestError(f"{model.label}: lacks tensor {name!r}, of which config.json tells")
    return Gates({name: (name,) for name in names}, *counts, renormalised, routed=True)


def _of_stock(model: Model) -> Gates:
    kind = model.config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise RequestError(
            f"{model.label}: is a {kind}; routers are known of mixtures of LoRAs (format: routed) and of "
            f"{', '.join(FAMILIES)}"
        )
    tensors = model.source.tensors
    stored = [name for name in tensors if name.endswith(family.stored)]
    if not stored:
        raise RequestError(
            f"{model.label}: has no router; none of its tensors ends in {family.stored}"
        )
    names = {
        name: tuple(name.removesuffix(family.stored) + ending for ending in family.loaded)
        for name in stored
    }
    renormalised = family.renormalised
    if family.by_config:
        renormalised = bool(model.config.get("norm_topk_prob", renormalised))
    top_k = model.config.get("num_experts_per_tok") or 2
    return Gates(names, tensors[stored[0]].shape[0], top_k, renormalised, family.sigmoid)
