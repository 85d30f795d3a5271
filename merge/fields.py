"""Types of the values in a recipe, as pydantic checks them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from merge.patterns import pattern_problem


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _label(value: Any) -> Any:
    """A model as text `path@revision+adapter@revision`; mergekit writes it out as a table, too."""
    if isinstance(value, str):
        return "+".join(part.strip() for part in value.split("+"))
    if not isinstance(value, dict) or "path" in value:
        return _place(value) if isinstance(value, dict) else value
    if unknown := [k for k in value if k not in ("model", "lora", "override_architecture")]:
        raise ValueError(f"a model has no key {unknown[0]!r}; allowed: model, lora")
    parts = [_place(value.get("model")), *([_place(value["lora"])] if value.get("lora") else [])]
    return "+".join(parts)


def _place(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        revision = value.get("revision")
        return str(value["path"]) + (f"@{revision}" if revision else "")
    if not isinstance(value, str):
        raise ValueError("a model is named by text, or by a table with model and lora")
    return value


def _pattern(value: str) -> str:
    if problem := pattern_problem(value):
        raise ValueError(f"it {problem}")
    return value


Label = Annotated[str, BeforeValidator(_label), Field(min_length=1)]
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})]
Pattern = Annotated[str, AfterValidator(_pattern)]
Dtype = Literal["float32", "float16", "bfloat16"]
