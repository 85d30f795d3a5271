"""What a checkpoint needs beside its tensors: config, tokenizer, model card, provenance."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from merge.ancestry import ancestry
from merge.numerics import combined_digest
from merge.plan import FORMAT, Operand, Plan, told_mixture
from merge.recipe import OF_THE_LAST, OUT_DTYPES, Part, Recipe, Slice
from merge.settings import Settings
from merge.sources.model import Model
from merge.sources.safetensors import INDEX
from merge.stream import StepDigests
from merge.verify import PROVENANCE
from merge.write import index_text, layout, writing

WEIGHTS: tuple[str, ...] = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
WEIGHTS += (".safetensors.index.json", ".bin.index.json", ".tflite", ".ot", ".npz")
KEPT = (
    "dtype",
    "out_dtype",
    "include",
    "exclude",
    "compat",
    "missing_tensors",
    "extra_tensors",
    "allow_nonfinite",
    "shard_size",
)
OWN = ("readme.md", "config.json", PROVENANCE, "scores.json")
OF_THE_BASE = ("merge_method", "models")  # of the recipe that a mixture's base alone would have
CARD = "README.md"


def carry_files(plan: Plan, model: Path) -> None:
    """Copies config, tokenizer and everything else of the donor that is not weights, byte for byte."""
    with writing(model):
        for stale in _carried_names(model):
            (model / stale).unlink()
        for name, content in carried(plan).items():
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, model / name)
            else:
                (model / name).write_bytes(content)


def carried(plan: Plan) -> dict[str, Path | bytes]:
    """What goes beside the tensors: name -> the donor's file, or the text of one that is changed."""
    donor = plan.models[plan.donor].folder
    found: dict[str, Path | bytes] = {}
    for file in sorted(donor.rglob("*")):
        inside = file.relative_to(donor)
        if not file.is_file() or file.name.endswith(WEIGHTS) or str(inside).lower() in OWN:
            continue
        if any(part.startswith(".") for part in inside.parts):
            continue
        if len(inside.parts) > 1 and (donor / inside.parts[0] / "config.json").is_file():
            continue  # another model in a folder of this one
        found[str(inside)] = file
    for name, content in (plan.tokens.files if plan.tokens else {}).items():
        found.pop(name, None)
        if content is not None:
            found[name] = content
    found |= plan.files
    found["config.json"] = _config(plan, donor / "config.json")
    return found


def _config(plan: Plan, source: Path) -> Path | bytes:
    """config.json as it is, unless the plan's or the output dtype differs from it."""
    config = dict(plan.config)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    if dtype := {v: k for k, v in OUT_DTYPES.items()}.get(plan.recipe.out_dtype or ""):
        config.update(dict.fromkeys(keys, dtype))
    if config == json.loads(source.read_text(encoding="utf-8")):
        return source
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def carried_digests(plan: Plan) -> dict[str, str]:
    """Digest of everything that is carried over, by name."""
    contents = carried(plan).items()
    return {n: combined_digest([c.read_bytes() if isinstance(c, Path) else c]) for n, c in contents}


def _carried_names(model: Path) -> list[str]:
    """Files of an earlier, interrupted finish."""
    files = [f for f in model.rglob("*") if f.is_file() and f.suffix != ".safetensors"]
    return [str(file.relative_to(model)) for file in files]


def provenance(
    plan: Plan, digests: Mapping[str, StepDigests], inputs: Mapping[str, Sequence[int]]
) -> str:
    """mergetool.json: what was merged, how, by which versions, and the digest of everything but the
    card, which people edit."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "plan": plan.digest,
        "versions": versions_of(plan),
        "recipe": resolved(plan),
        "donor": plan.models[plan.donor].public_name,
        "inputs": told_inputs(plan, _read_by_steps(plan, digests)),
        "input_sizes": input_sizes(plan, inputs),
        "notes": plan.notes,
        "files": _file_digests(plan) | carried_digests(plan),
        "outputs": {
            step.name: {
                "dtype": step.dtype,
                "shape": step.shape,
                "digest": digests[step.name].output,
            }
            for step in plan.steps
        },
    }
    if plan.fillings:
        data["rows_made"] = [filling.report() for filling in plan.fillings]
    if earlier := ancestry(plan.models):
        data["ancestry"] = earlier
    data |= plan.told
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _file_digests(plan: Plan) -> dict[str, str]:
    """Digest of what lies around the tensors: the header of each weight file, and the index."""
    shards = layout(plan)
    texts = {shard.file: shard.header for shard in shards}
    if len(shards) > 1:
        texts[INDEX] = index_text(plan, shards).encode()
    return {file: combined_digest([text]) for file, text in texts.items()}


def input_sizes(plan: Plan, inputs: Mapping[str, Sequence[int]]) -> dict[str, dict[str, int]]:
    """Bytes of every weight file by model, from the stamps of all (see write.input_stamps)."""
    return {
        model.public_name: {_told(file, model): inputs[str(file)][0] for file in model.files()}
        for model in plan.models
        if not model.computed
    }


def _told(file: Path, model: Model) -> str:
    """The name of one of a model's files; of those beside its folder, with the folder that they are in."""
    return f"{file.parent.name}/{file.name}" if file in model.beside else file.name


def told_inputs(plan: Plan, digests: Iterable[tuple[Operand, str]]) -> list[dict[str, Any]]:
    """Per model its name, commit, and one digest of all tensors that the last merge read from it."""
    tensors: list[dict[str, str]] = [{} for _ in plan.models]
    for operand, digest in digests:
        tensors[operand.model][operand.tensor] = digest
    return [
        {
            "model": model.public_name,
            "commit": model.commit,
            "tensors": len(read),
            "digest": combined_digest(f"{name}={read[name]}\n".encode() for name in sorted(read)),
        }
        for model, read in zip(plan.models, tensors, strict=True)
    ]


def _read_by_steps(plan: Plan, digests: Mapping[str, StepDigests]) -> Iterator[tuple[Operand, str]]:
    for step in plan.steps:
        yield from zip(step.inputs, digests[step.name].inputs, strict=True)


def resolved(plan: Plan) -> list[dict[str, Any]]:
    """The recipe with every default filled in, as a recipe again, the merges that it merges before it; no
    path of this machine."""
    names = {model.label: model.public_name for model in plan.models}
    stages = plan.recipe.stages.items()
    named = [
        {key: value for key, value in _resolved(stage, names).items() if key not in OF_THE_LAST}
        | {"name": name}
        for name, stage in stages
    ]
    return [*named, _resolved(plan.recipe, names)]


def _resolved(recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    sections = recipe.sections
    out: dict[str, Any] = {"merge_method": recipe.method.name}
    if sections.base_model:
        out["base_model"] = names[sections.base_model]
    parts = {part.module: _part(part, recipe, names) for part in recipe.parts}
    out |= parts.pop(None, {})
    if parts:
        out["modules"] = parts
    out |= _token_sections(recipe, names)
    if recipe.mixes:
        rest = {key: value for key, value in out.items() if key not in OF_THE_BASE}
        base = {} if sections.mixture else {"base_model": names[recipe.labels[0]]}
        out = base | told_mixture(recipe, names) | rest
    out |= {key: getattr(sections, key) for key in KEPT if getattr(sections, key)}
    if sections.adapter:
        out["adapter"] = sections.adapter.model_dump(exclude_none=True)
    return out


def _token_sections(recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """The sections about tokens, models in them by their public names."""
    sections = recipe.sections
    out: dict[str, Any] = {}
    if source := sections.tokenizer_source:
        out["tokenizer_source"] = names.get(source, source)
    for key in ("tokenizer", "stop", "chat_template"):
        if section := getattr(sections, key):
            told = section.model_dump(by_alias=True, exclude_defaults=True)
            out[key] = _with_public_names(told, names)
    return out


def _with_public_names(section: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A section in which models are called by names that mean something to others, and files without path."""

    def public(value: str) -> str:
        kind, _, rest = value.partition(":")
        if kind == "file":
            return f"file:{Path(rest).name}"
        model = value.removeprefix("model:")
        fits = sorted((n for n in names if f"{model}:".startswith(f"{n}:")), key=len)
        return value.replace(fits[-1], names[fits[-1]], 1) if fits else value

    changed = dict(section)
    for key in ("source", "from", "embed", "head"):
        if isinstance(value := changed.get(key), str) and "to" not in section:
            changed[key] = public(value)
    if "models" in changed:
        changed["models"] = [public(name) for name in changed["models"]]
    if "tokens" in changed:
        tokens = changed["tokens"].items()
        changed["tokens"] = {text: _with_public_names(told, names) for text, told in tokens}
    if "unify" in changed:
        changed["unify"] = [_with_public_names(told, names) for told in changed["unify"]]
    return changed


def _part(part: Part, recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    first = part.slices[0]
    if first.layers is None:
        return {"models": _entries(first, names)} | _parameters(first.shared)
    slices = [
        {"sources": _entries(piece, names)}
        | (
            {"base_model": names[piece.base]}
            if piece.base and piece.base != recipe.sections.base_model
            else {}
        )
        | _parameters(piece.shared)
        for piece in part.slices
    ]
    return {"slices": slices}


def _entries(piece: Slice, names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"model": names[entry.model]}
        | ({"layer_range": list(entry.layers)} if entry.layers else {})
        | _parameters(entry.settings)
        for entry in piece.entries
    ]


def _parameters(settings: Settings) -> dict[str, Any]:
    values = _values(settings)
    return {"parameters": values} if values else {}


def _values(settings: Settings) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, setting in settings.items():
        shown = [
            (pattern, list(points) if len(points) > 1 else points[0])
            for pattern, points in setting.rules
        ]
        if shown[0][0] is None:
            out[name] = shown[0][1]
        else:
            out[name] = [({"filter": p} if p is not None else {}) | {"value": v} for p, v in shown]
    return out


def parents_of(plan: Plan) -> list[str]:
    """The public names of the models that are merged, the base first."""
    merged = (m for i, m in enumerate(plan.models) if i != plan.base and not m.computed)
    parents = sorted({model.public_name for model in merged}) or [plan.models[0].public_name]
    bases = [plan.models[plan.base].public_name] if plan.base is not None else []
    return list(dict.fromkeys(bases + parents))


def model_card(plan: Plan) -> str:
    """README.md with the hub's metadata: base models, that they were merged, and the recipe."""
    parents = parents_of(plan)
    meta = {
        "library_name": "transformers",
        "tags": ["mergetool", "merge"],
        "base_model": parents,
        "base_model_relation": "merge",
    }
    recipe = yaml.safe_dump_all(resolved(plan), sort_keys=False, allow_unicode=True)
    method = plan.recipe.method
    listed = "\n".join(f"- {name}" for name in parents)
    paper = f" ({method.paper})" if method.paper else ""
    count = len(parents) - (plan.base is not None)
    title = plan.recipe.sections.name or f"A merge of {max(1, count)} models"
    return (
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {title}\n\n"
        f"Made with mergetool by the method `{method.name}`{paper} from\n\n{listed}\n\n"
        f"Recipe, with every default filled in:\n\n```yaml\n{recipe}```\n\n"
        f"Digests of all inputs and outputs are in `{PROVENANCE}`; `mergetool verify` compares them.\n"
    )


def told_plan(
    plan: Plan, inputs: Sequence[Mapping[str, Any]], stamps: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """How the provenance of adapters begins: what was made of what, by which versions."""
    return {
        "format": FORMAT,
        "plan": plan.digest,
        "versions": {"mergetool": own_version(), "numpy": np.__version__},
        "recipe": resolved(plan),
        "inputs": inputs,
        "input_sizes": input_sizes(plan, stamps),
        "notes": plan.notes,
    }


def versions_of(plan: Plan) -> dict[str, str]:
    """What may decide about the bits of inputs that are computed; of mixtures, what runs the base, too."""
    found = {"mergetool": own_version(), "numpy": np.__version__}
    libraries = ("torch", "transformers") if plan.recipe.mixes else ()
    return found | {name: version(name) for name in libraries}


def own_version() -> str:
    try:
        return version("mergetool")
    except PackageNotFoundError:
        return "unknown"
