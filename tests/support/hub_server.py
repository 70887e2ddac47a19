"""A stand-in for the Hugging Face Hub on this machine: lists the files of a branch of a data set and sends them."""

from __future__ import annotations

import re
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from support.http_server import HubHandler, serving

BRANCH = "refs/convert/parquet"
_API = re.compile(r"/api/datasets/(?P<name>[^/]+/[^/]+)/(?P<what>revision|tree)/" + BRANCH + r"/?(?P<path>.*)")
_FILE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/" + BRANCH + r"/(?P<path>.+)")


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: The content of each file of the branch, by the name of the data set and its path.
        requests: The paths that were requested.
        ranges: First byte and size of each part of a file that was sent.
        pauses: Seconds before each of the next parts.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.ranges: list[tuple[int, int]] = []
        self.pauses: list[float] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(HubHandler):
    server: HubServer

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append(path)
        if match := _API.fullmatch(path) or _FILE.fullmatch(path):
            files = self.server.files.get(match["name"])
            if files is None:
                return self.send(HTTPStatus.UNAUTHORIZED, b"{}", {"X-Error-Code": "RepoNotFound"})
            if match.re is _FILE:
                return self._send_file(files[match["path"]])
            if match["what"] == "revision":
                return self.send_json({"id": match["name"], "sha": self.commit, "private": False})
            return self.send_json(_tree(files, match["path"]))
        self.send(HTTPStatus.NOT_FOUND, b"{}")

    do_HEAD = do_GET

    def _send_file(self, content: bytes) -> None:
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        last = min(int(last), len(content) - 1)
        self.server.ranges.append((int(first), last + 1 - int(first)))
        time.sleep(self.server.pauses.pop(0) if self.server.pauses else 0)
        headers = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "ETag": '"x"'}
        self.send(HTTPStatus.PARTIAL_CONTENT, content[int(first) : last + 1], headers)


def _tree(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
    below = {name: content for name, content in files.items() if name.startswith(f"{folder}/" if folder else "")}
    folders = {name.rsplit("/", count)[0] for name in below for count in range(1, name.count("/") + 1)} - {folder}
    return [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)] + [
        {"type": "file", "path": name, "size": len(content), "oid": f"{len(content):040}"}
        for name, content in below.items()
    ]


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """As HF_ENDPOINT does, which huggingface_hub reads when it is imported."""
    for name in ("HUGGINGFACE_CO_URL_TEMPLATE", "ENDPOINT"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(constants.ENDPOINT, endpoint))


@contextmanager
def hub_server() -> Iterator[HubServer]:
    with serving(HubServer()) as server:
        yield server
