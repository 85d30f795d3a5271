"""The folder of a report: index.html, pictures, tables and report.json."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import OutputError
from merge.report.page import Cell
from merge.report.pictures import Picture
from merge.write import writing

PAGE, DATA, PICTURES = "index.html", "report.json", "pictures"
FORMULA = re.compile(r"^\s*[=+\-@]")  # what spreadsheets would run


@dataclass(frozen=True)
class Report:
    """`tables`: CSV by file name. `data`: everything, for machines."""

    page: str
    pictures: tuple[Picture, ...]
    tables: Mapping[str, str]
    data: Mapping[str, Any]

    @property
    def json(self) -> str:
        return json.dumps(_plain(self.data), indent=1, ensure_ascii=False, allow_nan=False)

    def save(self, folder: Path) -> None:
        """Writes or renews the folder, the page last; raises OutputError where something else is there."""
        check_ours(folder)
        with writing(folder):
            (folder / PICTURES).mkdir(parents=True, exist_ok=True)
            (folder / DATA).write_text(self.json + "\n", encoding="utf-8")
            for former in (folder / PICTURES).glob("*.png"):
                former.unlink()
            for picture in self.pictures:
                (folder / PICTURES / f"{picture.name}.png").write_bytes(picture.png)
            for name, text in self.tables.items():
                (folder / name).write_text(text, encoding="utf-8", newline="")
            (folder / PAGE).write_text(self.page, encoding="utf-8")


def check_ours(folder: Path) -> None:
    """Raises OutputError unless `folder` is new, empty or a report already."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        told = json.loads((folder / DATA).read_text(encoding="utf-8"))
        known = isinstance(told, dict) and told.get("kind") in ("study", "merge")
    except (OSError, ValueError):
        known = False
    if not known:
        raise OutputError(f"{folder}: is there and is no report; choose another --output")


def csv_text(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table as CSV; text that a spreadsheet would take for a formula gets a quote before it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([[_cell(value) for value in row] for row in [head, *rows]])
    return out.getvalue()


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return f"'{value}" if FORMULA.match(value) else value
    return repr(value)


def _plain(value: Any) -> Any:
    """As JSON can tell it: what is no number becomes null, keys become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
