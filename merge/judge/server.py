"""A model behind an OpenAI-compatible server, asked by plain HTTP."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from socket import create_connection
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urlsplit
from urllib.request import (
    HTTPRedirectHandler,
    ProxyHandler,
    Request,
    build_opener,
    getproxies,
    proxy_bypass,
)

from merge.errors import RequestError, ScoreError
from merge.printing import printable

Messages = Sequence[Mapping[str, str]]
KEYS = ("MERGETOOL_JUDGE_KEY", "OPENAI_API_KEY")  # of the environment; the first one counts
LOCAL = ("localhost", "127.0.0.1", "::1")
BUSY = {408, 409, 425, 429, *range(500, 600)}  # answers after which it is worth while to ask again
NOT_WHOLE = {"length", "content_filter"}  # why a reply ended, where more was to come
TRIES = 5
LONGEST_WAIT = 60.0  # seconds between two tries


@dataclass(frozen=True)
class Reply:
    """`text`: what the server says. `ended`: why it ended, as the server calls that; may be empty."""

    text: str
    ended: str

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it was cut off or taken out."""
        return self.ended not in NOT_WHOLE


@dataclass(frozen=True)
class Server:
    """`url`: as far as /v1. `model`: how the server names it. `max_tokens`: of a reply. `timeout`: in s."""

    url: str
    model: str
    max_tokens: int = 1024
    timeout: float = 300.0
    key: str = field(default="", repr=False)

    @classmethod
    def at(cls, url: str, model: str, *, max_tokens: int = 1024) -> "Server":
        """The server, with the key of the environment; raises RequestError where the address is none, or the
        key."""
        parts = _parts(url)
        found = _key()
        safe = parts.scheme == "https" or parts.hostname in LOCAL
        if found and not safe:
            raise RequestError(
                f"--judge-url {url}: a key would be sent unencrypted; take https, or unset "
                f"{' and '.join(KEYS)}"
            )
        return cls(url.rstrip("/"), model, max_tokens, key=found)

    def check(self) -> None:
        """Raises RequestError where nobody listens at the address, unless only a proxy can tell."""
        parts = urlsplit(self.url)
        if _by_proxy(parts):
            return
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            create_connection((parts.hostname or "", port), timeout=10).close()
        except (OSError, UnicodeError) as error:  # of a name that no host can have
            raise RequestError(f"--judge-url {self.url}: nobody answers there ({error})") from None

    def body(self, messages: Messages) -> dict[str, Any]:
        """What is sent, which asks for the likeliest reply."""
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def ask(self, messages: Messages) -> Reply:
        """The reply; raises ScoreError where there is none after several tries."""
        reply = self._posted(json.dumps(self.body(messages)).encode())
        try:
            said = reply["choices"][0]
            return Reply(
                str(said["message"]["content"] or ""), str(said.get("finish_reason") or "")
            )
        except (AttributeError, KeyError, IndexError, TypeError):
            told = self._shown(json.dumps(reply))
            raise ScoreError(f"{self.url}: the reply is no chat completion: {told}") from None

    def _posted(self, body: bytes) -> Any:
        for tried in range(1, TRIES + 1):
            try:
                return self._sent(body)
            except HTTPError as error:
                what = f"answers {error.code}: {self._told(error)}"
                if error.code not in BUSY:
                    raise ScoreError(f"{self.url}: {what}") from None
                wait = _asked_to_wait(error.headers.get("Retry-After"))
            except (OSError, URLError, HTTPException, ValueError) as error:
                what, wait = f"cannot be asked: {self._shown(str(error))}", None
            if tried < TRIES:
                time.sleep(min(LONGEST_WAIT, wait if wait is not None else 2.0**tried / 2))
        raise ScoreError(f"{self.url}: {what} ({TRIES} times); the same command goes on from here")

    def _sent(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = Request(f"{self.url}/chat/completions", body, headers, method="POST")
        # a proxy would be told the key of a server of this machine
        around = [ProxyHandler({})] if urlsplit(self.url).hostname in LOCAL else []
        with build_opener(_Stay, *around).open(request, timeout=self.timeout) as response:
            return json.loads(response.read())

    def _told(self, error: HTTPError) -> str:
        try:
            with error:
                text = error.read(2000).decode("utf-8", "replace")
        except (OSError, HTTPException):
            text = ""
        return self._shown(text) or self._shown(str(error.reason))

    def _shown(self, text: str) -> str:
        """In one line, without the key, which some servers repeat; cut off last: half of it is too much."""
        told = " ".join(text.split())
        return printable((told.replace(self.key, "***") if self.key else told)[:200])


def _key() -> str:
    """That of the environment; raises RequestError where it could not be sent, and so would be told."""
    for name in KEYS:
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise RequestError(
                f"{name}: holds what no key does, such as an end of line; set it anew"
            )
        if key:
            return key
    return ""


def _by_proxy(parts: SplitResult) -> bool:
    """Whether the way there leads through a proxy, by the environment."""
    host = parts.hostname or ""
    return host not in LOCAL and parts.scheme in getproxies() and not proxy_bypass(host)


def _parts(url: str) -> SplitResult:
    """Those of an address; the error does not repeat it, as it may hold a password."""
    try:
        parts = urlsplit(url)
        named = parts.hostname and parts.port != 0  # a port that is none is a ValueError
        more = "@" in parts.netloc or parts.query or parts.fragment
        sound = parts.scheme in ("http", "https") and named and not more
    except ValueError:
        sound = False
    if not sound:
        raise RequestError(
            "--judge-url: must be http://HOST/v1 or https://HOST:PORT/v1, with nothing before HOST or after "
            f"/v1; a key belongs into {KEYS[0]}"
        )
    return parts


class _Stay(HTTPRedirectHandler):
    """Follows nobody: the key would go along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _asked_to_wait(text: str | None) -> float | None:
    """Seconds, where the server says so in numbers."""
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return None
