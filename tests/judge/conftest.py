"""A real server: transformers serve, with models whose replies are known."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from judges import FIRST, GRADE, HUM, SECOND, Served, judge_in, template_of


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("transformers serve needs fastapi, uvicorn and openai")
    place = tmp_path_factory.mktemp("served")
    asked_again = "{{ '>' if 'could not read' in last else '<' }}"
    # which of two conversations holds the right answer decides; neither or both are no verdict
    better = (
        "{% set a, b = messages[1]['content'].split('Conversation with B:')[:2] %}"
        "{{ '[' if 'XII' in a and 'XII' not in b else ']' if 'XII' in b and 'XII' not in a else '<' }}"
    )
    judges = {
        "seven": judge_in(place / "seven", {">": GRADE}, template_of(">")),
        "slow": judge_in(place / "slow", {">": GRADE, "<": HUM}, template_of(asked_again)),
        "mumbler": judge_in(place / "mumbler", {"<": HUM}, template_of("<")),
        "first": judge_in(place / "first", {"[": FIRST}, template_of("[")),
        "fair": judge_in(place / "fair", {"[": FIRST, "]": SECOND, "<": HUM}, template_of(better)),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = place / "log"
    line = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    line += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "info"]
    with log.open("w") as file:
        server = subprocess.Popen(
            line, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield Served(f"http://127.0.0.1:{port}/v1", {k: str(v) for k, v in judges.items()}, log)
    finally:
        server.kill()
        server.wait()


def _wait(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())
