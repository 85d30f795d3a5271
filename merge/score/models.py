"""From what the user names to what lm-eval can ask: a folder, or adapters merged into a model in memory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import RequestError, ScoreError, SourceError
from merge.experts.checks.trust import may_run_code
from merge.printing import printable
from merge.score.conditions import Conditions
from merge.sources.model import read_json, refuse_adapters

if TYPE_CHECKING:
    from merge.plan import Plan

    Candidate = Path | Plan
else:
    Candidate = Any  # the engine is not imported to score a folder

TINY = 64 << 20  # bytes of weights
FLOAT32_LIMIT = 8 << 30  # bytes of weights up to which a CPU scores in float32, its fastest type
PROBE = "The 1 and only"
TEMPLATES = "additional_chat_templates"  # where transformers finds those that have names


def candidate(name: str, *, offline: bool = False, beside: Path = Path()) -> Candidate:
    """What `name` says: the folder of a model (a folder, zoo:NAME or a hub id, which is fetched), or the plan
    of model+adapter, which is merged in memory. Raises RequestError.

    beside: the folder that relative names start from, after the current one.
    """
    from merge.sources import hub
    from merge.sources.opening import is_adapter, locate

    try:
        folder, _ = locate(name, [beside], partial(hub.fetch, offline=offline))
    except SourceError:
        if "+" not in name:
            raise
        return _merged(name, offline, beside)
    refuse_adapters(folder)
    if is_adapter(name, [beside]):
        raise SourceError(f"{name}: is an adapter; write the model that it adapts, a plus and this")
    read_json(folder / "config.json")
    return folder


def _merged(name: str, offline: bool, beside: Path) -> "Plan":
    """The plan of a model with its adapters merged in, and nothing else done to it."""
    import yaml

    from merge.pipeline import plan_parsed
    from merge.recipe import parse_recipe

    recipe = parse_recipe(yaml.safe_dump({"model": name}), str(beside / "recipe"))
    return plan_parsed(recipe, offline=offline)


def check_candidate(found: Candidate, label: str, conditions: Conditions) -> None:
    """Raises RequestError where a model cannot be scored, as far as its files tell."""
    if conditions.backend == "vllm" and conditions.device:
        what = (
            "vLLM takes the GPUs that it finds; leave it out, or name them in CUDA_VISIBLE_DEVICES"
        )
        raise RequestError(f"--device is not for --backend vllm: {what}")
    if conditions.backend == "vllm" and find_spec("vllm") is None:
        raise RequestError(
            "--backend vllm needs vLLM, which is not installed; --backend hf does not"
        )
    if conditions.chat_template and not _has_template(found):
        raise _lacks_template(label)
    if not isinstance(found, Path):
        if conditions.backend == "vllm":
            raise RequestError(f"{label}: vLLM scores folders alone; merge the adapter first")
        return
    _runs_code(found, label, conditions.trusted)


def _has_template(found: Candidate) -> bool:
    """Whether its tokenizer has a chat template, by the files where transformers looks for one."""
    from merge.tokens.vocabulary import SETTINGS, TEMPLATE

    if isinstance(found, Path):
        files: dict[str, Path | bytes] = {file.name: file for file in found.iterdir()}
    else:
        from merge.carry import carried

        files = carried(found)
    if any(name == TEMPLATE or Path(name).parts[0] == TEMPLATES for name in files):
        return True
    told = files.get(SETTINGS, b"{}")
    settings = read_json(told) if isinstance(told, Path) else json.loads(told)
    return bool(settings.get("chat_template"))


def _lacks_template(label: str) -> RequestError:
    todo = "write one into it with a recipe (chat_template: chatml)"
    return RequestError(f"{label}: has no chat template, so it cannot be put chats; {todo}")


def _runs_code(folder: Path, label: str, trusted: bool) -> bool:
    """Whether code of the folder is to run; raises RequestError where it is needed and nobody wants it."""
    if trusted or may_run_code(folder):
        return True
    config = read_json(folder / "config.json")
    if (led := config.get("auto_map")) and not _is_known(str(config.get("model_type", ""))):
        names = ", ".join(sorted(led)) if isinstance(led, dict) else "auto_map"
        raise RequestError(
            f"{label}: brings modelling code of its own ({printable(names)[:100]}), which is not run "
            "unasked; read it, then give --trust-remote-code"
        )
    return False


def _is_known(kind: str) -> bool:
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def weight_bytes(found: Candidate) -> int:
    """Bytes of its weights."""
    if not isinstance(found, Path):
        return int(found.write_bytes)
    files = list(found.glob("*.safetensors")) or list(found.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)


def lm_eval_model(found: Candidate, label: str, conditions: Conditions, batch_size: int) -> Any:
    """The model as lm-eval asks it; raises ScoreError where it does not load or its logits are not finite."""
    size = conditions.batch_size or batch_size
    if conditions.backend == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        trusted = isinstance(found, Path) and _runs_code(found, label, conditions.trusted)
        return VLLM(pretrained=str(found), batch_size=conditions.batch_size or "auto",
                    trust_remote_code=trusted)  # fmt: skip
    return lm_of(*loaded(found, label, conditions), size)


def loaded(found: Candidate, label: str, conditions: Conditions) -> tuple[Any, Any]:
    """(model, tokenizer) as transformers runs them, ready to be asked; raises ScoreError."""
    dtype, device = scoring_dtype(weight_bytes(found), conditions.device)
    if isinstance(found, Path):
        model, tokenizer = _from_folder(found, label, dtype, conditions.trusted)
        model.to(device).eval()
    else:
        model, tokenizer = _in_memory(found, dtype, device, conditions)
    if conditions.chat_template and not tokenizer.chat_template:
        raise _lacks_template(label)
    check_logits(model, tokenizer, label)
    return model, tokenizer


def _from_folder(folder: Path, label: str, dtype: Any, trusted: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise ScoreError(f"{label}: has no tokenizer files; scoring needs them")
    remote = _runs_code(folder, label, trusted)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=remote
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted
        )
    except Exception as error:  # damaged safetensors raise one of their own, configs any
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ScoreError(f"{label}: cannot be loaded for scoring: {first}") from None
    return model, tokenizer


def _in_memory(plan: "Plan", dtype: Any, device: str, conditions: Conditions) -> tuple[Any, Any]:
    """The model that `run` would write, as it would be loaded, to the bit."""
    from merge.pipeline import budget_of
    from merge.search.live import Shells

    live = Shells(dtype, device).of(plan)
    live.become(plan, budget_of(plan, conditions.memory, conditions.threads))
    return live.model, live.tokenizer


def scoring_dtype(size: int = 0, device: str | None = None) -> tuple[Any, str]:
    """(dtype, device) in which a model of so many bytes is scored: float32 on a CPU where it fits."""
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.float32 if chosen == "cpu" and size <= FLOAT32_LIMIT else "auto", chosen


def lm_of(model: Any, tokenizer: Any, batch_size: int | str) -> Any:
    """lm-eval's view of a live model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def check_logits(model: Any, tokenizer: Any, label: str) -> None:
    """Weights with NaN would score as if nothing were wrong; one forward pass shows them."""
    import torch

    ids = tokenizer(PROBE, return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        finite = bool(torch.isfinite(model(ids).logits).all()) if ids.numel() else True
    if not finite:
        raise ScoreError(
            f"{label}: its logits are not finite; its weights are damaged (mergetool verify)"
        )


@contextmanager
def few_threads(size: int) -> Iterator[None]:
    """One thread for models of few bytes: two spend their time waiting for each other."""
    import torch

    before = torch.get_num_threads()
    if size < TINY:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
