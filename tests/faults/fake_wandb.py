"""A server that wandb can start an online run against, and that can then be broken.

It answers what wandb-core asks of one run: who is logged in, make the run, take its stream of
metrics and its files. Everything that was sent is kept, for a test to look at.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from mone_megatron.testing.ports import free_ports

Break = Literal["refuses", "answers 500", "stalls"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *of_whom: Any) -> None:
        """A client that went away is none."""


class FakeWandb:
    """The server; ``url`` goes into ``WANDB_BASE_URL``."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        # Whether a run was made, and what was said of each.
        self.made_run = False
        self.runs: list[dict[str, Any]] = []
        # Asked before each answer, with the path: how to break down now, for good.
        self.break_now: Callable[[str], Break | None] = lambda path: None
        # Bodies of all requests.
        self.received = bytearray()
        # Lines of metrics that were taken.
        self.history: list[dict[str, Any]] = []
        self.broken: Break | None = None
        self._over = threading.Event()
        self._server = _Server(("127.0.0.1", free_ports(1)[0]), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def break_down(self, kind: Break) -> None:
        """From now on."""
        if self.broken:
            return
        self.broken = kind
        if kind == "refuses":
            self._server.shutdown()
            self._server.server_close()

    def close(self) -> None:
        """Let go of everyone."""
        self._over.set()
        if self.broken != "refuses":
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """To one request, while all is well."""
        if path.endswith("/file_stream"):
            return self._take(json.loads(body))
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        query, values = asked["query"], asked.get("variables") or {}
        user = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}"}
        if "upsertBucket" in query:
            self.made_run = True
            self.runs.append(values)
            entity = {"id": "e", "name": "me"}
            project = {"id": "p", "name": values.get("project"), "entity": entity}
            run = {"id": "r", "name": values.get("name"), "displayName": values.get("displayName")}
            run |= {"config": values.get("config"), "historyLineCount": 0, "project": project}
            return {"data": {"upsertBucket": {"bucket": run, "inserted": True}}}
        if "createRunFiles" in query:
            names = values["files"]
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in names]
            made = {"runID": "r", "uploadHeaders": [], "files": files}
            return {"data": {"createRunFiles": made}}
        if "viewer" in query:
            return {"data": {"viewer": {**user, "admin": False, "teams": {"edges": []}}}}
        if "serverInfo" in query:
            return {"data": {"serverInfo": {"features": []}}}
        return {"data": {"model": {"bucket": None}, "project": None}}

    def _take(self, stream: dict[str, Any]) -> dict[str, Any]:
        for name, chunk in (stream.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                self.history += [json.loads(line) for line in chunk["content"]]
        return {"exitcode": None, "limits": {}}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fake.requests.append(f"{self.command} {self.path}")
                fake.received += body
                if not fake.broken and (kind := fake.break_now(self.path)):
                    fake.break_down(kind)
                if fake.broken == "stalls":
                    fake._over.wait()
                if fake.broken == "refuses":
                    self.close_connection = True
                    return
                status = 500 if fake.broken else 200
                answer = b"{}" if fake.broken else json.dumps(fake.answer(self.path, body)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST
            do_GET = do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler


@contextmanager
def fake_wandb() -> Iterator[FakeWandb]:
    """Until the block ends."""
    fake = FakeWandb()
    try:
        yield fake
    finally:
        fake.close()
