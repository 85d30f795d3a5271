"""The base inside a mixture of adapters, under the names that it had before there were experts on it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge.errors import SourceError
from merge.sources import Source
from merge.sources.model import Model, class_names

ROUTED, OF_TYPE = "Routed", "routed_"  # how names of its class and model_type begin
BASE = "base_layer"


def is_routed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a mixture of adapters, which brings its own modelling code."""
    return str(config.get("model_type")).startswith(OF_TYPE)


def base_inside(model: Model) -> Model:
    """The base of `model`, a mixture of adapters, whose `within` is the mixture; any other model as it is.

    Raises SourceError where config.json tells of tensors that are not there.
    """
    if not is_routed(model.config):
        return model
    own = mixture_tensors(model)
    stored = {
        _plain(name, own): name for name in model.source.tensors if own.get(name, BASE) == BASE
    }
    source = Source(
        {name: model.source.tensors[there] for name, there in stored.items()},
        lambda name, first, end, out: model.source.read(stored[name], first, end, out),
        lambda name, rows: model.source.scratch(stored[name], rows),
        model.source.held,
    )
    return replace(model, config=_config(model.config), source=source, within=model)


def mixture_tensors(model: Model) -> dict[str, str]:
    """The tensors of a mixture of adapters that its base does not have under that name -> what they are:
    lora_A, lora_B, dora, router, or base_layer. Raises SourceError."""
    told: Any = model.config.get("mixture")
    try:
        _check_table(told)
        modules, sites = told["modules"], told["sites"]
        wanted = {f"{x}.{leaf}": leaf for x in modules for leaf in ("lora_A", "lora_B")}
        wanted |= {f"{x}.dora": "dora" for x, facts in modules.items() if facts["dora"]}
        wanted |= {f"{x}.{BASE}.weight": BASE for x in modules}
        leaves = ("weight", "bias") if told["bias"] else ("weight",)
        wanted |= {f"{sites[x]}.router.{leaf}": "router" for x in modules for leaf in leaves}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SourceError(f"{model.label}: config.json has a damaged table `mixture`") from None
    for name, sizes in _sizes(told).items():
        if name not in model.source.tensors:
            raise SourceError(f"{model.label}: lacks tensor {name!r}, of which config.json tells")
        shape = model.source.tensors[name].shape
        fits = (size in (None, rows) for size, rows in zip(sizes, shape, strict=False))
        if len(shape) != len(sizes) or not all(fits):
            shown = ["any" if size is None else size for size in sizes]
            raise SourceError(
                f"{model.label}: tensor {name!r} has shape {list(shape)}, but {shown} by the table `mixture` "
                "of config.json"
            )
    biases = {
        f"{x}.{BASE}.bias": BASE for x in modules if f"{x}.{BASE}.bias" in model.source.tensors
    }
    return wanted | biases


def _sizes(told: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """The shapes that the table asks for; None: any size."""
    experts, found = len(told["experts"]), dict[str, tuple[int | None, ...]]()
    for layer, facts in told["modules"].items():
        total = sum(facts["ranks"])
        found |= {f"{layer}.lora_A": (total, None), f"{layer}.lora_B": (None, total)}
        found[f"{layer}.{BASE}.weight"] = (None, None)
        if facts["dora"]:
            found[f"{layer}.dora"] = (experts, None)
        found[f"{told['sites'][layer]}.router.weight"] = (experts, None)
        if told["bias"]:
            found[f"{told['sites'][layer]}.router.bias"] = (experts,)
    return found


def _check_table(told: Any) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError unless the table `mixture` is whole."""
    kinds = {
        "top_k": int,
        "temperature": int | float,
        "normalise": bool,
        "absolute": bool,
        "bias": bool,
    }
    if any(not isinstance(told[key], kind) for key, kind in kinds.items()):
        raise ValueError
    if told["per"] not in ("module", "layer", "model") or not 1 <= told["top_k"] <= len(
        told["experts"]
    ):
        raise ValueError
    if told["sites"].keys() != told["modules"].keys() or not told["temperature"] > 0:
        raise ValueError
    for facts in told["modules"].values():
        ranks = facts["ranks"]
        if len(ranks) != len(told["experts"]) or any(type(r) is not int or r < 0 for r in ranks):
            raise ValueError


def _plain(name: str, own: Mapping[str, str]) -> str:
    """The name that a tensor of the base has without a routed layer around it."""
    head, _, leaf = name.rpartition(f".{BASE}.")
    return f"{head}.{leaf}" if own.get(name) == BASE else name


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the base."""
    rest = {key: value for key, value in config.items() if key not in ("mixture", "auto_map")}
    kinds = [kind.removeprefix(ROUTED) for kind in class_names(config)]
    return rest | {
        "model_type": str(config["model_type"]).removeprefix(OF_TYPE),
        "architectures": kinds,
    }
