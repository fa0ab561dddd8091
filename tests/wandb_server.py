"""A wandb server on loopback for the real wandb library: keeps runs and histories in memory."""

import gzip
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Answers what wandb-core asks, and remembers all that it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.histories: dict[str, list[dict[str, Any]]] = {}
        """The points of each run, by its id, in the order of their arrival."""
        self.received: list[str] = []
        """Every body, as text."""
        self.is_broken = False
        """Whether it answers each request with an error."""

    @property
    def environment(self) -> dict[str, str]:
        return environment_of(self.server_port)

    def handle_error(self, *_: object) -> None:
        """Clients may go away at any time."""

    def answer(self, path: str, body: str) -> dict[str, Any]:
        self.received.append(body)
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            points = self.histories[path.split("/")[-2]]
            points += map(json.loads, history.get("content", []))
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        found = re.search(r"(?:query|mutation) (\w+)", request["query"])
        data = self._data(found[1] if found else "", request.get("variables") or {})
        return {"data": data}

    def _data(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        run = str(given.get("name"))
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "team"}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._bucket(run)}}
        if name == "UpsertBucket":
            is_new = run not in self.histories
            self.histories.setdefault(run, [])
            bucket = {"id": "b", "name": run, "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if name == "CreateRunFiles":
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        return {}

    def _bucket(self, run: str) -> dict[str, Any] | None:
        if run not in self.histories:
            return None
        points = self.histories[run]
        empty = {"summaryMetrics": "{}", "config": "{}", "eventsTail": "[]", "tags": []}
        return empty | {
            "id": "b", "name": run, "historyLineCount": len(points), "eventsLineCount": 0,
            "logLineCount": 0, "historyTail": json.dumps(list(map(json.dumps, points[-1:]))),
            "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        telemetry = "/otel/" in self.path  # binary
        self._answer({} if telemetry else self.server.answer(self.path, body.decode()))

    def log_message(self, *_: object) -> None: ...

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(500 if self.server.is_broken else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def environment_of(port: int) -> dict[str, str]:
    """Return the variables by which wandb finds a server on this port."""
    return {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "a1b2c3d4" * 5}


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Serve as long as the block lasts."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def silent_server() -> Iterator[int]:
    """Accept connections and never answer; yield the port."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]
