"""A suite of few documents: the shipped one's tasks, so that a whole search takes seconds."""

import random
import shutil
from pathlib import Path

from merge.shipped import shipped


def tiny_suite(folder: Path, searched: int = 12, kept: int = 6) -> Path:
    """The shipped suite in a new folder with so many documents of each task."""
    shutil.copytree(shipped("evals/suites/quickstart"), folder)
    for file in (folder / "data").glob("*.jsonl"):
        most = searched if ".search." in file.name else kept
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        drawn = sorted(random.Random(0).sample(range(len(lines)), most))
        file.write_text("".join(lines[i] for i in drawn), encoding="utf-8")
    return folder
