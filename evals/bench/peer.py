"""mergekit in a virtual environment of its own, made by the benchmark on its first run."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .measure import BenchError

PACKAGES = ("mergekit==0.1.5", "torch==2.13.0")
FLAGS = ("--lazy-unpickle",)  # as its README shows it; everything else as it comes
VERSIONS = """
import json
from importlib.metadata import version
print(json.dumps({name: version(name) for name in ("mergekit", "torch", "numpy", "transformers")}))
"""


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mergetool-bench" / PACKAGES[0].replace("==", "-")


def prepare_peer(folder: Path) -> dict[str, str]:
    """The versions in the environment at `folder`, made where there is none; raises BenchError.

    pip's own settings count: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes it
    fetch torch without its gigabytes for graphics cards.
    """
    if not command(folder).is_file():
        print(f"installing {' '.join(PACKAGES)} in {folder}", file=sys.stderr)
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES])
    versions: dict[str, str] = json.loads(_run([str(folder / "bin" / "python"), "-c", VERSIONS]))
    wanted = PACKAGES[0].partition("==")[2]
    if versions["mergekit"] != wanted:
        raise BenchError(f"{folder}: has mergekit {versions['mergekit']}, not {wanted}")
    return versions


def command(folder: Path) -> Path:
    return folder / "bin" / "mergekit-yaml"


def peer_environment() -> dict[str, str]:
    """Without ways to this checkout's packages, and without a look at the hub."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return kept | {"HF_HUB_OFFLINE": "1"}


def _run(arguments: list[str]) -> str:
    done = subprocess.run(
        arguments, env=peer_environment() | {"HF_HUB_OFFLINE": "0"}, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise BenchError(f"{' '.join(arguments[:4])} ... failed: {''.join(last)}")
    return done.stdout
