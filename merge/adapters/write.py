"""Writes what a fine-tune changed as a LoRA adapter in PEFT's format.

Linear layers become the best factors of their difference. What is no product of factors is kept whole where
PEFT can hold it: biases of linear layers, and other modules that changed (norms, embeddings, heads, also
grown ones). `PeftModel.from_pretrained(base, folder)` is then the fine-tune, but for the errors reported.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import yaml

from merge.adapters.contents import Contents, sort_out
from merge.adapters.delta import Delta
from merge.adapters.journal import Journal, Run, Tensor
from merge.adapters.modules import Modules
from merge.anatomy import natural_order
from merge.errors import PlanError
from merge.lowrank import Factors, factors_of_product, factors_of_rows
from merge.numerics import Raw, from_float32, random_key, rows_and_cols
from merge.sources.lora import PREFIX
from merge.sources.model import ADAPTER, ADAPTER_WEIGHTS, Model
from merge.write import MODEL, check_inputs, partial_of, publish, take_lock, writing

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
    modules: Modules,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    drop: bool = False,
    threads: int = 1,
    run: Run,
) -> Report:
    """Writes the folder `out`: config, tensors and a card with every layer's error; whole or not at all.
    Killed, the same call goes on after the last layer that was finished.

    deltas: by tensor name. modules: of the base. rank: of every layer, at most. energy: share of the squared
    norm of a difference that is kept with the least rank. Known factors are kept as they are where neither
    asks for less. drop: leaves out what PEFT cannot hold, which is a PlanError otherwise.
    """
    contents = sort_out(deltas, base, modules, run.progress)
    _check(contents, out, drop)

    def factors(name: str) -> Factors:
        return _factors(deltas[name], rank, energy, random_key(name), threads)

    lock = take_lock(out)
    try:
        report = _grown(contents, deltas, factors, out, run)
        texts = {ADAPTER: json.dumps(_config(contents, report, base), indent=2) + "\n"}
        _write_texts(out, texts | {CARD: _card(report, base)})
        _write_texts(out, run.beside(report))
        check_inputs(run.inputs)
        publish(out)
    finally:
        os.close(lock)
    return report


def _write_texts(out: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        file = partial_of(out) / MODEL / name
        with writing(file):
            file.write_text(text, encoding="utf-8")


def _grown(
    contents: Contents,
    deltas: Mapping[str, Delta],
    factors: Callable[[str], Factors],
    out: Path,
    run: Run,
) -> Report:
    """Layer by layer, then what is kept whole; a line of the journal tells of each."""
    adapted: list[Adapted] = []
    with Journal(partial_of(out), ADAPTER_WEIGHTS, list(_names(contents)), run) as journal:
        for module, name in contents.layers.items():
            if known := journal.known(module):
                adapted.append(Adapted(**known["layer"]))
            else:
                found = factors(name)
                shape, norm = deltas[name].shape, contents.norms[name]
                adapted.append(Adapted(module, shape, found.rank, norm, found.error))
                parts = _parts(module, found, contents.modules.linear[module])
                journal.add(module, {"layer": asdict(adapted[-1])}, parts)
            run.progress(deltas[name].nbytes)
        for key, name in contents.whole.items():
            if not journal.known(key):
                delta = deltas[name]
                journal.add(key, {}, {PREFIX + key: (delta.dtype, delta.shape, _stored(delta))})
    dropped = {name: contents.norms[name] for name in contents.impossible}
    return Report(out, tuple(adapted), tuple(contents.whole), dropped, contents.rows)


def _check(contents: Contents, out: Path, drop: bool) -> None:
    """Raises PlanError where there is nothing to write, or no way to write all of it."""
    if contents.impossible and not drop:
        raise PlanError(
            f"{out}: PEFT cannot hold the changes of {', '.join(contents.impossible[:3])} "
            f"({len(contents.impossible)} in all); write a whole model, or leave them out with "
            "adapter: {drop: true}"
        )
    if not contents.layers:
        raise PlanError(f"{out}: no linear layer changed, and PEFT loads no adapter without one")


def _names(contents: Contents) -> Iterator[str]:
    yield from (PREFIX + key for key in contents.whole)
    yield from (f"{PREFIX}{m}.lora_{part}.weight" for m in contents.layers for part in "AB")


def _factors(
    delta: Delta, rank: int | None, energy: float | None, key: int, threads: int
) -> Factors:
    if delta.known:
        return factors_of_product(delta.known.load(), rank=rank, energy=energy)
    assert delta.read is not None
    shape = rows_and_cols(delta.shape)
    return factors_of_rows(delta.read, shape, rank=rank, energy=energy, key=key, threads=threads)


def _parts(module: str, found: Factors, transposed: bool) -> dict[str, Tensor]:
    """The factors as PEFT stores them, A [rank, in] and B [out, rank], also where the layer is [in, out]."""
    a, b = (found.b.T, found.a.T) if transposed else (found.a, found.b)
    return {
        f"{PREFIX}{module}.lora_{part}.weight": ("F32", values.shape, [values])
        for part, values in (("A", a), ("B", b))
    }


def _stored(delta: Delta) -> Iterator[Raw]:
    for first, end in delta.blocks():
        yield from_float32(delta.tuned(first, end), delta.dtype)


def _config(contents: Contents, report: Report, base: Model) -> dict[str, Any]:
    """adapter_config.json: the scale of every layer is 1, since alpha is its rank."""
    ranks = {layer.module: layer.rank for layer in report.adapted}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    kinds = base.config.get("architectures") or [""]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if str(kinds[0]).endswith(CAUSAL) else None,
        "base_model_name_or_path": base.public_name,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
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
        "The error of a module is the norm of what its factors miss over the norm of what the merge "
        f"changed; of all together {report.error:.4f}.\n\n"
        f"| module | shape | rank | error |\n|---|---|---|---|\n{table}\n"
    )
