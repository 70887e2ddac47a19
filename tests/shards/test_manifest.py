"""A manifest is what was written, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards import Manifest, UserError
from shards.manifest import MANIFEST_NAME


@pytest.fixture
def content(synthetic_set: Path) -> bytes:
    return (synthetic_set / "test" / MANIFEST_NAME).read_bytes()


def test_every_flipped_bit_is_refused_or_means_the_same(content: bytes) -> None:
    expected = Manifest.parse(content, "manifest")
    refused = 0
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert Manifest.parse(bytes(changed), "manifest") == expected
        except UserError:
            refused += 1
    assert refused > 7 * len(content)


@pytest.mark.parametrize(
    "field, value",
    [
        ("classes", ["one", "zero", "class 2", "class 3", "class 4"]),
        ("transposed", False),
        ("seed", 1),
        ("versions", {}),
        ("options", {"size": 3}),
        ("raw", []),
        ("sha256", "0" * 64),
    ],
)
def test_a_changed_field_is_refused(content: bytes, field: str, value: object) -> None:
    fields = json.loads(content)
    assert fields[field] != value
    with pytest.raises(UserError, match="does not fit its checksum"):
        Manifest.parse(json.dumps(fields | {field: value}).encode(), "manifest")


def test_the_order_of_fields_and_blanks_mean_nothing(content: bytes) -> None:
    fields = json.loads(content)
    other = json.dumps(dict(reversed(fields.items())), indent=7).encode()
    assert Manifest.parse(other, "manifest") == Manifest.parse(content, "manifest")


def test_a_manifest_without_a_checksum_is_readable(content: bytes) -> None:
    """As it was written before."""
    fields = json.loads(content)
    del fields["sha256"]
    manifest = Manifest.parse(json.dumps(fields).encode(), "manifest")
    assert manifest == Manifest.parse(content, "manifest")
    assert manifest.to_json().encode() == content
