"""The keys of a recipe about mixtures; those of mergekit-moe have its meaning."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, model_validator

from merge.fields import Label, Strict

# mergekit-moe's words for gates, and those of our own
FROM_PROMPTS = ("hidden", "hidden_last", "hidden_avg", "cheap_embed")
FROM_TEXTS = ("centroids",)
ARCHITECTURES = {
    "qwen2": "qwen2_moe",
    "qwen": "qwen2_moe",
    "qwen3": "qwen3_moe",
}  # mergekit's -> ours


def _texts(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_texts)]
Mode = Literal[
    "uniform", "weights", "random", "uniform_random", "arrow",
    "hidden", "hidden_last", "hidden_avg", "cheap_embed", "centroids",
]  # fmt: skip
Architecture = Annotated[
    Literal["mixtral", "qwen2_moe", "qwen3_moe", "deepseek"],
    BeforeValidator(
        lambda value: ARCHITECTURES.get(value, value) if isinstance(value, str) else value
    ),
]


class SharedExpert(Strict):
    """A model whose MLP every token passes through."""

    source_model: Label
    positive_prompts: Texts = []
    negative_prompts: Texts = []
    noise_scale: float | None = Field(default=None, ge=0)
    residual_scale: float | None = None


class ExpertEntry(Strict):
    """A model (dense experts) or an adapter of the base. `texts`: files of example texts, for centroids.
    `reinitialise`: the share of its MLP's inner width that is drawn anew (Drop-Upcycling)."""

    source_model: Label | None = None
    adapter: Label | None = None
    name: str | None = Field(default=None, min_length=1)
    positive_prompts: Texts = []
    negative_prompts: Texts = []
    texts: Texts = []
    noise_scale: float | None = Field(default=None, ge=0)
    residual_scale: float | None = None
    reinitialise: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        if isinstance(value, dict) and "model" in value and "source_model" not in value:
            return {("source_model" if k == "model" else k): v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _one(self) -> "ExpertEntry":
        if (self.source_model is None) == (self.adapter is None):
            raise ValueError("must have either source_model or adapter")
        return self

    @property
    def label(self) -> str:
        return self.source_model or self.adapter or ""


class RouterSection(Strict):
    """How tokens find their experts. `per`: one router for each adapted module, each layer, or the whole
    model (of adapters only). `weights`: fixed shares of the experts. `normalise`: the shares of the chosen
    experts add up to 1."""

    mode: Mode | None = None
    top_k: StrictInt | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    per: Literal["module", "layer", "model"] | None = None
    weights: list[float] | None = None
    normalise: bool = True
    seed: StrictInt = 0
