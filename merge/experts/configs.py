"""Whether config.json has values of the kinds that mixtures are made by; a wrong one is told by its key."""

from collections.abc import Iterable
from typing import Any

from merge.errors import PlanError
from merge.experts.stock.families import ARCHITECTURES, DENSE
from merge.sections import shown
from merge.sources.model import Model, text_config

LARGEST = 1 << 53  # of a number: what JSON's readers agree on
COUNTS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("max_position_embeddings", "original_max_position_embeddings"),
    *("n_group", "topk_group", "moe_k"),
)
NUMBERS = (
    "sliding_window",
    "max_window_layers",
    "first_k_dense_replace",
    "n_shared_experts",
    *("num_experts_per_tok", "num_local_experts", "num_experts", "n_routed_experts"),
)  # may be 0: a dense model may say that it has no experts
FACTORS = ("rope_theta", "partial_rotary_factor", "rms_norm_eps", "initializer_range")
FLAGS = (
    "use_sliding_window",
    "tie_word_embeddings",
    "norm_topk_prob",
    "attention_bias",
    "use_qk_norm",
)
TEXTS = ("model_type", "hidden_act")
OF_LAYERS = (*COUNTS, *NUMBERS, *FACTORS)
STOCK = {*DENSE, *(stock.model_type for of in ARCHITECTURES.values() for stock in of.values())}
LISTS = ("architectures", "layer_types")  # of texts
TABLES = ("rope_scaling", "rope_parameters", "auto_map")


def check_configs(models: Iterable[Model]) -> None:
    """Raises PlanError for the first value that no config.json can have there; null stands for none. Of
    models that become no stock mixture, numbers may also be lists, one for each layer."""
    for model in models:
        by_layer = str(model.config.get("model_type")) not in STOCK
        for table in (model.config, text_config(model.config)):
            for key, value in table.items():
                whole = (
                    value if by_layer and isinstance(value, list) and key in OF_LAYERS else [value]
                )
                allowed = next(filter(None, (_problem(key, each) for each in whole)), "")
                if allowed and value is not None:
                    raise PlanError(
                        f"{model.label}: {key} is {shown(value)} in config.json; it must be {allowed}"
                    )
        if not isinstance(model.config.get("model_type"), str):
            raise PlanError(
                f"{model.label}: config.json has no model_type; give that of these weights"
            )


def _problem(key: str, value: Any) -> str:
    """What a value must be and is not; "" where it is."""
    if key in COUNTS or key in NUMBERS:
        least = int(key in COUNTS)
        fits = type(value) is int and least <= value < LARGEST
        return "" if fits else f"a whole number from {least}"
    if key in FACTORS:
        return "" if _is_number(value) and 0 <= value < LARGEST else "a number from 0"
    if key in FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if key in TEXTS:
        return "" if isinstance(value, str) else "text"
    if key in LISTS:
        fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return "" if fits else "a list of texts"
    return _problem_of_table(key, value) if key in TABLES else ""


def _problem_of_table(key: str, value: Any) -> str:
    if not isinstance(value, dict):
        return "a table"
    for inner, found in value.items():
        if inner in FACTORS and not (_is_number(found) and 0 <= found < LARGEST):
            return f"a table whose {inner} is a number from 0"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
