"""A mixture of adapters as PEFT loads it: the adapters, each in a folder of its own, and a router (X-LoRA).

PEFT runs the base once without adapters, takes the shares of all adapters from its last hidden states, and
runs it again with sum_i g_i s_i B_i A_i x in every adapted layer. What its X-LoRA (0.21) does decides what is
written:
- It loads the adapters under the numbers 0, 1, ... and then uses those that the config names, so these are
  their names.
- The path of an adapter starts from the current folder, or is the id of a hub repository. One that starts
  with ./ is no such id. The card says how the folder is loaded from anywhere.
- A softmax over the chosen experts alone knows no temperature, and skips a score of exactly 0. Rows of the
  router are divided by the temperature then, and all scores are 1 larger, which no softmax sees.
- Fixed shares need no softmax: they are the router's bias.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import numpy as np

from merge.anatomy import natural_order
from merge.errors import PlanError
from merge.experts.assembling import Ground, computing, copied, scaled
from merge.experts.assembly import Assembled, Expert, Routing, Site
from merge.numerics import Array
from merge.plan import Operand, Step
from merge.sources import Source, TensorInfo
from merge.sources.adapter import stored_adapter
from merge.sources.lora import PART, PREFIX
from merge.sources.model import ADAPTER, Model, class_names, read_json, text_config

EXPERTS = "experts/"
ROUTER = "base_model.internal_xlora_classifier.layers.0"
WEIGHT, BIAS = f"{ROUTER}.weight", f"{ROUTER}.bias"
SEEN = "lm_head"  # its input is what the router sees: the last hidden states
FIXED = ("uniform", "weights")
# keys of a recipe that are of models
OF_MODELS = (
    *("dtype", "out_dtype", "tokenizer", "tokenizer_source", "stop", "chat_template", "score"),
    *("shared_experts", "architecture", "layers", "saved_modules", "include", "exclude"),
)
OF_DENSE_EXPERTS = ("noise_scale", "residual_scale", "reinitialise")
# what adapter_config.json says of the factors; the rest is about training, or is said anew
KEPT = (
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "use_rslora"),
)
FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
IMPOSSIBLE: Mapping[str | None, str] = {
    "lora_magnitude_vector": "is a DoRA adapter",
    "lora_B.bias": "adds biases, which no share would be taken of",
    "token_adapter.trainable_tokens_delta": "changes rows of tokens",
    None: "keeps whole tensors",
}


def peft(ground: Ground) -> Assembled:
    """The steps of the folder, named by file and tensor (part_of): the adapters' bit for bit, and the router.

    `config` is the root's adapter_config.json. Raises PlanError, which names what X-LoRA has no place for.
    """
    _check_recipe(ground)
    _check_base(ground)
    contents = [_content(ground, i, expert) for i, expert in enumerate(ground.experts)]
    config = _config(ground, contents)
    router = _router_source(ground, _width(ground.base))
    models = (
        *(computing(content.folder, ground, content.source) for content in contents),
        computing("router", ground, router),
    )
    copies = [
        step for i, content in enumerate(contents) for step in content.steps(ground.next_index + i)
    ]
    texts = {ADAPTER: config} | {f"{c.folder}/{ADAPTER}": c.config for c in contents}
    return Assembled(
        (*copies, *_router_steps(ground, len(contents), router)),
        config,
        models,
        {name: (json.dumps(text, indent=2) + "\n").encode() for name, text in texts.items()},
        texts=ground.texts,
    )


def part_of(step: Step) -> tuple[str, str]:
    """The folder within the whole one that a step's tensor goes to, and its name in the file there."""
    if not step.name.startswith(EXPERTS):
        return "", step.name
    head, folder, name = step.name.split("/", 2)
    return f"{head}/{folder}", name


@dataclass(frozen=True)
class _Content:
    """An adapter in the folder. `names`: its tensors' names there -> those in `source`."""

    folder: str
    source: Source
    names: Mapping[str, str]
    config: Mapping[str, Any]

    def steps(self, model: int) -> list[Step]:
        """Copies, wider dtypes first, so that each tensor starts at a multiple of its values' size."""
        infos = self.source.tensors
        found = [
            copied(
                f"{self.folder}/{name}", Operand(model, stored, infos[stored]), infos[stored].dtype
            )
            for name, stored in self.names.items()
        ]
        return sorted(found, key=lambda s: (-s.operands[0].info.itemsize, natural_order(s.name)))


# -- what cannot be ----------------------------------------------------------------------------------


def _check_recipe(ground: Ground) -> None:
    recipe, routing = ground.recipe, ground.routing
    for key in OF_MODELS:
        if getattr(recipe.sections, key):
            raise PlanError(
                f"{recipe.where(key)}: format peft and {key} are both given; {key} is of whole models"
            )
    given = recipe.sections.router
    if given and given.per in ("module", "layer"):
        raise PlanError(
            f"{routing.where}: per is {given.per}, and PEFT's X-LoRA has one router for the model; leave it "
            "out, or write format: routed"
        )
    if routing.mode == "arrow":
        raise PlanError(
            f"{routing.where}: arrow looks at the input of every adapted layer, which PEFT's X-LoRA does not "
            "see; choose mode weights, uniform, hidden or centroids, or write format: routed"
        )
    for expert in ground.experts:
        for key in OF_DENSE_EXPERTS:
            if getattr(expert.entry, key) is not None:
                raise PlanError(
                    f"{expert.place}: {key} is of models as experts; an adapter has none"
                )


def _check_base(ground: Ground) -> None:
    base, where = ground.base, ground.recipe.where("base_model")
    if base.computed or base.adapters:
        raise PlanError(
            f"{where}: {base.label} has no folder of its own for PEFT to load; write it to one first"
        )
    kind = next(iter(class_names(base.config)), "")
    if not kind.endswith("ForCausalLM"):
        raise PlanError(
            f"{where}: {base.label} is a {kind[:60]!r}, and PEFT's X-LoRA is of causal language "
            "models; write format: routed"
        )


def _width(base: Model) -> int:
    """Of the last hidden states."""
    width = text_config(base.config).get("hidden_size")
    if type(width) is not int or width < 1:
        raise PlanError(
            f"{base.label}: config.json has no hidden_size, which the router is as wide as"
        )
    return width


# -- adapters ----------------------------------------------------------------------------------------


def _content(ground: Ground, number: int, expert: Expert) -> _Content:
    assert expert.adapter is not None
    if len(expert.model.adapters) != 1:
        raise PlanError(
            f"{expert.place}: {expert.model.label} is several adapters in a row; merge them into one first "
            "(adapter: {})"
        )
    source = stored_adapter(expert.adapter)
    names = {PREFIX + stored.removeprefix(PREFIX): stored for stored in source.tensors}
    modules = [_module(expert, name.removeprefix(PREFIX)) for name in names]
    config = _adapter_config(ground.base, read_json(expert.adapter / ADAPTER), modules)
    return _Content(f"{EXPERTS}{number}-{_as_folder(expert.name)}", source, names, config)


def _module(expert: Expert, name: str) -> str:
    """The layer that a tensor of an adapter belongs to; PlanError where PEFT's X-LoRA does not take it."""
    match = PART.fullmatch(name)
    part = match["part"] if match else None
    if part not in FACTORS:
        raise PlanError(
            f"{expert.place}: {expert.name} {IMPOSSIBLE[part]} ({name}), and PEFT's X-LoRA has no place for "
            "them; write format: routed, or merge it into a model"
        )
    assert match is not None
    module = match["module"]
    if (
        not module.startswith("model.")
        or module.startswith("model.model.")
        or ".experts." in module
    ):
        raise PlanError(
            f"{expert.place}: {expert.name} adapts {module!r}; PEFT's X-LoRA finds only layers in the part "
            "`model` of a model, and no experts of a MoE; write format: routed"
        )
    return module


def _adapter_config(base: Model, told: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """adapter_config.json of an expert: no path, no pattern of modules, no start of a training."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.public_name,
        "inference_mode": True,
        **{key: told[key] for key in KEPT if told.get(key) is not None},
        "init_lora_weights": True,
        "target_modules": sorted(set(modules), key=natural_order),
        "bias": "none",
        "use_dora": False,
    }


def _as_folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)


# -- the router --------------------------------------------------------------------------------------


def _config(ground: Ground, contents: Sequence[_Content]) -> dict[str, Any]:
    """adapter_config.json of the whole."""
    return {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": ground.base.public_name,
        "inference_mode": True,
        "hidden_size": _width(ground.base),
        "adapters": {str(i): f"./{content.folder}" for i, content in enumerate(contents)},
        **_softmax(ground.routing, len(contents)),
        "layerwise_scalings": False,
        "xlora_depth": 1,
        "use_trainable_adapters": False,
        "scaling_pass_value": 0.0,
        "global_scaling_weight": 1.0,
    }


def _softmax(routing: Routing, count: int) -> dict[str, Any]:
    """How scores become shares, in X-LoRA's words."""
    if routing.mode in FIXED:
        return {"enable_softmax": False, "enable_softmax_topk": False, "top_k_lora": None}
    chosen = _among_chosen(routing, count)
    return {
        "enable_softmax": not chosen,
        "enable_softmax_topk": chosen,
        "top_k_lora": routing.top_k if routing.top_k < count else None,
        "softmax_temperature": 1.0 if chosen else routing.temperature,
    }


def _among_chosen(routing: Routing, count: int) -> bool:
    """Whether the softmax is over the chosen experts alone."""
    return routing.normalise and routing.top_k < count


def shares(routing: Routing, count: int) -> list[float]:
    """Of fixed shares those of the top_k largest, of equal ones the first; adding up to 1 if normalised."""
    given = routing.weights or (1.0,) * count
    chosen = sorted(range(count), key=lambda i: -given[i])[: routing.top_k]
    total = fsum(given[i] for i in (chosen if routing.normalise else range(count)))
    return [given[i] / total if i in chosen else 0.0 for i in range(count)]


def _router_source(ground: Ground, width: int) -> Source:
    """WEIGHT [experts, width] and BIAS [experts] float32."""
    routing, count = ground.routing, len(ground.experts)
    if routing.mode in FIXED:
        weight = np.zeros((count, width), np.float32)
        return _with_constants(
            None, {WEIGHT: weight, BIAS: np.array(shares(routing, count), np.float32)}
        )
    from merge.experts.routers.rows import router_source

    bias = np.full(count, float(_among_chosen(routing, count)), np.float32)
    return _with_constants(router_source(ground, [Site(WEIGHT, SEEN, width)], {}), {BIAS: bias})


def _with_constants(source: Source | None, constants: Mapping[str, Array]) -> Source:
    infos = {name: TensorInfo("F32", values.shape) for name, values in constants.items()}

    def read(name: str, first_row: int, end_row: int, out: memoryview) -> None:
        if source and name not in constants:
            return source.read(name, first_row, end_row, out)
        out[:] = (
            np.ascontiguousarray(constants[name][first_row:end_row]).reshape(-1).view(np.uint8).data
        )
        return None

    if source is None:
        return Source(infos, read)

    def scratch(name: str, rows: int) -> int:
        return 0 if name in constants else source.scratch(name, rows)

    return Source({**source.tensors, **infos}, read, scratch, source.held)


def _router_steps(ground: Ground, count: int, router: Source) -> list[Step]:
    weight, bias = (
        Operand(ground.next_index + count, n, router.tensors[n]) for n in (WEIGHT, BIAS)
    )
    temperature = ground.routing.temperature
    if (
        ground.routing.mode not in FIXED
        and _among_chosen(ground.routing, count)
        and temperature != 1.0
    ):
        return [scaled(WEIGHT, weight, "F32", 1.0 / temperature), copied(BIAS, bias, "F32")]
    return [copied(WEIGHT, weight, "F32"), copied(BIAS, bias, "F32")]
