"""Work in a process of its own: for its memory, and so that no code of the current folder runs."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SHOWN = 500  # characters of a reason


def run_apart(
    module: str,
    *arguments: str,
    told: str = "",
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> "subprocess.CompletedProcess[str]":
    """`python -m module arguments` with `told` on its stdin, and what it printed; it finds no hub. Raises
    subprocess.TimeoutExpired."""
    # -P: a torch.py in the current folder is not what is meant
    command = [sys.executable, "-P", "-m", module, *arguments]
    own = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment or {})
    return subprocess.run(
        command, input=told, capture_output=True, text=True, env=own, timeout=seconds, check=False
    )


def reason_of(done: "subprocess.CompletedProcess[str]") -> str:
    """Why a process failed, in one line."""
    if done.returncode < 0:
        return f"it was ended by signal {-done.returncode}; is the memory full?"
    return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:SHOWN]


def answer_of(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line that a process printed."""
    return done.stdout.splitlines()[-1]


def available_memory() -> int:
    """Bytes that a process can still have by what the system says; where it says nothing, any number."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(
            int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration, ValueError):
        return sys.maxsize
