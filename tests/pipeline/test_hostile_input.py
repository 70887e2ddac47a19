"""Packs by someone who means harm: a clear error that names the place, nothing run, no memory taken for a claim."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
from conftest import pack_splits, synthetic_splits
from numpy.typing import NDArray
from support.version_2 import downgrade

import pipeline.packing.pack
from shards import Manifest, UserError
from shards.convert import convert
from shards.manifest import MANIFEST_NAME, StoreKind
from shards.open import open_store
from shards.stores import sample_arrays
from shards.stores.sample_arrays import npy_header
from shards.stores.tar import COMPONENTS
from shards.stores.zarr_arrays import GROUP
from shards.verify.check import check_split

SHAPE = (4, 5, 1)
BLOCK_SIZE = 20
MAX_MEMORY = 20 << 20  # bytes; what the packs here need is a few thousand
TERA = 10**12


def pack_whole(store: StoreKind, directory: Path) -> Path:
    """One part of 95 small images in three shards of two blocks."""
    parts = synthetic_splits(train=95, test=1, shape=SHAPE, transposed=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 2 * BLOCK_SIZE * int(np.prod(SHAPE)))
        return pack_splits(parts, directory / "set", block_size=BLOCK_SIZE, store=store) / "train"


@pytest.fixture(scope="module")
def whole_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_whole("tar", tmp_path_factory.mktemp("tar"))


@pytest.fixture(scope="module")
def whole_zarr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_whole("zarr", tmp_path_factory.mktemp("zarr"))


@pytest.fixture(params=["tar", "zarr"])
def whole(request: pytest.FixtureRequest, whole_tar: Path, whole_zarr: Path) -> Path:
    """Not to be changed."""
    return whole_tar if request.param == "tar" else whole_zarr


@pytest.fixture
def part(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole part, to be made hostile."""
    return Path(shutil.copytree(whole, tmp_path / "part"))


@pytest.fixture
def tar_part(whole_tar: Path, tmp_path: Path) -> Path:
    """In version 2, which is read from the shards and their indices."""
    return downgrade(Path(shutil.copytree(whole_tar, tmp_path / "part")))


@pytest.fixture
def zarr_part(whole_zarr: Path, tmp_path: Path) -> Path:
    """In version 2, which is read from the shards of three arrays."""
    return downgrade(Path(shutil.copytree(whole_zarr, tmp_path / "part")))


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_MEMORY


def everything(part: Path) -> tuple[NDArray, NDArray, NDArray]:
    store = open_store(part)
    return store.read(np.arange(len(store))), store.labels, store.rows


def refusal(part: Path) -> str:
    """What is said of a part by whoever opens, reads and converts it; verifying says it, too."""
    with little_memory():
        with pytest.raises(UserError) as caught:
            everything(part)
        target = part.parent / "converted"
        with pytest.raises(UserError):
            convert(part, target, "tar")
        assert sorted(path.name for path in part.parent.iterdir()) == ["part"]
        try:
            _, faults = check_split(part)
        except UserError as error:  # of the manifest
            faults = [error.found]
    assert faults
    return caught.value.found


def change_manifest(part: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = part / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    content.pop("sha256", None)  # optional: a hostile author would compute it again
    path.write_text(json.dumps(content))


def sign(part: Path, name: str) -> None:
    """Let the manifest tell of a file as it is now, as a hostile author would."""
    content = (part / name).read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        [entry] = [file for file in [*manifest["shards"], *manifest["files"]] if file["name"] == name]
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    change_manifest(part, change)


def files_of(part: Path) -> list[str]:
    return [file.name for file in Manifest.read(part).everything]


class TestEveryFile:
    """Damaged in every way, each is refused by name, or nothing that is read differs."""

    def test_cut_short(self, part: Path, whole: Path) -> None:
        expected = everything(whole)
        for name in files_of(whole):
            content = (part / name).read_bytes()
            for length in {0, 1, len(content) // 2, len(content) - 4, len(content) - 1}:
                (part / name).write_bytes(content[:length])
                assert_refused_or_equal(part, name, expected)
                assert any(name in fault for fault in check_split(part)[1])
            (part / name).write_bytes(content)

    @pytest.mark.parametrize(
        ("bits", "places"),
        [(0x01, 50), *(pytest.param(bits, 150, marks=pytest.mark.slow) for bits in (0x01, 0x80))],
    )
    def test_flipped(self, part: Path, whole: Path, bits: int, places: int) -> None:
        expected = everything(whole)
        for name in files_of(whole):
            content = (part / name).read_bytes()
            for place in range(0, len(content), 1 + len(content) // places):
                changed = bytearray(content)
                changed[place] ^= bits
                (part / name).write_bytes(changed)
                assert_refused_or_equal(part, name, expected)
            (part / name).write_bytes(content)

    def test_missing(self, part: Path, whole: Path) -> None:
        expected = everything(whole)
        for name in files_of(whole):
            (part / name).rename(part / "away")
            assert_refused_or_equal(part, name, expected)
            assert any(name in fault for fault in check_split(part)[1])
            (part / "away").rename(part / name)

    def test_a_directory_instead(self, part: Path, whole: Path) -> None:
        expected = everything(whole)
        for name in files_of(whole):
            (part / name).rename(part / "away")
            (part / name).mkdir()
            assert_refused_or_equal(part, name, expected)
            assert any(name in fault for fault in check_split(part)[1])
            (part / name).rmdir()
            (part / "away").rename(part / name)

    def test_another_of_its_kind(self, part: Path, whole: Path) -> None:
        """The second shard in the place of the first, and the manifest none the wiser."""
        expected = everything(whole)
        for name in files_of(whole):
            other = name.replace("c/0", "c/1").replace("shard-00000", "shard-00001")
            if other != name:
                shutil.copy(whole / other, part / name)
                assert_refused_or_equal(part, name, expected)
                assert any(name in fault for fault in check_split(part)[1])
                shutil.copy(whole / name, part / name)


def assert_refused_or_equal(part: Path, name: str, expected: tuple[NDArray, NDArray, NDArray]) -> None:
    try:
        found = everything(part)
    except UserError as error:
        assert Path(name).stem in error.found
        assert error.hint
        return
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def set_all(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update(fields)


def claim_samples(manifest: dict[str, Any]) -> None:
    """As many samples as a block of a terabyte holds, in one block a shard."""
    for shard in manifest["shards"]:
        shard.update(samples=TERA, blocks_crc32=[0])
    samples = TERA * len(manifest["shards"])
    manifest.update(samples=samples, counts=[samples, 0, 0, 0, 0], block_size=TERA)


def claim_small_blocks(manifest: dict[str, Any]) -> None:
    """The largest blocks that are allowed, many of them: far more than the files can hold."""
    blocks = 5000
    size = (1 << 30) // 20
    for shard in manifest["shards"]:
        shard.update(samples=size * blocks, blocks_crc32=[0] * blocks)
    samples = size * blocks * len(manifest["shards"])
    manifest.update(samples=samples, counts=[samples, 0, 0, 0, 0], block_size=size)


class TestManifest:
    @pytest.mark.parametrize(
        "change",
        [
            set_all(samples=-95),
            set_all(samples=TERA),
            set_all(samples="many"),
            set_all(block_size=0),
            set_all(block_size=-20),
            set_all(image_shape=[TERA, TERA, 1]),
            set_all(image_shape=[-4, -5, 1]),
            set_all(image_shape=[4, 5]),
            set_all(image_shape=[None, None, 1]),
            set_all(counts=[100, -5, 0, 0, 0]),
            set_all(store="pickle"),
            set_all(store=["tar"]),
            set_all(version=[]),
            set_all(shards=[]),
            set_all(shards=None),
            set_all(classes={"a": 1}),
            set_all(classes=["a", "b", "c", "\x1b[2Jd", "e"]),
            set_all(dataset="\u202edigits"),
            set_all(unknown=1),
            claim_samples,
            claim_small_blocks,
        ],
    )
    def test_wrong_numbers_and_types(self, part: Path, change: Callable[[dict[str, Any]], None]) -> None:
        change_manifest(part, change)
        assert str(part) in refusal(part)

    def test_blocks_larger_than_any_reader_takes(self, part: Path) -> None:
        change_manifest(part, claim_samples)
        assert "blocks of 1,000,000,000,000 images of 20 bytes" in refusal(part)

    @pytest.mark.parametrize(
        "name", ["../other", "/etc/passwd", "a/../../other", "..\\other", "C:other", "", ".", "a\0b", "a\nb"]
    )
    @pytest.mark.parametrize("field", ["shards", "files"])
    def test_names_outside_the_part(self, part: Path, name: str, field: str) -> None:
        change_manifest(part, lambda manifest: manifest[field][0].update(name=name))
        assert "outside the split" in refusal(part)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"null",
            b"[]",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"version": ' + b"1" * 5000 + b"}",
            b'{"version": 1e999}',
            b"\x80\x04\x95",
        ],
    )
    def test_no_manifest_at_all(self, part: Path, content: bytes) -> None:
        (part / MANIFEST_NAME).write_bytes(content)
        assert MANIFEST_NAME in refusal(part)


def replace_member(part: Path, component: str, content: bytes) -> None:
    """Put other bytes of the same length into the first block, with the right CRC-32 and hash."""
    path = part / "shard-00000.tar"
    index = path.with_suffix(".idx").read_text().splitlines()
    words = index[1].split()
    offset, size = (int(words[words.index(component) + place]) for place in (1, 2))
    end = int(index[2].split()[1]) - 512
    tar = bytearray(path.read_bytes())
    assert len(content) <= size
    tar[offset : offset + size] = content.ljust(size, b"\0")
    path.write_bytes(tar)
    sign(part, path.name)
    crc = zlib.crc32(tar[:end])
    change_manifest(part, lambda manifest: manifest["shards"][0]["blocks_crc32"].__setitem__(0, crc))


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (Path.touch, (self._path,))


def write_array(part: Path, name: str, values: NDArray) -> None:
    """Replace an array, and sign it."""
    np.save(part / name, values)
    sign(part, name)


def change_block(part: Path, block: int, **fields: int) -> None:
    blocks = np.load(part / "blocks.npy")
    for name, value in fields.items():
        blocks[name][block] = value
    write_array(part, "blocks.npy", blocks)


class TestArrays:
    """Of version 3, with the hashes of what they are."""

    @pytest.mark.parametrize(
        "fields",
        [
            {"offset": -1},
            {"offset": 10**9},
            {"offset": 2**62},
            {"offset": -(2**62)},
            {"offset": 7},
            {"bytes": 0},
            {"bytes": 2**32 - 1},
            {"crc32": 1},
            {"numbers_crc32": 1},
        ],
        ids=str,
    )
    def test_blocks_that_lie(self, part: Path, fields: dict[str, int]) -> None:
        change_block(part, 1, **fields)
        assert "block 00000001" in refusal(part)

    @pytest.mark.parametrize("name", ["labels.npy", "rows.npy", "blocks.npy"])
    @pytest.mark.parametrize(
        "values",
        [
            np.zeros(94, np.uint8),
            np.zeros((95, 1), np.uint8),
            np.zeros(95, np.float64),
            np.zeros(95, ">u4"),
            np.zeros(95, np.int8),
            np.array(0),
            np.zeros(5, "V20"),
        ],
        ids=lambda values: f"{values.dtype} {values.shape}",
    )
    def test_arrays_of_another_type_or_shape(self, part: Path, name: str, values: NDArray) -> None:
        write_array(part, name, values)
        assert name in refusal(part)

    @pytest.mark.parametrize("name", ["labels.npy", "rows.npy", "blocks.npy"])
    def test_a_pickle_is_not_unpickled(self, part: Path, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        sprung = tmp_path_factory.mktemp("trap") / "sprung"
        (part / name).write_bytes(npy_header("|O", (95,)) + pickle.dumps(Trap(sprung)))
        sign(part, name)
        assert name in refusal(part)
        assert not sprung.exists()

    @pytest.mark.parametrize(("checked", "block"), [(95, ""), (94, "block 00000001: ")])
    def test_labels_of_no_class_with_the_right_checksum(
        self, part: Path, checked: int, block: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On opening a split of few samples, otherwise when its block is read."""
        monkeypatch.setattr(sample_arrays, "_CHECKED_LABELS", checked)
        labels, rows = np.load(part / "labels.npy"), np.load(part / "rows.npy")
        labels[BLOCK_SIZE] = 5
        write_array(part, "labels.npy", labels)
        second = slice(BLOCK_SIZE, 2 * BLOCK_SIZE)
        crc = zlib.crc32(labels[second].astype("<i8").tobytes() + rows[second].astype("<i8").tobytes())
        change_block(part, 1, numbers_crc32=crc)
        assert f"labels.npy: {block}a label outside 0 .. 4" in refusal(part)

    @pytest.mark.parametrize(
        "frame", [lambda: zstd(bytes(1 << 26)), lambda: zstd(b"short"), lambda: b"", lambda: pickle.dumps([1])]
    )
    def test_frames_that_lie(self, whole_zarr: Path, tmp_path: Path, frame: Callable[[], bytes]) -> None:
        part = Path(shutil.copytree(whole_zarr, tmp_path / "part"))
        _, [first, _] = blocks_of(part, "images")
        write_shard(part, "images", [first, frame()])
        change_block(part, 1, offset=len(first), bytes=len(frame()))
        assert "images/c/0" in (found := refusal(part))
        assert "block 00000001" in found


class TestTar:
    @pytest.mark.parametrize("component", COMPONENTS)
    def test_a_pickle_is_not_unpickled(
        self, tar_part: Path, component: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        sprung = tmp_path_factory.mktemp("trap") / "sprung"
        pickle.loads(pickle.dumps(Trap(sprung)))
        assert sprung.exists(), "the trap works"
        sprung.unlink()
        header = npy_header("|O", (1,))
        replace_member(tar_part, component, header + pickle.dumps(Trap(sprung)))
        assert f"shard-00000.tar: block 00000000: {component} is not" in refusal(tar_part)
        assert f"shard-00000.tar: block 00000000: {component} is not" in "\n".join(check_split(tar_part)[1])
        assert not sprung.exists()

    @pytest.mark.parametrize(
        "header",
        [
            npy_header("|u1", (TERA, *SHAPE)),
            npy_header("|u1", (-BLOCK_SIZE, *SHAPE)),
            npy_header("<f8", (BLOCK_SIZE, *SHAPE)),
            npy_header("|V1000000", (BLOCK_SIZE, *SHAPE)),
            npy_header("|u1", (BLOCK_SIZE, *SHAPE)).replace(b"False", b"True "),
            npy_header("|u1", (BLOCK_SIZE, *SHAPE)).replace(b"'|u1'", b"f() #"),
            npy_header("|u1", (BLOCK_SIZE, *SHAPE)).replace(b"\x01\x00", b"\x03\x00", 1),
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
            b"PK\x03\x04",
            b"",
        ],
    )
    def test_array_headers_that_lie(self, tar_part: Path, header: bytes) -> None:
        replace_member(tar_part, "images.npy", header)
        assert "shard-00000.tar: block 00000000: images.npy" in refusal(tar_part)
        assert any("shard-00000.tar: block 00000000: " in fault for fault in check_split(tar_part)[1])

    @pytest.mark.parametrize("size", [TERA, 8 << 30])
    def test_members_that_claim_terabytes(self, tar_part: Path, size: int) -> None:
        path = tar_part / "shard-00000.tar"
        tar = bytearray(path.read_bytes())
        tar[124:136] = b"\x80" + size.to_bytes(11, "big")  # GNU's base-256 form of the size
        tar[148:156] = b" " * 8
        tar[148:156] = b"%06o\0 " % sum(tar[:512])
        path.write_bytes(tar)
        sign(tar_part, path.name)
        with little_memory():
            assert any("block 00000000 cannot be read" in fault for fault in check_split(tar_part)[1])

    def test_members_that_are_far_too_long(self, tar_part: Path) -> None:
        path = tar_part / "shard-00000.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for component in COMPONENTS:
                member = tarfile.TarInfo(f"00000000.{component}")
                member.size = 3 * MAX_MEMORY
                tar.addfile(member, io.BytesIO(bytes(member.size)))
        sign(tar_part, path.name)
        with little_memory():
            assert any("images.npy claims 62,914,560 bytes" in fault for fault in check_split(tar_part)[1])

    @pytest.mark.parametrize(
        "place", ["-512 100", f"{TERA} 100", f"100 {TERA}", "100 -100", "0x10 100", f"{'9' * 5000} 1", "1e3 100"]
    )
    def test_an_index_that_points_elsewhere(self, tar_part: Path, place: str) -> None:
        path = tar_part / "shard-00000.idx"
        path.write_text(re.sub(r"images.npy \d+ \d+", f"images.npy {place}", path.read_text(), count=1))
        sign(tar_part, path.name)
        assert "shard-00000" in refusal(tar_part)


def blocks_of(part: Path, array: str) -> tuple[Path, list[bytes]]:
    """The first shard of an array, and its two blocks as they are stored."""
    path = part / GROUP / array / "c" / "0" / ("0/0/0" if array == "images" else "")
    content = path.read_bytes()
    index = np.frombuffer(content[-36:-4], "<u8").reshape(2, 2).tolist()
    return path, [content[offset : offset + length] for offset, length in index]


def write_shard(part: Path, array: str, blocks: list[bytes], index: list[tuple[int, int]] | None = None) -> None:
    """Write the first shard of an array anew, with a right index (or the one given) and hash."""
    path, _ = blocks_of(part, array)
    if index is None:
        starts = np.cumsum([0, *map(len, blocks)]).tolist()
        index = [(start, len(block)) for start, block in zip(starts, blocks, strict=False)]
    entries = np.array(index, np.uint64).tobytes()
    path.write_bytes(b"".join(blocks) + bytes(numcodecs.CRC32C().encode(entries)))
    sign(part, path.relative_to(part).as_posix())


def zstd(content: bytes) -> bytes:
    return bytes(numcodecs.Zstd(level=3, checksum=True).encode(content))


MISSING = (2**64 - 1, 2**64 - 1)


class TestZarr:
    @pytest.mark.parametrize("array", ["images", "labels", "rows"])
    @pytest.mark.parametrize(
        "frame",
        [
            pytest.param(zstd(bytes(1 << 26)), id="a bomb of 64 MiB"),
            pytest.param(zstd(bytes(1 << 26))[:30], id="a bomb cut short"),
            pytest.param(zstd(b"short"), id="too short"),
            pytest.param(b"", id="nothing"),
            pytest.param(b"\x28\xb5\x2f\xfd\xe0" + (TERA).to_bytes(8, "little") + b"\x01\0\0", id="claims a terabyte"),
            pytest.param(b"\x28\xb5\x2f\xfd\x00\x58\x01\0\0", id="claims no size"),
            pytest.param(pickle.dumps([1]), id="a pickle"),
        ],
    )
    def test_blocks_that_lie(self, zarr_part: Path, array: str, frame: bytes) -> None:
        _, [first, _] = blocks_of(zarr_part, array)
        write_shard(zarr_part, array, [first, frame])
        assert f"{array}/c/0" in (found := refusal(zarr_part))
        assert "block 00000001" in found

    @pytest.mark.parametrize("array", ["images", "labels", "rows"])
    @pytest.mark.parametrize(
        "place",
        [MISSING, (0, TERA), (TERA, 10), (2**63, 10), (2**64 - 5, 10), (2**62, 2**62), (10**4, 1), (0, 10**4)],
    )
    def test_an_index_that_points_elsewhere(self, zarr_part: Path, array: str, place: tuple[int, int]) -> None:
        _, [first, second] = blocks_of(zarr_part, array)
        write_shard(zarr_part, array, [first, second], [(0, len(first)), place])
        assert f"{array}/c/0" in (found := refusal(zarr_part))
        assert "block 00000001" in found

    @pytest.mark.parametrize("array", ["images", "labels", "rows"])
    def test_an_index_with_a_block_that_is_far_too_long(self, zarr_part: Path, array: str) -> None:
        _, [first, _] = blocks_of(zarr_part, array)
        write_shard(zarr_part, array, [first, bytes(3 * MAX_MEMORY)])
        assert "block 00000001" in refusal(zarr_part)

    @pytest.mark.parametrize("array, number", [("labels", 5), ("labels", -1), ("labels", 2**62), ("rows", -1)])
    def test_numbers_out_of_range(self, zarr_part: Path, array: str, number: int) -> None:
        _, [first, _] = blocks_of(zarr_part, array)
        write_shard(zarr_part, array, [first, zstd(np.full(BLOCK_SIZE, number, "<i8").tobytes())])
        assert f"{array}/c/0: block 00000001: {array} outside 0 .. " in refusal(zarr_part)

    @pytest.mark.parametrize("array", ["images", "labels", "rows"])
    @pytest.mark.parametrize(
        "change",
        [
            {"shape": [TERA, *SHAPE]},
            {"shape": [-95, *SHAPE]},
            {"shape": [94]},
            {"shape": []},
            {"shape": "all"},
            {"shape": None},
            {"data_type": "object"},
            {"data_type": "float64"},
            {"data_type": "string"},
            {"data_type": {"name": "null_terminated_bytes", "configuration": {"length_bytes": TERA}}},
            {"fill_value": 7},
            {"fill_value": None},
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [TERA, *SHAPE]}}},
            {"chunk_grid": {"name": "rectangular"}},
            {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
            {"chunk_key_encoding": {"name": "../../other"}},
            {"codecs": []},
            {"codecs": [{"name": "bytes"}]},
            {"codecs": [{"name": "numcodecs.pickle"}]},
            {"codecs": [{"name": "transpose", "configuration": {"order": [0]}}, {"name": "bytes"}]},
            {"zarr_format": 2},
            {"node_type": "group"},
            {"storage_transformers": [{"name": "other"}]},
            {"dimension_names": ["a"] * 9},
        ],
        ids=lambda change: str(change)[:60],
    )
    def test_metadata_that_lie(self, zarr_part: Path, array: str, change: dict[str, object]) -> None:
        path = zarr_part / GROUP / array / "zarr.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        sign(zarr_part, path.relative_to(zarr_part).as_posix())
        assert f"{array}/zarr.json: " in refusal(zarr_part)

    @pytest.mark.parametrize("array", ["images", "labels", "rows"])
    @pytest.mark.parametrize(
        "change",
        [
            {"chunk_shape": [TERA]},
            {"chunk_shape": [-1, *SHAPE]},
            {"chunk_shape": [1, *SHAPE]},
            {"index_location": "start"},
            {"index_codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
            {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "zstd"}]},
            {"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 5}}]},
            {"codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]},
            {"codecs": [{"name": "numcodecs.pickle"}]},
        ],
        ids=lambda change: str(change)[:60],
    )
    def test_codecs_that_are_not_ours(self, zarr_part: Path, array: str, change: dict[str, object]) -> None:
        path = zarr_part / GROUP / array / "zarr.json"
        metadata = json.loads(path.read_text())
        metadata["codecs"][0]["configuration"].update(change)
        path.write_text(json.dumps(metadata))
        sign(zarr_part, path.relative_to(zarr_part).as_posix())
        assert f"{array}/zarr.json: " in refusal(zarr_part)

    @pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b" " * (2 << 20), b"\xff", b"{}", b"1" * 5000])
    def test_metadata_that_are_none(self, zarr_part: Path, content: bytes) -> None:
        path = zarr_part / GROUP / "images" / "zarr.json"
        path.write_bytes(content)
        sign(zarr_part, path.relative_to(zarr_part).as_posix())
        assert "images/zarr.json: " in refusal(zarr_part)

    def test_a_manifest_without_some_of_the_shards(self, zarr_part: Path) -> None:
        change_manifest(zarr_part, lambda manifest: manifest.update(files=manifest["files"][1:]))
        assert MANIFEST_NAME in refusal(zarr_part)

    def test_a_manifest_with_the_shards_in_another_order(self, zarr_part: Path) -> None:
        def exchange(manifest: dict[str, Any]) -> None:
            manifest["shards"][:2] = manifest["shards"][1::-1]

        change_manifest(zarr_part, exchange)
        assert MANIFEST_NAME in refusal(zarr_part)
