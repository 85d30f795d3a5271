"""The documents of this suite, found beside this file.

lm-eval resolves `data_files` against the working directory; `custom_dataset` is a function of the
task and has no such limit, so the tasks run from anywhere and from any copy of the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

FOLDER = Path(__file__).resolve().parent / "data"


def load(skill: str, split: str, **_: Any) -> DatasetDict:
    """One split of one skill, columns `prompt` and `answer`; lm-eval adds metadata arguments."""
    lines = (FOLDER / f"{skill}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return DatasetDict({split: Dataset.from_list([json.loads(line) for line in lines])})
