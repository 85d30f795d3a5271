"""Dense architectures and the stock mixtures that they become, as data: names of tensors, config.json.

A mixture's class computes what the dense one does but for its MLPs; read in transformers 4.57 and 5.23. What
a dense config.json leaves to its class is written out, since the mixture's class would take something else.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

LLAMA = {
    "hidden_act": "silu",
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MISTRAL = {
    **LLAMA,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
PHI3 = {
    **LLAMA,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
QWEN2 = {
    **LLAMA,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
# By model_type: what transformers takes where config.json is silent, of what matters to a mixture of another
# type. DeepSeek's are mixtures that may have dense layers.
DENSE: dict[str, Mapping[str, Any]] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": {**QWEN2, "head_dim": 128},
    "deepseek_v2": {},
    "deepseek_v3": {},
}
# Tensors that hold several: the parts of their rows, from the first on.
JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
PARTS = ("gate", "up", "down")  # of an MLP
MLP = {f"mlp.{part}_proj.weight" for part in (*PARTS, "gate_up")}
WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
IDLE_WIDTH = 128  # of a shared expert of zeros: quantisers and servers cut in multiples of it
AUXILIARY = {"router_aux_loss_coef": 0.001, "output_router_logits": False}


@dataclass(frozen=True)
class Counts:
    """What a mixture's config.json tells: how many experts, of how many each token takes `top_k`, whose
    shares add up to 1 or not; the inner `width` of each; the numbers of the `dense` layers; how many
    `shared` experts."""

    experts: int
    top_k: int
    normalise: bool
    width: int
    dense: tuple[int, ...]
    shared: int


@dataclass(frozen=True)
class StockClass:
    """A stock mixture: its model_type and class, and what a layer's block of experts is called there.

    `parts`: of an expert's MLP: gate, up, down. `attention`: what may be in self_attn, a regular expression.
    `shared`: what its shared experts are called, where it has any.
    `normalises`: whether the shares of the chosen experts can be made to add up to 1, and left as they are.
    `sigmoid`: it weighs experts by sigmoids of their scores, and needs two at least and a bias for choosing.
    `dense_layers`: which layers may have no experts: none, first (before all that have) or any. `window`: it
    knows a sliding window of all layers. `partial`: it can rotate a part of a head. `keys`: of config.json.
    """

    model_type: str
    loader: str
    block: str
    parts: tuple[str, str, str]
    attention: str
    keys: Callable[[Counts], dict[str, Any]]
    shared: str = ""
    normalises: tuple[bool, ...] = (True,)
    sigmoid: bool = False
    dense_layers: str = "first"
    window: bool = False
    partial: bool = False

    def takes(self, tail: str) -> bool:
        """Whether a layer has a place for the tensor `tail` of a dense one, its MLP aside."""
        norms = r"(input|post_attention)_layernorm\.weight"
        return bool(re.fullmatch(rf"{norms}|self_attn\.({self.attention})", tail))

    def expert(self, number: int, part: str) -> str:
        """The name within the layer of a projection of an expert: gate, up or down."""
        return f"{self.block}.experts.{number}.{self._part(part)}.weight"

    def shared_expert(self, part: str) -> str:
        return f"{self.block}.{self.shared}.{self._part(part)}.weight"

    @property
    def router(self) -> str:
        return f"{self.block}.gate.weight"

    @property
    def bias(self) -> str:
        """What is added to scores to choose experts, not to weigh them."""
        return f"{self.block}.gate.e_score_correction_bias"

    @property
    def gated(self) -> bool:
        """Whether it has one shared expert, with a gate: a sigmoid."""
        return self.shared == "shared_expert"

    @property
    def shared_gate(self) -> str:
        return f"{self.block}.{self.shared}_gate.weight"

    def _part(self, part: str) -> str:
        return self.parts[PARTS.index(part)]


# -- config.json of each ---------------------------------------------------------------------------


def _mixtral(counts: Counts) -> dict[str, Any]:
    return {
        "num_local_experts": counts.experts,
        "num_experts_per_tok": counts.top_k,
        "router_jitter_noise": 0.0,
        **AUXILIARY,
    }


def _qwen(counts: Counts) -> dict[str, Any]:
    return {
        "num_experts": counts.experts,
        "num_experts_per_tok": counts.top_k,
        "norm_topk_prob": counts.normalise,
        "moe_intermediate_size": counts.width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(counts.dense),
        "use_sliding_window": False,
        **AUXILIARY,
    }


def _qwen2(counts: Counts) -> dict[str, Any]:
    width = counts.width if counts.shared else idle_width(QWEN2_MOE, counts)
    return _qwen(counts) | {"shared_expert_intermediate_size": width, "qkv_bias": True}


def _qwen3(counts: Counts) -> dict[str, Any]:
    return _qwen(counts) | {"num_local_experts": counts.experts}


def _deepseek(counts: Counts) -> dict[str, Any]:
    return {
        "n_routed_experts": counts.experts,
        "num_experts_per_tok": counts.top_k,
        "n_shared_experts": max(1, counts.shared),
        "norm_topk_prob": counts.normalise,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": counts.width,
        "moe_layer_freq": 1,
        "first_k_dense_replace": len(counts.dense),
        "num_nextn_predict_layers": 0,
        "output_router_logits": False,
    }


def _deepseek_v2(counts: Counts) -> dict[str, Any]:
    return _deepseek(counts) | {"topk_method": "greedy", "scoring_func": "softmax"}


def _deepseek_v3(counts: Counts) -> dict[str, Any]:
    return _deepseek(counts) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


QWEN_PARTS = ("gate_proj", "up_proj", "down_proj")
PLAIN = r"[qkvo]_proj\.weight"
LATENT = r"(q|q_a|q_b|kv_b|o)_proj\.weight|kv_a_proj_with_mqa\.weight|(q|kv)_a_layernorm\.weight"
LATENT += r"|(q_a|o)_proj\.bias|kv_a_proj_with_mqa\.bias"

MIXTRAL = StockClass(
    "mixtral", "MixtralForCausalLM", "block_sparse_moe", ("w1", "w3", "w2"), PLAIN, _mixtral,
    dense_layers="none", window=True,
)  # fmt: skip
QWEN2_MOE = StockClass(
    "qwen2_moe", "Qwen2MoeForCausalLM", "mlp", QWEN_PARTS, rf"{PLAIN}|[qkv]_proj\.bias", _qwen2,
    shared="shared_expert", normalises=(True, False), dense_layers="any",
)  # fmt: skip
QWEN3_MOE = StockClass(
    "qwen3_moe", "Qwen3MoeForCausalLM", "mlp", QWEN_PARTS,
    rf"{PLAIN}|[qkvo]_proj\.bias|[qk]_norm\.weight", _qwen3,
    normalises=(True, False), dense_layers="any",
)  # fmt: skip
GLM4_MOE = StockClass(
    "glm4_moe", "Glm4MoeForCausalLM", "mlp", QWEN_PARTS,
    rf"{PLAIN}|[qkv]_proj\.bias|[qk]_norm\.weight", _deepseek,
    shared="shared_experts", sigmoid=True, partial=True,
)  # fmt: skip
DEEPSEEK_V2 = StockClass(
    "deepseek_v2", "DeepseekV2ForCausalLM", "mlp", QWEN_PARTS, LATENT, _deepseek_v2,
    shared="shared_experts", normalises=(False,),
)  # fmt: skip
DEEPSEEK_V3 = StockClass(
    "deepseek_v3", "DeepseekV3ForCausalLM", "mlp", QWEN_PARTS, LATENT, _deepseek_v3,
    shared="shared_experts", sigmoid=True,
)  # fmt: skip
# What a recipe calls an architecture -> of which dense one it makes which mixture. DeepSeek's own attention
# is another than that of other models; GLM-4.5 has its experts beside an attention as theirs.
ARCHITECTURES: dict[str, dict[str, StockClass]] = {
    "mixtral": dict.fromkeys(("llama", "mistral", "phi3"), MIXTRAL),
    "qwen2_moe": {"qwen2": QWEN2_MOE},
    "qwen3_moe": {"qwen3": QWEN3_MOE},
    "deepseek": {
        "deepseek_v2": DEEPSEEK_V2,
        "deepseek_v3": DEEPSEEK_V3,
        **dict.fromkeys(("llama", "mistral", "phi3", "qwen2", "qwen3"), GLM4_MOE),
    },
}


def idle_width(mixture: StockClass, counts: Counts) -> int:
    """Inner width of a shared expert that adds nothing: small where config.json can say so."""
    return min(IDLE_WIDTH, counts.width) if mixture.gated else counts.width


# -- what the dense config.json says ---------------------------------------------------------------


def setting(config: Config, key: str) -> Any:
    """A value of config.json, or what the dense class takes without it."""
    default = DENSE[config["model_type"]].get(key)
    if key == "rope_theta":
        return config.get(key, (config.get("rope_parameters") or {}).get(key, default))
    value = config.get(key, default)
    if value is None and key == "num_key_value_heads":
        return config["num_attention_heads"]
    if value is None and key == "head_dim":
        return config["hidden_size"] // config["num_attention_heads"]
    return value


def mixture_config(config: Config, mixture: StockClass, counts: Counts) -> dict[str, Any]:
    """config.json of the mixture of a dense model with `config`, for transformers 4 and 5 alike."""
    dense = config["model_type"]
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    if dense != mixture.model_type:
        keys = [key for key in DENSE[dense] if key not in WINDOWS]
        kept = {key: value for key, value in kept.items() if key not in WINDOWS}
        kept |= {key: setting(config, key) for key in keys} | _rope(config, mixture)
        kept["sliding_window"] = window(config) if mixture.window else None
    if mixture is GLM4_MOE:
        kept |= {"use_qk_norm": dense == "qwen3", "attention_bias": dense == "qwen2"}
    kept |= {"model_type": mixture.model_type, "architectures": [mixture.loader]}
    return kept | mixture.keys(counts)


def rope_table(config: Config) -> Mapping[str, Any]:
    """How rotary positions are scaled, whichever version of transformers wrote it; empty for not at all."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_kind(config: Config) -> str:
    table = rope_table(config)
    return str(table.get("rope_type", table.get("type", "default")))


def rotated(config: Config) -> float:
    """The share of a head that is rotated."""
    table = rope_table(config)
    return float(table.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0)


def window(config: Config) -> int | None:
    """The sliding window of all layers, or of some; None where none has one."""
    dense = DENSE[config["model_type"]]
    if "sliding_window" not in dense or ("use_sliding_window" in dense and not _slides(config)):
        return None
    return setting(config, "sliding_window") or None


def _slides(config: Config) -> bool:
    """Whether some layer has a window, where config.json can say so of single ones."""
    if isinstance(kinds := config.get("layer_types"), list):
        return "sliding_attention" in kinds
    start = setting(config, "max_window_layers")
    return bool(setting(config, "use_sliding_window")) and start < config["num_hidden_layers"]


def _rope(config: Config, mixture: StockClass) -> dict[str, Any]:
    """Both forms: rope_theta and rope_scaling, and rope_parameters where config.json has them."""
    table = dict(config.get("rope_parameters") or {})
    found: dict[str, Any] = {"rope_theta": setting(config, "rope_theta")}
    if table and "rope_scaling" not in config and rope_kind(config) != "default":
        found["rope_scaling"] = {key: value for key, value in table.items() if key != "rope_theta"}
    if mixture.partial:
        found["partial_rotary_factor"] = rotated(config)
    if mixture.partial and table:
        found["rope_parameters"] = table | {"partial_rotary_factor": rotated(config)}
    return found
