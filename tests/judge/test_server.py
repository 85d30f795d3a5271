"""What a server may answer besides a reply: errors, waits, other addresses. The key goes nowhere else."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ran import Ran

from merge.errors import RequestError, ScoreError
from merge.judge.journal import alone
from merge.judge.server import Reply, Server
from merge.shipped import shipped

KEY = "sk-very-secret"
REPLY = {"choices": [{"message": {"role": "assistant", "content": "Grade: 5"}}]}
MESSAGES = [{"role": "user", "content": "?"}]


class Answering(ThreadingHTTPServer):
    """Answers with what is in `answers`, one after the other: (status, headers, body), while it `goes_on`."""

    answers: list[tuple[int, dict[str, str], Any]]
    seen: list[tuple[str, str | None, Any]]
    goes_on: threading.Event


class _Handler(BaseHTTPRequestHandler):
    server: Answering

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        self.server.goes_on.wait(20)
        status, headers, answer = self.server.answers.pop(0)
        content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[Answering]:
    server = Answering(("127.0.0.1", 0), _Handler)
    server.answers, server.seen, server.goes_on = [], [], threading.Event()
    server.goes_on.set()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url_of(server: Answering) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


@pytest.fixture
def asked(answering: Answering, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("MERGETOOL_JUDGE_KEY", KEY)
    return Server.at(url_of(answering) + "/", "judge", max_tokens=9)


def test_the_request_is_what_the_protocol_says(answering: Answering, asked: Server) -> None:
    answering.answers = [(200, {}, REPLY)]
    assert asked.ask(MESSAGES) == Reply("Grade: 5", "")
    body = {"model": "judge", "messages": MESSAGES, "temperature": 0, "max_tokens": 9}
    assert answering.seen == [("/v1/chat/completions", f"Bearer {KEY}", body)]


def test_a_busy_server_is_asked_again(answering: Answering, asked: Server) -> None:
    wait = {"Retry-After": "0"}
    answering.answers = [(429, wait, {}), (503, wait, {}), (529, wait, {}), (200, {}, REPLY)]
    assert asked.ask(MESSAGES).text == "Grade: 5"
    assert len(answering.seen) == 4


@pytest.mark.parametrize(
    ("ended", "whole"), [("stop", True), ("length", False), ("content_filter", False), (None, True)]
)
def test_what_was_cut_off_or_filtered_is_not_whole(
    answering: Answering, asked: Server, ended: str | None, whole: bool
) -> None:
    (choice,) = REPLY["choices"]
    answering.answers = [(200, {}, {"choices": [choice | {"finish_reason": ended}]})]
    reply = asked.ask(MESSAGES)
    assert reply.text == "Grade: 5"
    assert reply.is_whole is whole


def test_a_refusal_is_told_once_and_without_the_key(answering: Answering, asked: Server) -> None:
    answering.answers = [(401, {}, {"error": f"Incorrect API key provided: {KEY}"})]
    with pytest.raises(ScoreError, match=r"answers 401: .*provided: \*\*\*") as error:
        asked.ask(MESSAGES)
    assert len(answering.seen) == 1
    assert KEY not in str(error.value) + repr(asked)


@pytest.mark.parametrize("before", [0, 190])  # near the end of what is shown
def test_what_a_server_says_is_shown_without_the_key_and_what_moves_the_cursor(
    answering: Answering, asked: Server, before: int
) -> None:
    answering.answers = [(400, {}, "-" * before + KEY + "\x9b2J\u202e" + "-" * 300)]
    with pytest.raises(ScoreError, match=r"answers 400: .*-") as error:
        asked.ask(MESSAGES)
    assert KEY[:3] not in str(error.value)
    assert str(error.value).isprintable()


def test_the_key_does_not_follow_to_another_address(answering: Answering, asked: Server) -> None:
    answering.answers = [(302, {"Location": url_of(answering) + "/elsewhere"}, {})]
    with pytest.raises(ScoreError, match="answers 302"):
        asked.ask(MESSAGES)
    assert len(answering.seen) == 1


def test_what_is_no_completion_is_told(answering: Answering, asked: Server) -> None:
    answering.answers = [(200, {}, {"error": f"no model for {KEY}"})]
    with pytest.raises(ScoreError, match=r"no chat completion: .*no model for \*\*\*"):
        asked.ask(MESSAGES)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000", "ftp://x/v1", "http://", "http://[::1/v1", "http://x:port/v1", "http://x:99999/v1",
        "https://me:secret@x/v1", "https://:secret@x/v1", "https://secret@x/v1", "http://me:secret@/v1",
        "http://me:secret@x:port/v1", "me:secret@x/v1", "https://x/v1?key=secret", "https://x/v1#secret",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(RequestError, match="must be http://HOST/v1") as error:
        Server.at(url, "judge")
    assert "secret" not in str(error.value)


def test_a_server_that_is_not_there_is_told_before_a_model_answers(
    command: Callable[..., Ran], answering: Answering, asked: Server
) -> None:
    asked.check()
    assert not answering.seen
    url = "http://127.0.0.1:1/v1"
    ran = command("judge", "zoo:clerk", "--judge-url", url, "--judge-model", "judge")
    assert ran.code == 2
    assert f"{url}: nobody answers there" in ran.error


def test_a_folder_that_another_run_has_is_left_alone(
    command: Callable[..., Ran], answering: Answering, asked: Server, tmp_path: Path
) -> None:
    with alone(tmp_path / "kept"):
        line = ("judge", "zoo:clerk", "--judge-url", url_of(answering), "--judge-model", "judge")
        ran = command(*line, "--output", "kept")
    assert ran.code == 2
    assert re.fullmatch(rf"kept: process {os.getpid()} on .+ judges there; wait .*", ran.error)
    assert not answering.seen
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["lock"]
    with alone(tmp_path / "kept"):
        pass


def test_a_folder_in_that_of_a_model_is_refused(
    command: Callable[..., Ran], answering: Answering, asked: Server, tmp_path: Path
) -> None:
    """Its files are what the model is known by: nothing would be asked once alone."""
    shutil.copytree(shipped("evals/zoo/clerk"), tmp_path / "clerk")
    line = ("judge", "clerk", "--judge-url", url_of(answering), "--judge-model", "judge")
    ran = command(*line, "--output", "clerk/judged")
    assert ran.code == 2
    assert "--output clerk/judged: lies in the folder of clerk" in ran.error
    assert not (tmp_path / "clerk" / "judged").exists()


def test_a_key_is_not_sent_in_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGETOOL_JUDGE_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(RequestError, match="sent unencrypted") as error:
        Server.at("http://example.org/v1", "judge")
    assert KEY not in str(error.value)
    assert Server.at("https://example.org/v1", "judge").key == KEY


def test_a_key_is_taken_without_the_end_of_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGETOOL_JUDGE_KEY", " \n")
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    assert Server.at("https://example.org/v1", "judge").key == KEY


@pytest.mark.parametrize("key", ["sk-very\nsecret", "sk-very-sécret"])
def test_a_key_that_cannot_be_sent_is_told_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MERGETOOL_JUDGE_KEY", key)
    with pytest.raises(RequestError, match="MERGETOOL_JUDGE_KEY: holds") as error:
        Server.at("https://example.org/v1", "judge")
    assert "sk-" not in str(error.value)


def test_what_a_proxy_alone_reaches_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:2")
    far = Server("https://127.0.0.2:1/v1", "judge")
    monkeypatch.setenv("no_proxy", "example.org")
    far.check()
    monkeypatch.setenv("no_proxy", "127.0.0.2")
    with pytest.raises(RequestError, match="nobody answers there"):
        far.check()
    with pytest.raises(RequestError, match="nobody answers there"):
        Server("https://localhost:1/v1", "judge").check()


def test_an_interrupt_does_not_wait_for_a_server_that_hangs(
    command: Callable[..., Ran], answering: Answering, asked: Server
) -> None:
    def interrupt() -> None:
        while not answering.seen:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    answering.goes_on.clear()
    answering.answers = [(200, {}, REPLY)] * 2
    line = ("judge", "zoo:clerk", "--judge-url", url_of(answering), "--judge-model", "judge")
    line += ("--questions", "en", "--limit", "1", "--max-tokens", "4")
    others = set(threading.enumerate())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        ran = command(*line)
    finally:
        signal.signal(signal.SIGINT, before)
        hung = len(answering.answers)
        answering.goes_on.set()
    assert ran.code == 130
    assert hung == 2
    assert all(thread.daemon for thread in set(threading.enumerate()) - others)
