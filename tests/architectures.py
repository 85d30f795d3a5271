"""Every architecture of transformers that its default settings build, on the meta device."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from merge.anatomy import layer_tensors, renamed

LAYERS = 4
MAPPINGS = {  # and the least that must be covered: a few below what transformers 5.23 builds
    "CAUSAL_LM": 155,
    "MASKED_LM": 48,
    "SEQ_TO_SEQ_CAUSAL_LM": 35,
    "SPEECH_SEQ_2_SEQ": 17,
    "IMAGE_TEXT_TO_TEXT": 76,
}
COUNT = re.compile(
    r"(n_|num_)?(hidden_|encoder_|decoder_)?(layers?|blocks|depth)"
    r"|(en|de)coder_(num_)?(hidden_)?layers|(num_)?layers"
)
EXPERTS = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts")


@dataclass(frozen=True)
class Built:
    """A model as save_pretrained would write it: `tensors` are its shapes by name, `config` its config.json.

    `settings`: a config.json that says just enough. `tied`: copies -> what they are copies of, by the
    names in memory, which `held` lists.
    """

    name: str
    model_type: str
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    held: frozenset[str]
    tied: Mapping[str, str]


@cache
def architectures(mapping: str) -> tuple[Built, ...]:
    """All of one of transformers' mappings that can be built with 4 layers a stack."""
    logging.disable(logging.ERROR)  # of defaults that do not fit together
    try:
        return tuple(_built_all(mapping))
    finally:
        logging.disable(logging.NOTSET)


def build(name: str, model_type: str, settings: Mapping[str, Any]) -> Built:
    """The model that a config.json describes; raises whatever transformers does."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = load_config(model_type, settings)
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    held = dict(model.state_dict())
    saved = {key: tuple(t.shape) for key, t in revert_weight_conversion(model, dict(held)).items()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    written = json.loads(config.to_json_string(use_diff=False))
    return Built(name, model_type, settings, written, saved, frozenset(held), tied)


def load_config(model_type: str, settings: Mapping[str, Any]) -> Any:
    """What transformers makes of a config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind.from_dict(kind._decode_special_floats(json.loads(json.dumps(settings))))


def stacked_tensors(
    tensors: Mapping[str, tuple[int, ...]], stack: str, numbers: list[int]
) -> dict[str, tuple[int, ...]]:
    """The tensors of a model whose layer i is layer numbers[i]."""
    layers = layer_tensors(tensors, stack)
    inside = {name for layer in layers.values() for name in layer.values()}
    rest = {name: shape for name, shape in tensors.items() if name not in inside}
    return rest | {
        renamed(name, stack, place): tensors[name]
        for place, number in enumerate(numbers)
        for name in layers[number].values()
    }


def _built_all(mapping: str) -> Iterator[Built]:
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
    seen = set()
    for model_type, classes in names.items():
        name = classes if isinstance(classes, str) else classes[0]
        try:
            config = CONFIG_MAPPING[model_type]()
            halves = {"is_encoder_decoder": True} if config.is_encoder_decoder else {}
            settings = {"model_type": model_type, **halves, **_small(config)}
            built = build(name, model_type, settings)
        except Exception:  # defaults that do not fit, or a library that is not here
            continue
        if name not in seen:
            seen.add(name)
            yield built


def _small(config: Any) -> dict[str, Any]:
    """Settings for 4 layers in every stack and 8 experts at most, all else by default."""
    from transformers import PreTrainedConfig

    settings: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            settings[key] = {"model_type": value.model_type, **_small(value)}
        elif COUNT.fullmatch(key) and isinstance(value, int) and not isinstance(value, bool):
            settings[key] = LAYERS
        elif EXPERTS.fullmatch(key) and isinstance(value, int) and value > 8:
            settings[key] = 8
    return settings
