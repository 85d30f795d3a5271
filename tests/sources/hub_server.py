"""A hub on this machine: enough of its protocol for huggingface_hub to fetch models from folders.

As on the real hub, weights are redirected to a second server, which must not be sent the token.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
LARGE = (".safetensors", ".bin")  # kept in the store


@dataclass(frozen=True)
class Request:
    """A request as it was answered; `sent` counts the bytes of the answer's body."""

    server: str
    method: str
    path: str
    range: str | None
    token: bool
    sent: int


@dataclass
class Faults:
    """What goes wrong with files, name -> how many times more. `held` is set when one stands."""

    cut: dict[str, int] = field(default_factory=dict)
    short: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    no_ranges: bool = False
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """Serves `repositories`: "owner/name" -> revision -> folder, until the `with` ends.

    gated and private: repositories that only TOKEN opens.
    """

    def __init__(
        self,
        repositories: dict[str, dict[str, Path]],
        gated: tuple[str, ...] = (),
        private: tuple[str, ...] = (),
    ) -> None:
        self.repositories, self.gated, self.private = repositories, gated, private
        self.requests: list[Request] = []
        self.faults = Faults()
        self._hub, self._store = (self._server(name) for name in ("hub", "store"))
        self.url = f"http://127.0.0.1:{self._hub.server_port}"
        self.store_url = f"http://127.0.0.1:{self._store.server_port}"

    def _server(self, name: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "name": name})
        return ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> "HubServer":
        for server in (self._hub, self._store):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.faults.release.set()
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    def sent(self, ending: str = "") -> int:
        """Body bytes sent of files whose name ends so."""
        return sum(r.sent for r in self.requests if r.path.endswith(ending))

    def folder(self, repo: str, revision: str) -> Path | None:
        revisions = self.repositories[repo]
        by_commit = {commit_of(folder): folder for folder in revisions.values()}
        return revisions.get(revision) or by_commit.get(revision)


def commit_of(folder: Path) -> str:
    """The commit that the server says a folder is."""
    digest = hashlib.sha1()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(folder)}\n".encode() + _etag(file).encode())
    return digest.hexdigest()


@cache
def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    name: str

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.name == "store":
            self._send_file(self._known(parts[0], parts[1], parts[2]) / parts[3])
        elif parts[:2] == ["api", "models"]:
            self._api(f"{parts[2]}/{parts[3]}", *parts[4:6])
        else:
            self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))

    def _known(self, owner: str, name: str, commit: str) -> Path:
        folder = self.hub.folder(f"{owner}/{name}", commit)
        assert folder is not None, "the store is only asked for what the hub redirected"
        return folder

    def _api(self, repo: str, what: str = "revision", revision: str = "main") -> None:
        folder = self._opened(repo, revision)
        if folder is None:
            return
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if what == "tree":
            self._json([self._entry(folder, name) for name in names])
        else:
            siblings = [{"rfilename": name} for name in names]
            self._json({"id": repo, "sha": commit_of(folder), "siblings": siblings})

    def _entry(self, folder: Path, name: str) -> dict[str, Any]:
        file = folder / name
        size, etag = file.stat().st_size, _etag(file)
        entry = {"type": "file", "path": name, "size": size, "oid": etag[:40]}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
        return entry

    def _opened(self, repo: str, revision: str) -> Path | None:
        """The folder of a repository's revision; None once the refusal is answered."""
        if repo not in self.hub.repositories or (repo in self.hub.private and not self._token()):
            self._refuse(401, "RepoNotFound")
            return None
        folder = self.hub.folder(repo, revision)
        if folder is None:
            self._refuse(404, "RevisionNotFound")
        return folder

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        folder = self._opened(repo, revision)
        if folder is None:
            return
        if repo in self.hub.gated and not self._token():
            self._refuse(403 if self.headers["Authorization"] else 401, "GatedRepo")
        elif not (folder / name).is_file():
            self._refuse(404, "EntryNotFound")
        elif name.endswith(LARGE):
            file, commit = folder / name, commit_of(folder)
            headers = {
                "Location": f"{self.hub.store_url}/{repo}/{commit}/{name}",
                "X-Linked-Etag": f'"{_etag(file)}"',
                "X-Linked-Size": str(file.stat().st_size),
                "X-Repo-Commit": commit,
            }
            self._send(302, headers, b"")
        else:
            self._send_file(folder / name, {"X-Repo-Commit": commit_of(folder)})

    def _token(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def _send_file(self, file: Path, headers: dict[str, str] | None = None) -> None:
        data, faults = file.read_bytes(), self.hub.faults
        out = {"ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes"} | (headers or {})
        wanted = None if faults.no_ranges else self.headers["Range"]
        if not wanted:
            self._send(200, out, data, file.name)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data)) + 1, len(data))
        if start >= end:
            self._send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            return
        out["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self._send(206, out, data[start:end], file.name)

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes, file: str = "") -> None:
        get, faults = self.command == "GET", self.hub.faults
        cut, stall = get and _takes(faults.cut, file), get and _takes(faults.stall, file)
        if get and _takes(faults.short, file):
            body = body[: len(body) // 2]
        sent = body[: len(body) // 2] if cut or stall else body if get else b""
        self._record(len(sent))
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(sent)
        except OSError:  # the client has enough
            self.close_connection = True
        if stall:
            faults.held.set()
            faults.release.wait()
        if cut or stall:
            self.close_connection = True

    def _record(self, sent: int) -> None:
        token = self.headers["Authorization"] is not None
        path = urlsplit(self.path).path
        asked = self.headers["Range"]
        self.hub.requests.append(Request(self.name, self.command, path, asked, token, sent))


def _takes(left: dict[str, int], file: str) -> bool:
    """Whether a fault is due for this file; counts it down."""
    if left.get(file, 0) == 0:
        return False
    left[file] -= 1
    return True
