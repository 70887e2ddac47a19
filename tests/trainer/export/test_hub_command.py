"""Runs on the Hugging Face Hub, against a stand-in on this machine: pushed, pulled, and used."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import urllib.parse
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save, save_file
from support.full_disk import full_disk
from support.http_server import HubHandler, serving

from shards import UserError, open_split
from shards.errors import DiskFullError
from trainer.export import hub
from trainer.export.export import export
from trainer.predict.predictor import Predictor, upright_images

TOKEN = "hf_secret"


class ModelHub(ThreadingHTTPServer):
    """Repositories of models: creates them, takes commits, lists and sends files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits = 0


class _Handler(HubHandler):
    server: ModelHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.send(401, b"{}")
        if self.path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content['organization']}/{content['name']}"
            self.server.repositories.setdefault(name, {})
            if content.get("private") or content.get("visibility") == "private":
                self.server.private.add(name)
            return self.send_json({"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":  # of the model card
            return self.send_json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+/.+)/preupload/main", self.path):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.send_json({"files": files})
        if match := re.fullmatch(r"/api/models/(.+/.+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.repositories[match[1]][value["path"]] = base64.b64decode(value["content"])
            self.server.commits += 1
            return self.send_json(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{match[1]}/commit/{self.commit}",
                    "commitOid": self.commit,
                }
            )
        self.send(404, b"{}")

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/.+", path):
            files = self.server.repositories.get(match[1])
            if files is None:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if "/tree/" in path:
                return self.send_json(
                    [
                        {"type": "file", "path": name, "size": len(each), "oid": hashlib.sha1(each).hexdigest()}
                        for name, each in files.items()
                    ]
                )
            siblings = [{"rfilename": name} for name in files]
            return self.send_json({"id": match[1], "sha": self.commit, "private": True, "siblings": siblings})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.server.repositories[match[1]][match[2]]
            return self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        self.send(404, b"{}")

    do_HEAD = do_GET


@pytest.fixture
def server() -> Iterator[ModelHub]:
    with serving(ModelHub()) as server:
        yield server


@pytest.fixture
def api(server: ModelHub) -> HfApi:
    return HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=TOKEN)


def test_a_run_comes_back_as_it_was_pushed(
    server: ModelHub, api: HfApi, digits_run: Path, digits_set: Path, tmp_path: Path
) -> None:
    assert hub.push(digits_run, "me/digits", api) == f"{api.endpoint}/me/digits"
    files = server.repositories["me/digits"]
    assert set(files) >= {"checkpoints/best.pt", "config.yaml", "summary.json", "report.html"}
    assert "checkpoints/last.pt" not in files and "model.safetensors" not in files
    assert all(content == (digits_run / name).read_bytes() for name, content in files.items())
    assert not any(TOKEN.encode() in content for content in files.values())
    assert server.private == {"me/digits"} and server.commits == 1

    hub.pull("me/digits", tmp_path / "pulled", api)
    pulled = {path.relative_to(tmp_path / "pulled").as_posix() for path in (tmp_path / "pulled").rglob("*.*")}
    assert set(files) <= pulled
    batch = upright_images(open_split(digits_set, "test"), np.arange(8))
    expected, actual = (Predictor(run).predict(batch).probabilities for run in (digits_run, tmp_path / "pulled"))
    np.testing.assert_array_equal(actual, expected)

    # A run that is exported has a card and weights.
    export(tmp_path / "pulled", "safetensors")
    exported = tmp_path / "pulled" / "export" / "safetensors"
    hub.push(tmp_path / "pulled", "me/digits", api)
    assert server.commits == 2
    assert all(files[name] == (exported / name).read_bytes() for name in ("README.md", "model.safetensors"))


@pytest.mark.parametrize("damage", ["other run", "no metadata", "cut"])
def test_the_export_of_another_checkpoint_is_not_pushed(
    server: ModelHub, api: HfApi, digits_run: Path, tmp_path: Path, damage: str
) -> None:
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    target, _ = export(run, "safetensors")
    if damage == "other run":
        save_file(load_file(target), target, {"checkpoint_sha256": "0" * 64})
    else:
        target.write_bytes(save({"weight": torch.zeros(3)}) if damage == "no metadata" else target.read_bytes()[:-9])
    with pytest.raises(UserError) as caught:
        hub.push(run, "me/digits", api)
    assert caught.value.found == f"{target}, which is not the export of {run / 'checkpoints' / 'best.pt'}"
    assert server.commits == 0
    export(run, "safetensors")  # as the hint says
    hub.push(run, "me/digits", api)
    assert server.commits == 1
    target.unlink()
    hub.push(run, "me/card", api)  # a card without its weights may be of another checkpoint
    assert "README.md" not in server.repositories["me/card"]


def test_a_full_disk_is_one_message_and_leaves_nothing(
    server: ModelHub, api: HfApi, digits_run: Path, tmp_path: Path
) -> None:
    hub.push(digits_run, "me/digits", api)
    with full_disk(tmp_path, sys.maxsize) as disk:
        hub.pull("me/digits", tmp_path / "whole", api)
    assert disk.count > 10
    for first in np.linspace(0, disk.count * 3 // 4, 6, dtype=int):  # the number varies with the order of the files
        with full_disk(tmp_path, first), pytest.raises(DiskFullError) as caught:
            hub.pull("me/digits", tmp_path / "out", api)
        assert str(tmp_path) in caught.value.found
        assert not (tmp_path / "out").exists(), first
    hub.pull("me/digits", tmp_path / "out", api)
    assert (tmp_path / "out" / "summary.json").read_bytes() == (digits_run / "summary.json").read_bytes()


def test_what_the_hub_refuses_is_named_and_leaves_nothing(
    server: ModelHub, api: HfApi, digits_run: Path, tmp_path: Path
) -> None:
    def refusal(action: object, *arguments: object) -> UserError:
        with pytest.raises(UserError) as caught:
            action(*arguments)  # type: ignore[operator]
        assert TOKEN not in str(caught.value)
        return caught.value

    stranger = HfApi(endpoint=api.endpoint, token="hf_other")
    assert refusal(hub.push, digits_run, "me/digits", stranger).hint == "hf auth login"
    assert refusal(hub.pull, "me/none", tmp_path / "out", api).hint == "hf auth login"
    assert "me/a b" in refusal(hub.push, digits_run, "me/a b", api).found
    hub.push(digits_run, "me/damaged", api)
    server.repositories["me/damaged"]["checkpoints/best.pt"] = b"damaged"
    assert "best.pt" in refusal(hub.pull, "me/damaged", tmp_path / "out", api).found
    assert list(tmp_path.iterdir()) == []
