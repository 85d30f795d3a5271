"""Writes a mixture of adapters as a folder that PEFT loads (see folder.py)."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from merge.adapters.file import GrowingFile
from merge.adapters.journal import Journal, Run, Tensor
from merge.carry import CARD, resolved, told_plan
from merge.disk import digest_of
from merge.experts.xlora.folder import EXPERTS, WEIGHT, part_of
from merge.experts.xlora.loading import check_loading
from merge.finite import check_input
from merge.numerics import Raw, grains
from merge.plan import Operand, Plan, Step
from merge.reader import Reader
from merge.sources import TensorInfo
from merge.sources.model import ADAPTER, ADAPTER_WEIGHTS, ZOO, Model
from merge.verify import PROVENANCE, file_digest, verify_adapter
from merge.write import MODEL, check_inputs, input_stamps, partial_of, publish, take_lock, writing

ROUTER = "router"  # its line of the journal


def is_adapters(plan: Plan) -> bool:
    """Whether the result of `plan` is a mixture of adapters for PEFT."""
    return bool(plan.recipe.sections.experts) and plan.recipe.sections.format == "peft"


def run_peft(
    plan: Plan,
    out: Path,
    inputs: Sequence[Mapping[str, Any]] = (),
    *,
    restart: bool = False,
    progress: Callable[[int], None] = lambda count: None,
    check: Callable[[Path, Model], Mapping[str, Any]] = check_loading,
) -> dict[str, Any]:
    """What was verified of the folder `out`, which is written whole or not at all; goes on where a run was
    cut off. Raises RunError.

    inputs: what the provenance tells of them. check(folder, base): whether PEFT loads it.
    """
    stamps, files = input_stamps(plan), _files(plan)
    folder = partial_of(out) / MODEL
    lock = take_lock(out)
    try:
        run = Run(plan.digest, stamps, progress=progress, restart=restart)
        with Journal(partial_of(out), ADAPTER_WEIGHTS, list(files[""]), run) as journal:
            for part, steps in files.items():
                _write_part(plan, journal, folder, part, steps, progress)
        _write_texts(folder, {**plan.files, CARD: _card(plan, files).encode()})
        _write_texts(folder, {PROVENANCE: _provenance(plan, folder, files, stamps, inputs)})
        verified = verify_adapter(folder)
        verified |= check(folder, plan.models[plan.donor])
        check_inputs(stamps)
        publish(out)
    finally:
        os.close(lock)
    return verified | {"folder": str(out), "experts": len(files) - 1}


def _files(plan: Plan) -> dict[str, dict[str, Step]]:
    """The tensors of each file by their names in it, the files by their folders within the whole one."""
    found: dict[str, dict[str, Step]] = {}
    for step in plan.steps:
        part, name = part_of(step)
        found.setdefault(part, {})[name] = step
    return found


def _write_part(
    plan: Plan,
    journal: Journal,
    folder: Path,
    part: str,
    steps: Mapping[str, Step],
    progress: Callable[[int], None],
) -> None:
    """The file of an adapter, or the tensors of the router, unless an earlier run has finished them."""
    known = journal.known(part or ROUTER)
    tensors = {name: _tensor(plan, step, progress) for name, step in steps.items()}
    if not part:
        if not known:
            journal.add(ROUTER, {}, tensors)
        return
    file = folder / part / ADAPTER_WEIGHTS
    if known and file.is_file() and file_digest(file) == known["digest"]:
        return
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    growing = GrowingFile(file, list(tensors), {})
    for name, (dtype, shape, parts) in tensors.items():
        growing.add(name, dtype, shape, parts)
    growing.finish()
    with writing(file):
        journal.add(part, {"digest": digest_of(file)}, {})


def _tensor(plan: Plan, step: Step, progress: Callable[[int], None]) -> Tensor:
    return step.dtype, step.shape, _rows(plan, step, progress)


def _rows(plan: Plan, step: Step, progress: Callable[[int], None]) -> Iterator[Raw]:
    """The rows of a step's tensor, grain by grain, as they are stored; raises NonFiniteError."""
    reader = Reader(plan, fuse=False)
    result = Operand(-1, step.name, TensorInfo(step.dtype, step.shape), step)
    for first, end in grains(step.shape):
        rows = reader.rows(result, first, end)
        if step.copy and not plan.recipe.sections.allow_nonfinite:
            check_input(plan, step, 0, rows, first)
        progress(2 * rows.nbytes)
        yield rows


def _write_texts(folder: Path, texts: Mapping[str, bytes]) -> None:
    for name, text in texts.items():
        file = folder / name
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text)


def _provenance(
    plan: Plan,
    folder: Path,
    files: Mapping[str, Mapping[str, Step]],
    stamps: Mapping[str, list[int]],
    inputs: Sequence[Mapping[str, Any]],
) -> bytes:
    """mergetool.json: what was put together, and the digests of inputs and files."""
    names = [
        f"{part}/{file}" if part else file for part in files for file in (ADAPTER_WEIGHTS, ADAPTER)
    ]
    data = {
        **told_plan(plan, inputs, stamps),
        "files": {name: file_digest(folder / name) for name in sorted(names)},
    }
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


# -- the card ----------------------------------------------------------------------------------------


def _card(plan: Plan, files: Mapping[str, Mapping[str, Step]]) -> str:
    """README.md: how the folder is loaded, what is in it, the recipe."""
    base = plan.models[plan.donor].public_name
    meta = {
        "library_name": "peft",
        "base_model": base,
        "tags": ["mergetool", "lora", "xlora", "mixture-of-loras"],
    }
    recipe = yaml.safe_dump_all(resolved(plan), sort_keys=False, allow_unicode=True)
    title = plan.recipe.sections.name or f"A mixture of {len(files) - 1} LoRA adapters for {base}"
    return (
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {title}\n\n"
        "Made with mergetool. PEFT (0.21) loads it as X-LoRA:\n\n"
        f"```python\n{_loading(plan.models[plan.donor])}```\n\n"
        f"{_told_routing(plan)}\n\n"
        "Every forward pass runs twice, first the base alone, which gives the shares; `generate` keeps no "
        "cache. PEFT holds the router in the base's dtype.\n\n"
        "| adapter | folder | rank | layers |\n|---|---|---|---|\n"
        + "".join(_row(plan, part, steps) for part, steps in files.items() if part)
        + f"\nRecipe, with every default filled in:\n\n```yaml\n{recipe}```\n\n"
        f"Digests of all inputs and files are in `{PROVENANCE}`; `mergetool verify` compares them.\n"
    )


def _loading(base: Model) -> str:
    """How the folder is loaded, as Python; a base of the tiny family lies in mergetool."""
    name, imported, comment = repr(base.public_name).replace("'", '"'), "", ""
    if base.label.startswith(ZOO):
        imported = "from merge.shipped import shipped  # of mergetool\n"
        name = f'shipped("evals/zoo/{base.label.removeprefix(ZOO)}")'
    elif not base.commit:
        comment = "  # its folder"
    return LOADING.format(base=name, imported=imported, comment=comment)


LOADING = """\
from os.path import join
{imported}from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

folder = "this/folder"  # of a hub repository: huggingface_hub.snapshot_download(...)
base = AutoModelForCausalLM.from_pretrained({base}, use_cache=False){comment}
config = PeftConfig.from_pretrained(folder)
# PEFT would seek the adapters from the current folder
config.adapters = {{n: join(folder, part) for n, part in config.adapters.items()}}
model = PeftModel.from_pretrained(base, folder, config=config)
"""


def _told_routing(plan: Plan) -> str:
    config = plan.config
    count = len(config["adapters"])
    if not (config["enable_softmax"] or config["enable_softmax_topk"]):
        return "Every token gets all adapters in the same fixed shares: the bias of the router."
    kept = config["top_k_lora"] or count
    over = (
        f"the {kept} with the highest scores" if config["enable_softmax_topk"] else f"all {count}"
    )
    left = (
        f", of which the {kept} largest are used"
        if config["enable_softmax"] and kept < count
        else ""
    )
    return (
        f"Every token gets the adapters in shares that are the softmax over {over}{left}; the scores are a "
        f"linear layer (`{WEIGHT}`) on the last hidden states of the base."
    )


def _row(plan: Plan, part: str, steps: Mapping[str, Step]) -> str:
    text = json.loads(plan.files[f"{part}/{ADAPTER}"])
    ranks = sorted({step.shape[0] for name, step in steps.items() if ".lora_A." in name})
    name = part.removeprefix(EXPERTS).partition("-")[2]
    return f"| {name} | `{part}` | {', '.join(map(str, ranks))} | {len(text['target_modules'])} |\n"
