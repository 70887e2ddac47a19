"""Data sets of the Hugging Face Hub by name, from a stand-in of the Hub."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet
from support.http_server import without_proxies
from support.hub_server import HubServer, hub_server, use_endpoint
from support.raw_files import picture, pixels, refusal

from pipeline import shard
from pipeline.datasets import find_source
from shards import open_split

CLASSES = ("cat", "dog")


def table(count: int, column: str = "label", seed: int = 0) -> bytes:
    """Images and labels as the Hub converts them: class names in the features."""
    images = [{"bytes": picture(pixels(seed=row + seed)), "path": None} for row in range(count)]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    features = {"image": {"_type": "Image"}, column: {"names": CLASSES, "_type": "ClassLabel"}}
    content = arrow.table({"image": arrow.array(images, kind), column: [row % 2 for row in range(count)]})
    file = io.BytesIO()
    parquet.write_table(
        content.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()}), file
    )
    return file.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    without_proxies(monkeypatch)
    with hub_server() as server:
        use_endpoint(monkeypatch, server.endpoint)
        yield server


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["shard", "hf", *arguments, "--workers", "1"])
    assert shard.main() == 0


@pytest.mark.parametrize("column", ["label", "species"])
def test_a_dataset_is_packed_by_its_name(hub: HubServer, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    files = {f"default/{split}/0000.parquet": table(count, column) for split, count in (("train", 12), ("test", 5))}
    hub.files["user/pets"] = {**files, "default/train/0001.parquet": table(3, column, seed=50), ".gitattributes": b""}
    run(monkeypatch, "user/pets")
    train, test = (open_split("data/shards/pets", split) for split in ("train", "test"))
    assert train.manifest.classes == CLASSES and train.manifest.dataset == "pets"
    assert (len(train), len(test)) == (15, 5)
    packed = {image.tobytes() for image in test.read(np.arange(5))}
    assert packed == {pixels(seed=row).tobytes() for row in range(5)}
    before = len(hub.requests)
    run(monkeypatch, "user/pets", "--force")
    assert not [path for path in hub.requests[before:] if "/resolve/" in path]  # from the cache


def test_a_dataset_of_the_same_name_by_another_user_is_not_taken_for_packed(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("anna", "bob"):
        hub.files[f"{user}/pets"] = {f"default/{split}/0000.parquet": table(4) for split in ("train", "test")}
    run(monkeypatch, "anna/pets")
    error = refusal(lambda: run(monkeypatch, "bob/pets"))
    assert "data/shards/pets" in error.found and "anna/pets" in error.found and "bob/pets" in error.expected
    run(monkeypatch, "anna/pets")


def test_a_configuration_is_selected_by_split(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["user/pets"] = {
        f"{config}/{split}/0000.parquet": table(count)
        for config, count in (("small", 4), ("large (v1)", 9))
        for split in ("train", "validation")
    }
    error = refusal(lambda: run(monkeypatch, "user/pets"))
    assert "the configurations large (v1), small" in error.found
    assert error.hint == "python -m pipeline.shard hf user/pets --split 'large (v1)'"
    assert "tiny" in refusal(lambda: run(monkeypatch, "user/pets", "--split", "tiny")).expected
    run(monkeypatch, "user/pets", "--split", "small")
    assert len(open_split("data/shards/pets-small", "train")) == 4
    assert not [path for path in hub.requests if "/resolve/" in path and "large" in path]


def test_a_partial_conversion_is_refused(hub: HubServer) -> None:
    hub.files["user/pets"] = {"default/partial-train/0000.parquet": table(4), "default/test/0000.parquet": table(4)}
    error = refusal(lambda: find_source("hf").address("user/pets", ""))
    assert "only a part" in error.found and "parquet --raw hf://datasets/user/pets" in error.hint


def test_an_unknown_dataset_is_named(hub: HubServer) -> None:
    assert "user/none" in refusal(lambda: find_source("hf").address("user/none", "")).found


@pytest.mark.parametrize("name", ["a/b/c", "mnist", "../x", "a@b", "a b", "https://x", ""])
def test_what_is_no_name_is_refused(hub: HubServer, name: str) -> None:
    quoted = name if name == "../x" else repr(name)  # only the latest versions of huggingface-hub quote this one
    assert quoted in refusal(lambda: find_source("hf").address(name, "")).found
    assert hub.requests == []


@pytest.mark.parametrize(
    "arguments, found, hint",
    [
        (["hf"], "hf without a name", "hf ylecun/mnist"),
        (["folder", "photos"], "folder photos", "folder --raw photos"),
        (["mnist", "28"], "mnist 28", "mnist --raw 28"),
    ],
)
def test_a_name_belongs_to_the_hub(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], found: str, hint: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["shard", *arguments])
    error = refusal(shard.main)
    assert error.found == found and error.hint.endswith(hint)


def test_without_a_network_one_message_names_the_data_set(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shards.remote.base.FIRST_PAUSE", 0.001)
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    error = refusal(lambda: run(monkeypatch, "user/pets"))
    assert "hf://datasets/user/pets" in error.found and error.hint
    assert not (tmp_path / "data").exists()
