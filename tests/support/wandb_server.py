"""A W&B server on this machine that keeps what it is sent, and may refuse runs."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_USER = {"id": "u", "entity": "me", "username": "me", "email": "x", "admin": False, "flags": "{}"}
_VIEWER = {"viewer": _USER | {"teams": {"edges": []}, "apiKeys": {"edges": []}}, "serverInfo": {}}
_PROJECT = {"name": "inkstream", "entity": {"name": "me"}}
_BUCKET = {"id": "r", "displayName": "run", "sweepName": None, "historyLineCount": 0, "config": "{}"}


class Handler(BaseHTTPRequestHandler):
    """Accepts every key; answers a run by `status`."""

    protocol_version = "HTTP/1.1"
    status = 200
    received: list[bytes]

    def _receive(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        headers = {name: value for name, value in self.headers.items() if name != "Authorization"}
        self.received.append(f"{self.path} {headers} ".encode() + body)
        try:
            query = json.loads(body).get("query", "")
        except (ValueError, AttributeError):
            query = ""
        is_viewer = "iewer" in query and "upsertBucket" not in query
        if self.command == "POST" and self.status != 200 and not is_viewer:
            self._answer(self.status, {"errors": [{"message": "run was previously created and deleted"}]})
        elif "upsertBucket" in query:
            name = json.loads(body)["variables"]["name"]
            bucket = {"bucket": _BUCKET | {"name": name, "project": _PROJECT}, "inserted": True}
            self._answer(200, {"data": {"upsertBucket": bucket}})
        elif "createRunFiles" in query:
            names = json.loads(body)["variables"]["files"]
            url = f"http://127.0.0.1:{self.server.server_address[1]}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in names]
            created = {"runID": "r", "uploadHeaders": [], "files": files}
            self._answer(200, {"data": {"createRunFiles": created}})
        elif is_viewer:
            self._answer(200, {"data": _VIEWER})
        else:
            self._answer(200, {"data": {}} if query else {})

    do_POST = do_PUT = do_GET = _receive

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Silence."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """Silence: clients close their connections when they have finished."""


@contextmanager
def wandb_server(status: int = 200) -> Iterator[tuple[dict[str, str], list[bytes]]]:
    """The environment of its clients, and everything that it has received."""
    received: list[bytes] = []
    server = _Server(("127.0.0.1", 0), type("Server", (Handler,), {"status": status, "received": received}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}, received
    server.shutdown()
    server.server_close()
