"""A Hub in a thread: as much of its HTTP interface as `datasets` and `huggingface_hub` ask for."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """A data set: its commits, oldest first, each {path: content}."""

    commits: list[dict[str, bytes]]
    is_gated: bool = False

    def sha(self, number: int = -1) -> str:
        files = self.commits[number]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        for number, files in enumerate(self.commits):
            if revision == self.sha(number):
                return revision, files
        if revision != "main":
            raise _RefusedError(404, "RevisionNotFound")
        return self.sha(), self.commits[-1]


@dataclass
class Hub:
    """What is served, what was asked for, and which connections are to break."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    breaks: Counter[str] = field(default_factory=Counter)
    """How often a download of a file ends in the middle."""
    missing: set[str] = field(default_factory=set)
    """Files that are listed, and not found."""
    url: str = ""

    def environment(self, home: str) -> dict[str, str]:
        """Return what makes a new process ask this Hub."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "x"}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends; then connections are refused."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RefusedError(Exception):
    """Status, code of the Hub, and commit where there is one."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.served.requests.append(f"{self.command} {url.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            if parts[:2] == ["api", "datasets"]:
                query = {**parse_qs(url.query), **parse_qs(body)}
                self._send_json(self._answer("/".join(parts[2:4]), parts[4:], query))
            elif parts[0] == "datasets" and "resolve" in parts:
                self._send_file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
            else:
                raise _RefusedError(404, "EntryNotFound")
        except _RefusedError as error:
            self._fail(*error.args)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _repository(self, name: str) -> Repository:
        if name not in self.served.repositories:
            raise _RefusedError(401, "RepoNotFound")
        return self.served.repositories[name]

    def _answer(self, name: str, rest: list[str], query: dict[str, list[str]]) -> Any:
        kind, revision, *folder = rest or ["revision", "main"]
        sha, files = self._repository(name).at(revision)
        if kind == "revision":
            return {"id": name, "sha": sha, "private": False, "tags": []}
        if kind == "paths-info":
            return [entry for entry in _entries(files, "", True) if entry["path"] in query["paths"]]
        if kind == "tree":
            return _entries(files, "/".join(folder), "recursive" in query)
        raise _RefusedError(404, "EntryNotFound")

    def _send_file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository.is_gated:
            raise _RefusedError(403, "GatedRepo")
        sha, files = repository.at(revision)
        if path not in files or path in self.served.missing:
            raise _RefusedError(404, "EntryNotFound", sha)
        self._send_content(path, files[path], sha)

    def _send_content(self, path: str, content: bytes, sha: str) -> None:
        start, stop, status = 0, len(content), 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last) + 1 if last else stop, stop), 206
        piece = content[start:stop]
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.served.breaks[path]:
            self.served.breaks[path] -= 1
            self.wfile.write(piece[: len(piece) // 2])
            self.close_connection = True
            return
        self.wfile.write(piece)

    def _send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str, sha: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if sha:
            self.send_header("X-Repo-Commit", sha)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entries(files: dict[str, bytes], folder: str, is_recursive: bool) -> list[dict[str, Any]]:
    """Return files and folders below a folder, as /tree lists them."""
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            below = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(below.encode()).hexdigest()
            if is_recursive or depth == 1:
                found[below] = {"type": "directory", "oid": oid, "size": 0, "path": below}
        if is_recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            found[path] = {"type": "file", "oid": oid, "size": len(content), "path": path}
    return list(found.values())
