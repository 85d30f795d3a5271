"""What a base becomes with experts in it: which stock mixture, in which layers; and what that cannot be."""

from collections.abc import Mapping
from dataclasses import dataclass

from merge.anatomy import layer_tensors, main_stack, natural_order
from merge.errors import PlanError
from merge.experts.assembling import Ground
from merge.experts.stock.families import (
    ARCHITECTURES,
    DENSE,
    JOINED,
    MLP,
    StockClass,
    rope_kind,
    rope_table,
    rotated,
    setting,
    window,
)
from merge.sources.adapter import changed_by

COUNTED = ("num_hidden_layers", "hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class Layout:
    """A base on its way to a mixture. `stack`: the prefix of its layers; `tails`: tensors by their names
    within each layer, by its number; `sparse`: the layers that get experts, whose gate projections are
    [width, hidden]."""

    mixture: StockClass
    stack: str
    tails: Mapping[int, Mapping[str, str]]
    sparse: tuple[int, ...]
    width: int
    hidden: int

    @property
    def dense(self) -> tuple[int, ...]:
        return tuple(layer for layer in sorted(self.tails) if layer not in self.sparse)

    @property
    def replaced(self) -> set[str]:
        """The tensors that experts take the place of."""
        return {self.tails[i][tail] for i in self.sparse for tail in self.tails[i] if tail in MLP}

    def name(self, layer: int, tail: str) -> str:
        return f"{self.stack}.{layer}.{tail}"

    def is_joined(self, layer: int) -> bool:
        """Whether the base has gate and up projection of the layer in one tensor."""
        return "mlp.gate_up_proj.weight" in self.tails[layer]


def layout_of(ground: Ground) -> Layout:
    """What the recipe makes of its base; raises PlanError for whatever no stock mixture computes."""
    mixture = _mixture(ground)
    stack, tails = _layers(ground)
    _check_config(ground, mixture)
    _check_places(ground, mixture, stack, tails)
    sparse = _sparse(ground, mixture, len(tails))
    shapes = {_gate_shape(ground, tails[layer], layer) for layer in sparse}
    if len(shapes) > 1:
        label = ground.base.label
        raise PlanError(f"{label}: its MLPs are not of one width, as experts of a mixture are")
    width, hidden = shapes.pop()
    layout = Layout(mixture, stack, tails, sparse, width, hidden)
    _check_routing(ground, mixture)
    _check_shared(ground, mixture)
    _check_adapters(ground, layout)
    return layout


def _mixture(ground: Ground) -> StockClass:
    kind, label = str(ground.plan.config.get("model_type")), ground.base.label
    wanted = ground.sections.architecture
    able = {name: of[kind] for name, of in ARCHITECTURES.items() if kind in of}
    if not able:
        raise PlanError(
            f"{label}: model_type is {kind!r}; models can become experts in {', '.join(DENSE)}, adapters in "
            "any model (format: routed)"
        )
    if wanted is None:
        return next(iter(able.values()))
    if wanted not in able:
        where = ground.recipe.where("architecture")
        raise PlanError(
            f"{where}: architecture {wanted} is of {', '.join(ARCHITECTURES[wanted])}, and {label} is "
            f"{kind}; write {' or '.join(able)}"
        )
    return able[wanted]


def _layers(ground: Ground) -> tuple[str, dict[int, dict[str, str]]]:
    """The prefix of the base's layers, and the tensors of each by their names within."""
    config, label = ground.plan.config, ground.base.label
    for key in COUNTED:
        if not isinstance(config.get(key), int):
            raise PlanError(f"{label}: config.json has no whole number {key}")
    stack = main_stack(ground.steps, config)
    if stack is None:
        raise PlanError(f"{label}: has no layers that experts could be put into")
    tails, count = layer_tensors(ground.steps, stack), config["num_hidden_layers"]
    if sorted(tails) != list(range(count)):
        raise PlanError(
            f"{label}: has {len(tails)} layers up to {max(tails)}, but num_hidden_layers is {count} in "
            "config.json"
        )
    return stack, tails


def _sparse(ground: Ground, mixture: StockClass, count: int) -> tuple[int, ...]:
    """The layers that get experts."""
    given, kind = ground.sections.layers, mixture.model_type
    where = ground.recipe.where("layers")
    if given is None:
        return tuple(range(count))
    if bad := [layer for layer in given if not 0 <= layer < count]:
        label = ground.base.label
        raise PlanError(f"{where}: layers has {bad[0]}; {label} has layers 0 to {count - 1}")
    chosen = tuple(sorted(set(given)))
    if mixture.dense_layers == "none" and len(chosen) < count:
        raise PlanError(
            f"{where}: layers leaves some of {count} without experts, and in {kind} all have them; leave "
            "layers out, or write architecture: deepseek, where the first may have none"
        )
    if mixture.dense_layers == "first" and chosen != tuple(range(chosen[0], count)):
        raise PlanError(
            f"{where}: layers is {list(chosen)}; in {kind} only the first layers have no experts: write all "
            f"from {chosen[0]} to {count - 1}"
        )
    return chosen


def _gate_shape(ground: Ground, tails: Mapping[str, str], layer: int) -> tuple[int, int]:
    """[width, hidden] of a layer's MLP."""
    for parts in (("gate_up", "down"), ("gate", "up", "down")):
        names = [tails.get(f"mlp.{part}_proj.weight") for part in parts]
        if all(names) and all(len(ground.steps[name or ""].shape) == 2 for name in names):
            rows, cols = ground.steps[names[0] or ""].shape
            return rows // (2 if parts[0] == "gate_up" else 1), cols
    raise PlanError(
        f"{ground.base.label}: layer {layer} has no MLP of gate_proj, up_proj and down_proj, which experts "
        "could take the place of"
    )


# -- what the base has -----------------------------------------------------------------------------


def _check_config(ground: Ground, mixture: StockClass) -> None:
    """Raises PlanError for settings of the base under which the mixture would compute something else."""
    config, label, kind = ground.plan.config, ground.base.label, mixture.model_type
    dense = config["model_type"]
    if dense == kind:
        return
    if any(isinstance(value, dict) for value in rope_table(config).values()):
        raise PlanError(
            f"{label}: some of its layers rotate positions otherwise, which {kind} cannot"
        )
    if dense == "phi3" and rope_kind(config) in ("su", "yarn"):
        raise PlanError(
            f"{label}: rope_scaling is of type {rope_kind(config)!r} in config.json, which in phi3 alone "
            "means longrope; write longrope there"
        )
    share, size = rotated(config), window(config)
    if share != 1 and not (dense == "phi3" and mixture.partial):
        other = "; write architecture: deepseek" if dense == "phi3" else ""
        raise PlanError(
            f"{label}: partial_rotary_factor is {share} in config.json, and {kind} rotates whole heads{other}"
        )
    if size and size < setting(config, "max_position_embeddings") and not mixture.window:
        raise PlanError(
            f"{label}: sliding_window is {size} in config.json, and {kind} always attends to everything"
        )
    if kind == "qwen2_moe" and setting(config, "head_dim") != _even_head(config):
        raise PlanError(
            f"{label}: head_dim is {config['head_dim']} in config.json, and {kind} takes hidden_size / "
            f"num_attention_heads, {_even_head(config)}"
        )


def _even_head(config: Mapping[str, int]) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


def _check_places(
    ground: Ground, mixture: StockClass, stack: str, tails: Mapping[int, Mapping[str, str]]
) -> None:
    """Raises PlanError for a tensor of the base that the mixture has no place for."""
    inside = {name: tail for layer in tails.values() for tail, name in layer.items()}
    prefix = stack.rpartition(".")[0] + "."
    around = {*(prefix.lstrip(".") + name for name in AROUND), "lm_head.weight"}
    for name in ground.steps:
        tail = inside.get(name, "")
        joined = tail.removesuffix(".weight") in JOINED
        if not (name in around or tail in MLP or joined or mixture.takes(tail)):
            label = ground.base.label
            raise PlanError(f"{label}: tensor {name!r} has no place in {mixture.model_type}")


AROUND = ("embed_tokens.weight", "norm.weight")


# -- what is asked for -----------------------------------------------------------------------------


def _check_routing(ground: Ground, mixture: StockClass) -> None:
    """Raises PlanError for ways of routing that the mixture does not have."""
    routing, kind, count = ground.routing, mixture.model_type, len(ground.experts)
    where, given = routing.where, ground.sections.router
    if given and given.per not in (None, "layer"):
        raise PlanError(
            f"{where}: per is {given.per}; {kind} has a router in every layer with experts"
        )
    if routing.absolute:
        raise PlanError(
            f"{where}: mode {routing.mode} goes by the size of scores whatever their sign, and {kind} by the "
            "scores; choose another mode, or format: routed"
        )
    if routing.mode == "weights":
        raise PlanError(
            f"{where}: fixed weights need routers with a bias, which {kind} does not have; choose another "
            "mode, or merge the models by these weights"
        )
    if routing.mode == "uniform" and routing.top_k < count:
        raise PlanError(
            f"{where}: of equal scores the first {routing.top_k} experts are always chosen; uniform needs "
            f"top_k {count}"
        )
    if mixture.sigmoid and count < 2:
        raise PlanError(f"{where}: {kind} needs at least 2 experts, and there is {count}")
    if routing.normalise not in mixture.normalises and routing.top_k < count:
        always = str(mixture.normalises[0]).lower()
        raise PlanError(
            f"{where}: normalise is {str(routing.normalise).lower()}, and in {kind} it is always {always}; "
            f"write router: {{normalise: {always}}}, or top_k {count}"
        )


def _check_shared(ground: Ground, mixture: StockClass) -> None:
    """Raises PlanError where the mixture has no place for so many shared experts."""
    kind, listed = mixture.model_type, len(ground.shared)
    where = ground.recipe.where("shared_experts")
    if listed and not mixture.shared:
        raise PlanError(
            f"{where}: {kind} has no shared experts; leave them out, or write architecture: deepseek"
        )
    if listed > 1 and mixture.gated:
        raise PlanError(f"{where}: {listed} shared experts are listed, and {kind} has one")


def _check_adapters(ground: Ground, layout: Layout) -> None:
    """Raises PlanError where an adapter changes what its expert does not hold."""
    held = layout.replaced
    for expert in ground.experts:
        if expert.adapter is None:
            continue
        lost = sorted(set(changed_by(ground.base, expert.adapter)) - held, key=natural_order)
        if lost:
            raise PlanError(
                f"{expert.place}: adapter {expert.name!r} changes {lost[0]!r}, which is no MLP of a layer "
                "with experts and would be lost; write format: routed"
            )
