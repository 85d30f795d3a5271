"""The keys of a recipe that are about tokens: `tokenizer`, `stop` and `chat_template`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, model_validator

from merge.fields import Label, Strict

Text = Annotated[str, Field(min_length=1)]
Missing = Literal["owners", "base", "mean", "subword", "omp", "procrustes"]


class TokenSection(Strict):
    """One token of the result. `embed`, `head`: where its row comes from: `model:NAME` (that model's own
    row of it), `model:NAME:TEXT` (its row of another token), `mean` (of its ordinary tokens, as with
    `missing: mean`) or `zero`; None: as for any token.

    apply: to models that lack the token, or (always) to all. `special`: as it is flagged where it is new, or
    an ordinary piece so far.
    """

    embed: Text | None = None
    head: Text | None = None
    special: bool | None = None
    apply: Literal["missing", "always"] = "missing"

    @model_validator(mode="before")
    @classmethod
    def _of_mergekit(cls, data: Any) -> Any:
        """mergekit's `source` (a model, {kind: zero}, or {kind: model_token, model, token | token_id}) and
        `force`."""
        if not isinstance(data, dict) or not {"source", "force"} & data.keys():
            return data
        rest = {key: value for key, value in data.items() if key not in ("source", "force")}
        if "source" in data:
            rest["embed"] = rest["head"] = _row_source(data["source"])
        return rest | {"apply": "always" if data.get("force") else "missing"}


def _row_source(value: Any) -> str:
    if isinstance(value, str):
        return f"model:{value}"
    if not isinstance(value, dict):
        raise ValueError("a source is a model, or a table with kind")
    kind = value.get("kind", "model_token")
    if kind == "zero" and set(value) <= {"kind"}:
        return "zero"
    model, token = value.get("model"), value.get("token", value.get("token_id"))
    if kind != "model_token" or not isinstance(model, str) or token is None:
        raise ValueError(
            "a source has kind zero, or kind model_token with model and token or token_id"
        )
    return f"model:{model}:{token}" if isinstance(token, str) else f"model:{model}:#{token}"


class TokenizerSection(Strict):
    """Which tokens the result has, and where their rows come from."""

    source: Text = "base"  # base | union | a model
    specials: Literal["union", "base"] | None = None  # union, unless the source is no merged model
    conflict: Literal["error", "base"] = "error"
    alias: dict[Text, list[Text]] = {}
    missing: Missing = "owners"
    tokens: dict[Text, TokenSection] = {}
    keep_padding: bool = True
    pad_to_multiple_of: StrictInt | None = Field(default=None, ge=1)
    size: StrictInt | None = Field(default=None, ge=1)  # rows of the result

    def model(self, labels: Sequence[str]) -> str | None:
        """The one of `labels` whose vocabulary the result gets; None: the base's, or one of no label."""
        return None if self.source in ("base", "union") else named_model(self.source, labels)


class UnifySection(Strict):
    """Before merging, `models` speak of the token `from` as `to`: their rows are swapped or copied."""

    from_: Text = Field(alias="from")
    to: Text
    how: Literal["swap", "copy", "none"] = "swap"
    models: list[Label] = Field(min_length=1)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class StopSection(Strict):
    """At which tokens the result stops: `eos`, by its text, and `also` (auto: those of all models). Text
    alone is the eos."""

    eos: Text | None = None
    also: Literal["auto", "none"] | list[Text] = "auto"
    unify: Annotated[list[UnifySection], BeforeValidator(_listed)] = []

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"eos": data} if isinstance(data, str) else data


class TemplateSection(Strict):
    """A chat template: `from` is `model:NAME`, `builtin:NAME` or `file:PATH`; or `text` is the template."""

    from_: Text | None = Field(default=None, alias="from")
    text: Text | None = None
    require_control_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        """Text alone: `auto`, the name of a built-in template, or (with a brace in it) a template."""
        if not isinstance(data, str):
            return data
        if "{" in data:
            return {"text": data}
        return {"from": data if ":" in data else f"builtin:{data}"} if data != "auto" else {}


def named_model(name: str, labels: Sequence[str]) -> str | None:
    """The one of `labels` that `name` means: as it is, or the last part of its path."""
    name = name.removeprefix("model:")
    if name in labels:
        return name
    short = [label for label in labels if Path(label.removeprefix("zoo:")).name == name]
    return short[0] if len(short) == 1 else None
