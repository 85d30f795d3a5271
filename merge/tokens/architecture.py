"""Do two models have one architecture? What configs and headers say; names may begin otherwise."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge.anatomy import embedding_and_head, matched, recomputed
from merge.sources import TensorInfo
from merge.sources.model import Model, text_config
from merge.tokens.findings import Finding, Severity
from merge.tokens.wholeness import said_tied, tables

HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
DOUBTFUL = ("rms_norm_eps", "layer_norm_eps", "sliding_window", "rotary_pct")


def config_findings(a: Model, b: Model, *, whole: bool = True) -> Iterator[Finding]:
    """Where the configs of two models differ in what their weights were trained with. whole: the models are
    compared as a whole; else only parts of them, which models of other types may share."""
    kinds = ("model_type", "hidden_act") if whole else ("hidden_act",)
    yield from _settings(a, b, kinds, "architecture-differs", "error")
    yield from _settings(a, b, HEADS, "heads-differ", "error")
    yield from _settings(a, b, DOUBTFUL, "settings-differ", "warning")
    yield from _rope(a, b)
    yield from _tying(a, b)


def header_findings(a: Model, b: Model) -> Iterator[Finding]:
    """Where the tensors of two models differ in shape and dtype, as far as headers tell."""
    yield from _shapes(a, b)
    dtypes = [_dtype(m) for m in (a, b)]
    if dtypes[0] != dtypes[1]:
        what = f"tensors are stored as {dtypes[0]} and {dtypes[1]}"
        yield Finding("dtype-differs", "warning", (a.label, b.label), what, {"dtypes": dtypes})


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base, kind and scaling of rotary positions, whichever generation of config.json says so."""
    told = {
        key: value
        for table in ("rope_scaling", "rope_parameters")
        for found in tables(_setting(config, table))
        for key, value in found.items()
    }
    for key in ("rope_theta", "partial_rotary_factor"):
        if (value := _setting(config, key)) is not None:
            told.setdefault(key, value)
    kind = told.pop("type", None)
    if told:
        told.setdefault("rope_type", kind or "default")
    return {k: float(v) if isinstance(v, int) else v for k, v in told.items()}


def _settings(
    a: Model, b: Model, keys: Sequence[str], code: str, severity: Severity
) -> Iterator[Finding]:
    told = {key: [_setting(m.config, key) for m in (a, b)] for key in keys}
    unlike = {key: two for key, two in told.items() if None not in two and two[0] != two[1]}
    if unlike:
        yield Finding(code, severity, (a.label, b.label), _said(unlike, a), unlike)


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """Of the text model, where that has it; the type is that of the whole."""
    own = {} if key == "model_type" else text_config(config)
    return own.get(key, config.get(key))


def _said(unlike: Mapping[str, Sequence[Any]], a: Model) -> str:
    """What the second of two models has otherwise than the first, `a`."""
    return "; ".join(
        f"{key} is {_short(theirs)} in config.json, but {_short(ours)} in {a.label}"
        for key, (ours, theirs) in unlike.items()
    )


def _short(value: Any) -> str:
    """Scaling may be told by a list with a number for every pair of columns."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rope(a: Model, b: Model) -> Iterator[Finding]:
    """Silent where one config.json has a table for each kind of layer and the other has not."""
    ours, theirs = rope(a.config), rope(b.config)
    nested = [any(isinstance(v, dict) for v in told.values()) for told in (ours, theirs)]
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if not keys or not ours or not theirs or nested[0] != nested[1]:
        return
    unlike = {key: [ours.get(key), theirs.get(key)] for key in keys}
    what = f"{_said(unlike, a)}: positions are rotated in other ways"
    yield Finding("rope-differs", "warning", (a.label, b.label), what, unlike)


def _tying(a: Model, b: Model) -> Iterator[Finding]:
    """No error: a merge with a model that has a head of its own has one, too."""
    tied = [_tied(m) for m in (a, b)]
    if None not in tied and tied[0] != tied[1]:
        own, other = (m.label for m in ((a, b) if tied[0] else (b, a)))
        what = f"the head of {own} is its embedding, {other} has one of its own"
        yield Finding("tying-differs", "warning", (a.label, b.label), what, {"tied": tied})


def _tied(model: Model) -> bool | None:
    """Whether the head is the embedding; None for a model without both."""
    embedding, head = embedding_and_head(model.source.tensors)
    said = said_tied(model.config)
    if not embedding or (not head and said is False):
        return None
    return bool(said) or not head


def _shapes(a: Model, b: Model) -> Iterator[Finding]:
    """Tensors of one model alone, and shapes that differ; an embedding's rows are no shape here."""
    ours, theirs = (
        {n: i for n, i in m.source.tensors.items() if not recomputed(n, i.shape)} for m in (a, b)
    )
    pairs = matched(ours, theirs)
    rows = {*embedding_and_head(ours)}
    unlike = {
        name: [list(ours[name].shape), list(theirs[other].shape)]
        for name, other in pairs.items()
        if _beside_rows(name in rows, ours[name]) != _beside_rows(name in rows, theirs[other])
    }
    heads = {embedding_and_head(ours)[1], embedding_and_head(theirs)[1]}
    alone = [name for name in ours if name not in pairs and name not in heads]
    alone += [name for name in theirs if name not in pairs.values() and name not in heads]
    if not unlike and not alone:
        return
    said = [f"{name} is {x} and {y}" for name, (x, y) in [*unlike.items()][:1]]
    said += [f"{len(unlike) - 1} more shapes differ"] * (len(unlike) > 1)
    said += [f"{len(alone)} tensors are of one alone, such as {alone[0]}"] if alone else []
    evidence = {"shapes": dict([*unlike.items()][:100]), "alone": alone[:100]}
    yield Finding("shape-differs", "error", (a.label, b.label), "; ".join(said), evidence)


def _beside_rows(of_tokens: bool, info: TensorInfo) -> tuple[int, ...]:
    """The shape, without the number of tokens."""
    return info.shape[1:] if of_tokens else info.shape


def _dtype(model: Model) -> str:
    """What most values are stored as."""
    sizes: Counter[str] = Counter()
    for info in model.source.tensors.values():
        sizes[info.written] += info.rows * info.cols
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="none")
