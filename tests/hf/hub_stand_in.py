"""A server on loopback that speaks as much of the Hub's protocol as an upload needs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_right"
READ_TOKEN = "hf_read"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    # Large files, by their hash.
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    # Servers that are not the Hub may know no private repositories.
    keeps_private: bool = True
    # A path that ends in an error.
    broken: str | None = None


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Serves until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        body = self._body()
        hub.asked.append(f"{self.command} {path}")
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if hub.broken is not None and hub.broken in path:
            self._send(503 if "lfs" in path else 403, {"error": "out of order"})
        elif path.startswith("/put/"):
            # Uploads of large files are signed by their address.
            assert hashlib.sha256(body).hexdigest() == path[5:]
            hub.objects[path[5:]] = body
            self._send(200, {})
        elif token not in (TOKEN, READ_TOKEN):
            self._send(401, {"error": "Invalid username or password."})
        elif path == "/api/whoami-v2":
            role = "read" if token == READ_TOKEN else "write"
            access = {"accessToken": {"role": role}}
            self._send(200, {"name": "somebody", "orgs": [{"name": "my-lab"}], "auth": access})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        else:
            self._of_a_repository(path, body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": name})
            return
        self.hub.repositories[name] = Repository(
            self.hub.keeps_private and asked.get("visibility") == "private"
        )
        self._send(200, {"url": f"{self.hub.url}/{name}"})

    def _of_a_repository(self, path: str, body: bytes) -> None:
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.hub.url}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})
            return
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif not rest or rest[0] == "revision":
            files = [{"rfilename": file} for file in repository.files]
            self._send(
                200,
                {
                    "id": f"{owner}/{name}",
                    "private": repository.private,
                    "siblings": files,
                    "sha": "0" * 40,
                },
            )
        elif rest[0] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        elif rest[0] == "commit":
            self._commit(repository, body)
        elif rest[0] == "tree":
            self._send_list([])
        else:
            self._send(404, {"error": f"the stand-in knows no {path}"})

    def _commit(self, repository: Repository, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                raise AssertionError(line["key"])
        self._send(200, {"commitUrl": f"{self.hub.url}/a/b/commit/1", "commitOid": "1" * 40})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _send_list(self, value: list[Any]) -> None:
        self._send(200, value)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
