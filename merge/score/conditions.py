"""Under which conditions models are scored."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Conditions:
    """`limit`: documents of each task. `num_fewshot`: solved examples before each document, instead of
    what suite and task say; a task that says 0 keeps it. `chat_template`: prompts are put as chats.
    `batch_size`: a number or "auto"; None is the suite's. `device`: as torch names it; None is a GPU where
    there is one. `trusted`: code in model folders may run. `memory`, `threads`: for merging adapters in."""

    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    batch_size: int | str | None = None
    backend: Literal["hf", "vllm"] = "hf"
    device: str | None = None
    trusted: bool = False
    memory: str = "512MiB"
    threads: int | None = None
