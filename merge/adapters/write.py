"""Writes what a fine-tune changed as a LoRA adapter in PEFT's format.

Linear layers become the best factors of their difference. What is no product of factors is kept whole where
PEFT can hold it: biases of linear layers, and other modules that changed (norms, embeddings, heads, also
grown ones). `PeftModel.from_pretrained(base, folder)` is then the fine-tune, but for the errors reported.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import yaml

from merge.adapters.contents import Contents, sort_out
from merge.adapters.delta import Delta
from merge.adapters.file import GrowingFile
from merge.errors import OutputError, PlanError
from merge.lowrank import Factors, factors_of_product, factors_of_rows
from merge.numerics import Raw, from_float32, random_key, rows_and_cols
from merge.plan import natural_order
from merge.sources.adapter import WEIGHTS
from merge.sources.lora import PREFIX
from merge.sources.model import ADAPTER, Model
from merge.write import partial_of, writing

CARD = "README.md"
CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Adapted:
    """A linear layer of an adapter: `error` is ||D - B A|| / ||D|| of its difference D, of norm `norm`."""

    module: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class Report:
    """A written adapter. `saved`: what is kept whole. `dropped`: tensors left out, and the norms of their
    differences. `rows`: of the vocabulary, where the base must be resized before it is adapted."""

    folder: Path
    adapted: tuple[Adapted, ...]
    saved: tuple[str, ...]
    dropped: Mapping[str, float]
    rows: int | None

    @property
    def error(self) -> float:
        """The norm of all that is missing over that of all that changed, but for what is kept whole."""
        left_out = sum(norm**2 for norm in self.dropped.values())
        missing = sum((layer.norm * layer.error) ** 2 for layer in self.adapted)
        changed = sum(layer.norm**2 for layer in self.adapted)
        return sqrt((missing + left_out) / (changed + left_out))


def write_adapter(
    deltas: Mapping[str, Delta],
    base: Model,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    drop: bool = False,
    threads: int = 1,
) -> Report:
    """Writes the folder `out`: config, tensors and a card with every layer's error; whole or not at all.

    deltas: by the base's tensor names, see `deltas_between`. rank: of every layer, at most. energy: share of
    the squared norm of a difference that is kept with the least rank. Known factors are kept as they are
    where neither asks for less. drop: leaves out what PEFT cannot hold, which is a PlanError otherwise.
    """
    _check_free(out)
    contents = sort_out(deltas, base)
    _check(contents, deltas, out, drop, rank, energy)
    partial = partial_of(out)
    with writing(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    file = GrowingFile(partial / WEIGHTS, _names(contents))
    adapted = []
    for module, name in contents.layers.items():
        found = _factors(deltas[name], rank, energy, random_key(name), threads)
        adapted.append(
            Adapted(module, deltas[name].shape, found.rank, contents.norms[name], found.error)
        )
        _add(file, module, found, contents.modules.linear[module])
    for key, name in contents.whole.items():
        file.add(PREFIX + key, deltas[name].dtype, deltas[name].shape, _stored(deltas[name]))
    file.finish()
    dropped = {name: contents.norms[name] for name in contents.impossible}
    report = Report(out, tuple(adapted), tuple(contents.whole), dropped, contents.rows)
    with writing(partial):
        (partial / ADAPTER).write_text(json.dumps(_config(contents, report, base), indent=2) + "\n")
        (partial / CARD).write_text(_card(report, base), encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    return report


def _check_free(out: Path) -> None:
    """Raises OutputError unless `out` is absent or empty and its partial is one of ours."""
    ours = {ADAPTER, WEIGHTS, CARD}
    for folder, allowed in ((out, set[str]()), (partial_of(out), ours)):
        if folder.exists() and not (
            folder.is_dir() and {f.name for f in folder.iterdir()} <= allowed
        ):
            raise OutputError(f"{folder}: exists and holds something else; choose another output")


def _check(
    contents: Contents,
    deltas: Mapping[str, Delta],
    out: Path,
    drop: bool,
    rank: int | None,
    energy: float | None,
) -> None:
    """Raises PlanError where there is nothing to write, or no way to write all of it."""
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise PlanError(
            f"{out}: rank {rank}, energy {energy}; a rank is 1 or more, an energy in (0, 1]"
        )
    if contents.impossible and not drop:
        raise PlanError(
            f"{out}: PEFT cannot hold the changes of {', '.join(contents.impossible[:3])} "
            f"({len(contents.impossible)} in all); write a whole model, or leave them out with drop"
        )
    if not contents.layers:
        raise PlanError(f"{out}: no linear layer changed, and PEFT loads no adapter without one")
    unknown = [name for name in contents.layers.values() if not deltas[name].factors]
    if unknown and rank is None and energy is None:
        raise PlanError(f"{out}: give a rank or an energy; no factors of {unknown[0]!r} are known")


def _names(contents: Contents) -> Iterator[str]:
    yield from (PREFIX + key for key in contents.whole)
    yield from (f"{PREFIX}{m}.lora_{part}.weight" for m in contents.layers for part in "AB")


def _factors(
    delta: Delta, rank: int | None, energy: float | None, key: int, threads: int
) -> Factors:
    if delta.factors:
        return factors_of_product(delta.factors, rank=rank, energy=energy)
    assert delta.read is not None
    shape = rows_and_cols(delta.shape)
    return factors_of_rows(delta.read, shape, rank=rank, energy=energy, key=key, threads=threads)


def _add(file: GrowingFile, module: str, found: Factors, transposed: bool) -> None:
    """The factors as PEFT stores them, A [rank, in] and B [out, rank], also where the layer is [in, out]."""
    a, b = (found.b.T, found.a.T) if transposed else (found.a, found.b)
    for part, values in (("A", a), ("B", b)):
        file.add(f"{PREFIX}{module}.lora_{part}.weight", "F32", values.shape, [values])


def _stored(delta: Delta) -> Iterator[Raw]:
    for first, end in delta.blocks():
        yield from_float32(delta.tuned(first, end), delta.dtype)


def _config(contents: Contents, report: Report, base: Model) -> dict[str, Any]:
    """adapter_config.json: the scale of every layer is 1, since alpha is its rank."""
    ranks = {layer.module: layer.rank for layer in report.adapted}
    most = max(ranks.values())
    fewer = {module: rank for module, rank in ranks.items() if rank != most}
    kinds = base.config.get("architectures") or [""]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if str(kinds[0]).endswith(CAUSAL) else None,
        "base_model_name_or_path": base.public_name,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "rank_pattern": fewer,
        "alpha_pattern": fewer,
        "target_modules": sorted(ranks, key=natural_order),
        "modules_to_save": list(contents.saved) or None,
        "bias": "all" if contents.biases else "none",
        "fan_in_fan_out": all(contents.modules.linear[module] for module in ranks),
        "use_dora": False,
        "use_rslora": False,
    }
    return config | ({"ensure_weight_tying": True} if contents.tied else {})


def _card(report: Report, base: Model) -> str:
    """README.md: how to load the adapter, and what it lacks."""
    meta = {"library_name": "peft", "base_model": base.public_name, "tags": ["mergetool", "lora"]}
    table = "\n".join(
        f"| {layer.module} | {' x '.join(map(str, layer.shape))} | {layer.rank} | {layer.error:.4f} |"
        for layer in report.adapted
    )
    saved = ", ".join(f"`{key}`" for key in report.saved) or "nothing"
    dropped = "".join(f"\n- `{name}`: {norm:.4g}" for name, norm in report.dropped.items())
    resize = f"Before that, `base.resize_token_embeddings({report.rows})`." if report.rows else ""
    lacks = f"Left out, and the norm of what each had changed:\n{dropped}\n\n" if dropped else ""
    return (
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# A LoRA adapter for {base.public_name}\n\n"
        f"Extracted with mergetool. Load it with `PeftModel.from_pretrained(base, folder)`. {resize}\n\n"
        f"Kept whole: {saved}.\n\n{lacks}"
        "The error of a layer is the norm of what its factors miss over the norm of what the fine-tune "
        f"changed; of all together {report.error:.4f}.\n\n"
        f"| layer | shape | rank | error |\n|---|---|---|---|\n{table}\n"
    )
