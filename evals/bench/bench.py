"""`python evals/bench/bench.py ...`: the same as `python -m evals.bench ...`, from any folder."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    runpy.run_module("evals.bench", run_name="__main__", alter_sys=True)
