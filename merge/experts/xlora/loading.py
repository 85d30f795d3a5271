"""Whether PEFT finds every tensor of a mixture of adapters in its place: it is loaded, in another process.

PEFT says nothing of a tensor that it does not find: a router would stay random, an adapter without effect.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge.apart import answer_of, available_memory, reason_of, run_apart
from merge.errors import VerifyError
from merge.sources.lora import PREFIX
from merge.sources.model import ADAPTER_WEIGHTS, Model

SECONDS = 3600  # for loading the base and one forward pass
BESIDE = 2 << 30  # bytes: torch, transformers and PEFT, the adapters, one forward pass
TOKENS = 8
ROUTER = "internal_xlora_classifier"


def check_loading(folder: Path, base: Model) -> dict[str, Any]:
    """{"loads_as": what PEFT makes of the mixture in `folder`}, or why that was not tried.

    The base is loaded as a whole, but not by this process. Raises VerifyError.
    """
    if find_spec("peft") is None:
        return {"loads_as": "not tried, PEFT is not installed"}
    needed = BESIDE + sum(info.nbytes for info in base.source.tensors.values())
    if needed > available_memory():
        return {"loads_as": f"not tried, that takes {needed / 2**30:.0f} GiB of memory"}
    places = (str(folder.resolve()), str(base.folder.resolve()))
    alone = {"CUDA_VISIBLE_DEVICES": ""}
    try:
        done = run_apart("merge.experts.xlora.loading", *places, environment=alone, seconds=SECONDS)
    except subprocess.TimeoutExpired:
        raise VerifyError(f"{folder}: PEFT has not loaded it in {SECONDS} seconds") from None
    if done.returncode:
        raise VerifyError(f"{folder}: PEFT does not load it: {reason_of(done)}")
    found: dict[str, Any] = json.loads(answer_of(done))
    if problem := found.get("problem"):
        raise VerifyError(f"{folder}: {problem}")
    return found


def loaded(folder: Path, base: Path) -> Any:
    """The mixture in `folder` on the model in `base`, as its card says."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, use_cache=False, local_files_only=True, trust_remote_code=False
    )
    config = PeftConfig.from_pretrained(str(folder))
    config.adapters = {n: str(folder / part) for n, part in config.adapters.items()}
    return PeftModel.from_pretrained(model, str(folder), config=config, torch_device="cpu")


def checked(folder: Path | str, base: Path | str) -> dict[str, Any]:
    """{"loads_as": text}, or {"problem": text}: a tensor that is not what its file holds, a forward pass that
    gives NaN or infinity."""
    import torch

    folder = Path(folder)
    model = loaded(folder, Path(base))
    problem = _misplaced(model, folder)
    ids = torch.arange(min(TOKENS, model.config.vocab_size)).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    given = model.base_model.get_latest_scalings()
    if not problem and not (torch.isfinite(logits).all() and torch.isfinite(given).all()):
        problem = "loaded with PEFT, it gives NaN or infinity"
    count = len(model.base_model.xlora_config.adapters)
    return {"problem": problem} if problem else {"loads_as": f"X-LoRA of {count} adapters"}


def _misplaced(model: Any, folder: Path) -> str:
    """What is wrong with the first tensor that does not stand in `model` as it is stored; empty for none."""
    from safetensors.torch import load_file

    state, dtype = model.state_dict(), next(model.base_model.lora_model.model.parameters()).dtype
    parts = {"": folder} | {n: Path(p) for n, p in model.base_model.xlora_config.adapters.items()}
    for number, part in parts.items():
        stored = load_file(part / ADAPTER_WEIGHTS)
        for name in [] if number else [n for n in state if ROUTER in n and n not in stored]:
            return f"tensor {name!r} is missing, which PEFT then draws at random"
        for name, values in stored.items():
            found = state.get(_in_memory(name, number))
            # PEFT holds the router, and may hold an adapter, in the base's dtype
            if found is None or not found.to(dtype).equal(values.to(dtype)):
                what = "has another value" if found is not None else "is not found"
                return f"tensor {name!r} of {part.name} {what} when loaded with PEFT"
    return ""


def _in_memory(name: str, number: str) -> str:
    """What PEFT calls a tensor of adapter `number`, or of the router ("")."""
    if not number:
        return name
    path = f"base_model.lora_model.model.{name.removeprefix(PREFIX)}"
    stem, dot, leaf = path.rpartition(".")
    return f"{stem}.{number}.{leaf}" if leaf == "weight" else f"{stem}{dot}{leaf}.{number}"


if __name__ == "__main__":
    print(json.dumps(checked(sys.argv[1], sys.argv[2])))
