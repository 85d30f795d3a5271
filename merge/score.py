"""How good a checkpoint is: lm-evaluation-harness on a suite of tasks, models side by side."""

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from merge.errors import RequestError, ScoreError
from merge.experts.trust import may_run_code
from merge.shipped import shipped

TINY = 64 << 20  # bytes of weights
FLOAT32_LIMIT = 8 << 30  # bytes of weights up to which a CPU scores in float32, its fastest type


@dataclass(frozen=True)
class Task:
    """One lm-eval task of a suite and the metric of it that counts, as lm-eval names it."""

    name: str
    metric: str
    higher_is_better: bool


@dataclass(frozen=True)
class Suite:
    """Tasks that are scored together. `folder` holds suite.yaml and the task files."""

    name: str
    folder: Path
    tasks: tuple[Task, ...]
    batch_size: int

    @classmethod
    def named(cls, name: str, *, split: str = "heldout") -> "Suite":
        """A shipped suite, or one in a folder; split "search" takes its search_tasks."""
        own = (Path(name) / "suite.yaml").is_file() or len(Path(name).parts) > 1
        folder = Path(name) if own else shipped("evals/suites") / name
        file = folder / "suite.yaml"
        if not file.is_file():
            known = ", ".join(
                sorted(p.parent.name for p in shipped("evals/suites").glob("*/suite.yaml"))
            )
            raise RequestError(
                f"no suite {name!r}: neither a folder with suite.yaml nor one of {known}"
            )
        key = "tasks" if split == "heldout" else "search_tasks"
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
            tasks = [
                Task(t["task"], t["metric"], bool(t.get("higher_is_better", True)))
                for t in data.get(key, [])
            ]
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise RequestError(
                f"{file}: is no suite ({type(error).__name__}: {error}); it needs name and tasks "
                "with task and metric"
            ) from None
        if not tasks:
            raise RequestError(f"{file}: lists no {key}")
        return cls(
            str(data.get("name", folder.name)), folder, tuple(tasks), int(data.get("batch_size", 1))
        )


@dataclass(frozen=True)
class Score:
    """A metric's value and its standard error, as fractions; documents scored."""

    value: float
    stderr: float
    documents: int


@dataclass(frozen=True)
class ModelScores:
    label: str
    tasks: Mapping[str, Score]

    @property
    def mean(self) -> float:
        return math.fsum(s.value for s in self.tasks.values()) / len(self.tasks)

    @property
    def mean_stderr(self) -> float:
        """Standard error of the mean over tasks, which are independent."""
        return math.sqrt(math.fsum(s.stderr**2 for s in self.tasks.values())) / len(self.tasks)


@dataclass(frozen=True)
class Scores:
    suite: Suite
    models: tuple[ModelScores, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite.name,
            "tasks": [asdict(task) for task in self.suite.tasks],
            "models": [
                {
                    "model": m.label,
                    "mean": m.mean,
                    "mean_stderr": m.mean_stderr,
                    "tasks": {name: asdict(score) for name, score in m.tasks.items()},
                }
                for m in self.models
            ],
        }


def score_models(
    folders: Sequence[Path],
    suite: Suite,
    *,
    labels: Sequence[str],
    limit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Scores of the models in `folders` on `suite`, each loaded once. limit: documents per task.

    Raises RequestError where lm-eval is not installed, ScoreError where a model cannot be scored.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with quiet_libraries(), few_threads(max(map(_weight_bytes, folders))):
        harness = task_manager(suite)
        scored = []
        for folder, label in zip(folders, labels, strict=True):
            scored.append(_scored_model(folder, label, suite, harness, limit, progress))
    return Scores(suite, tuple(scored))


def _scored_model(
    folder: Path,
    label: str,
    suite: Suite,
    harness: Any,
    limit: int | None,
    progress: Callable[[int], None],
) -> ModelScores:
    """Loads, scores and lets go of one model."""
    model = _load(folder, label, suite.batch_size)
    return ModelScores(label, dict(_scored(model, label, suite, harness, limit, progress)))


def _scored(
    model: Any,
    label: str,
    suite: Suite,
    harness: Any,
    limit: int | None,
    progress: Callable[[int], None],
) -> Iterator[tuple[str, Score]]:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import get_task_dict

    for task in suite.tasks:
        found = evaluate(lm=model, task_dict=get_task_dict([task.name], harness), limit=limit)
        results = found["results"][task.name]
        name, _, filtered = task.metric.partition(",")
        value = results.get(task.metric)
        stderr = results.get(f"{name}_stderr,{filtered or 'none'}")
        if value is None or not math.isfinite(value):
            have = ", ".join(k for k in results if "," in k and "_stderr" not in k)
            raise ScoreError(
                f"{label}: task {task.name} gave {value} for {task.metric}; it has {have}"
            )
        known = stderr if isinstance(stderr, float | int) else math.nan
        yield (
            task.name,
            Score(float(value), float(known), int(found["n-samples"][task.name]["effective"])),
        )
        progress(1)


def check_installed() -> None:
    """Raises RequestError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise RequestError("scoring needs lm-eval; install mergetool[eval]")


def task_manager(suite: Suite) -> Any:
    check_installed()
    from lm_eval.tasks import TaskManager

    brings_tasks = len(list(suite.folder.glob("*.yaml"))) > 1
    return TaskManager(include_path=str(suite.folder), include_defaults=not brings_tasks)


def _load(folder: Path, label: str, batch_size: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype, device = scoring_dtype(_weight_bytes(folder))
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise ScoreError(f"{label}: has no tokenizer files; scoring needs them")
    remote = may_run_code(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=remote
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ScoreError(f"{label}: cannot be loaded for scoring: {first}") from None
    model.to(device).eval()
    check_logits(model, tokenizer, label)
    return lm_of(model, tokenizer, batch_size)


def scoring_dtype(size: int = 0) -> tuple[Any, str]:
    """(dtype, device) in which a model of so many bytes is scored: float32 on a CPU where it fits."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.float32 if device == "cpu" and size <= FLOAT32_LIMIT else "auto", device


def lm_of(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's view of a live model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def check_logits(model: Any, tokenizer: Any, label: str) -> None:
    """Weights with NaN would score as if nothing were wrong; one forward pass shows them."""
    import torch

    ids = tokenizer("The 1 and only", return_tensors="pt").input_ids.to(model.device)
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


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps warnings and bars of the libraries from between the lines of the command."""
    names = ("lm_eval", "lm-eval", "transformers", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def table(scores: Scores) -> str:
    """Models as rows, tasks as columns, per cent with standard errors; the best mean is marked."""
    prefix = f"{scores.suite.name}_"
    heads = ["model", *(t.name.removeprefix(prefix) for t in scores.suite.tasks), "mean"]
    best = max(m.mean for m in scores.models)
    rows = [
        [m.label, *(_cell(m.tasks[t.name].value, m.tasks[t.name].stderr) for t in scores.suite.tasks),
         _cell(m.mean, m.mean_stderr) + (" *" if m.mean == best and len(scores.models) > 1 else "")]
        for m in scores.models
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    documents = min(s.documents for m in scores.models for s in m.tasks.values())
    lines = [_aligned(heads, widths), _aligned(["-" * w for w in widths], widths)]
    lines += [_aligned(row, widths) for row in rows]
    return "\n".join(
        [
            *lines,
            f"suite {scores.suite.name}: per cent and standard error, {documents} documents a task",
        ]
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(w) if i == 0 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def _cell(value: float, stderr: float) -> str:
    return (
        f"{100 * value:.1f} ± {100 * stderr:.1f}" if math.isfinite(stderr) else f"{100 * value:.1f}"
    )
