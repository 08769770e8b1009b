"""A hub of one process: what huggingface_hub asks of a hub to make a repository, commit small files and fetch them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """The repositories, ``id -> {path: bytes}``, and what was asked for.

    Attributes:
        refuse: a status with which every write is answered, where set.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.asked: list[str] = []
        self.refuse: int | None = None
        self.url = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: Any, status: int = 200) -> None:
            self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def do_HEAD(self) -> None:
            self._file()

        def do_GET(self) -> None:
            self._file()

        def _file(self) -> None:  # /user/name/resolve/revision/path
            parts = self.path.split("?")[0].strip("/").split("/")
            hub.asked.append(f"{self.command} {'/'.join(parts)}")
            if len(parts) < 5 or parts[2] != "resolve":
                return self._json({"error": "not found"}, 404)
            repo = hub.repos.get("/".join(parts[:2]))
            if repo is None:
                return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
            data = repo.get("/".join(parts[4:]))
            if data is None:
                return self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "c" * 40})
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._answer(200, data, {"ETag": etag, "X-Repo-Commit": "c" * 40})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            path = self.path.split("?")[0]
            if hub.refuse is not None:
                return self._json({"error": "you may not"}, hub.refuse)
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
                hub.repos.setdefault(name, {})
                return self._json({"url": f"{hub.url}/{name}"})
            if path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            parts = path.strip("/").split("/")  # api/models/user/name/{preupload,commit}/main
            name = "/".join(parts[2:4])
            if parts[4] == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for f in json.loads(body)["files"]
                ]
                return self._json({"files": files})
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "header":
                    hub.messages.append(item["value"]["summary"])
                elif item["key"] == "file":
                    hub.repos[name][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self._json({"commitUrl": f"{hub.url}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40})

    return Handler


@contextlib.contextmanager
def local_hub() -> Iterator[Hub]:
    """A running hub on this machine's loopback address; gone when the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
