"""Archives made to harm or damaged by chance: a message that names file and member, nothing read, nothing filled."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.raw_files import load, picture, pixels, read_all, refusal, unreadable, write_tar, write_zip

from pipeline.readers.archives import files
from pipeline.readers.archives.compression import decompress, is_compressed
from pipeline.readers.archives.file_trees import inner_name
from pipeline.readers.archives.files import CorruptFileError, StoredFile, TempFile, max_expanded_bytes
from pipeline.readers.raw_split import UnreadableImages
from shards import UserError

IMAGES = [pixels(seed=seed) for seed in range(4)]
FILES = {f"{seed % 2}/{seed}.png": picture(image) for seed, image in enumerate(IMAGES)}
OUTSIDE = [
    "../evil.png",
    "a/../../evil.png",
    "/etc/evil.png",
    "C:/evil.png",
    "..\\evil.png",
    "\\\\host\\evil.png",
    "a/..",
]


def outcome(place: Path) -> str:
    """What comes of an archive: `whole`, or the refusal; any other exception is a fault of ours."""
    try:
        (train,) = load("folder", place)
        images = read_all(train)
    except UserError as error:
        assert str(place) in error.found
        return error.found
    except UnreadableImages as error:
        assert all(reason.startswith(f"{place}:") for reason in error.reasons.values())
        return "; ".join(error.reasons.values())
    by_path = dict(zip(train.columns["path"].tolist(), images, strict=True))
    same = by_path.keys() == FILES.keys() and all((by_path[f"{n % 2}/{n}.png"] == IMAGES[n]).all() for n in range(4))
    return "whole" if same else "other"


def refused(place: Path) -> str:
    found = outcome(place)
    assert found not in ("whole", "other")
    return found


def special(kind: bytes, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname, info.size = kind, link, size
    return info


class TestNames:
    @pytest.mark.parametrize("name", OUTSIDE)
    def test_that_lead_outside_are_refused(self, tmp_path: Path, name: str) -> None:
        for place in (
            write_zip(tmp_path / "a.zip", {**FILES, name: b""}),
            write_tar(tmp_path / "a.tar", {**FILES, name: b""}),
        ):
            assert re.search(r"its member '.*' leads out of it", refused(place))
        assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "a.tar"}

    @pytest.mark.parametrize(
        "name, inner", [("a/b", "a/b"), ("./a//b", "a/b"), ("a\\b", "a/b"), (".", None), ("", None), ("a/./b", "a/b")]
    )
    def test_are_brought_to_one_form(self, name: str, inner: str | None) -> None:
        assert inner_name(name) == inner

    @given(st.text(alphabet="ab./\\:\0", max_size=10))
    def test_never_lead_outside(self, name: str) -> None:
        inner = inner_name(name)
        if inner is not None:
            assert inner and not inner.startswith("/")
            assert not {"..", "", "."} & set(inner.split("/"))

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_that_come_twice_are_refused(self, tmp_path: Path) -> None:
        place = tmp_path / "a.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for _ in range(2):
                archive.writestr("a/1.png", FILES["0/0.png"])
        assert "two members a/1.png" in refused(place)
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for _ in range(2):
                archive.addfile(tarfile.TarInfo("a/1.png"))
        assert "two members a/1.png" in refused(tmp_path / "a.tar")


class TestMembers:
    @pytest.mark.parametrize(
        "info, kind",
        [
            (special(tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
            (special(tarfile.LNKTYPE, "0/0.png"), "a hard link"),
            (special(tarfile.CHRTYPE), "a device"),
            (special(tarfile.BLKTYPE), "a device"),
            (special(tarfile.FIFOTYPE), "a pipe"),
            (special(tarfile.GNUTYPE_SPARSE), "a sparse file"),
        ],
        ids=["symbolic link", "hard link", "character device", "block device", "pipe", "sparse"],
    )
    def test_of_a_tar_that_are_no_files_are_refused(self, tmp_path: Path, info: tarfile.TarInfo, kind: str) -> None:
        place = write_tar(tmp_path / "a.tar", {**FILES, "0/x.png": info})
        assert f"'0/x.png' is {kind}" in refused(place)

    @pytest.mark.parametrize("name", ["\u00c4pfel", "\u732b", "caf\u00e9"])
    def test_names_of_a_zip_may_be_utf8_without_its_flag(self, tmp_path: Path, name: str) -> None:
        """As `zip` on Linux and the Finder of macOS write them."""
        content = write_zip(tmp_path / "a.zip", {f"{name}/1.png": FILES["0/0.png"], "b/2.png": FILES["1/1.png"]})
        flagged, raw = content.read_bytes(), f"{name}/1.png".encode()
        assert flagged.count(raw) == 2
        patched = bytearray(flagged)
        for start, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            patched[flagged.index(start) + offset + 1] &= ~8
        content.write_bytes(patched)
        assert zipfile.ZipFile(content).namelist()[0] != f"{name}/1.png"
        (train,) = load("folder", content)
        assert set(train.classes) == {name, "b"}

    def test_names_of_a_zip_in_another_encoding_are_kept(self, tmp_path: Path) -> None:
        content = write_zip(tmp_path / "a.zip", {"xx/1.png": FILES["0/0.png"], "b/2.png": FILES["1/1.png"]})
        content.write_bytes(content.read_bytes().replace(b"xx/", b"\x8e\x8e/"))
        (train,) = load("folder", content)
        assert train.classes == ("b", b"\x8e\x8e".decode("cp437"))

    def test_of_a_zip_that_are_links_are_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            info = zipfile.ZipInfo("0/x.png")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
        assert "its member 0/x.png is a link" in refused(tmp_path / "a.zip")

    def test_encrypted_ones_are_refused(self, tmp_path: Path) -> None:
        place = write_zip(tmp_path / "a.zip", FILES)
        content = bytearray(place.read_bytes())
        for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(signature) + flags] |= 1
        place.write_bytes(content)
        assert "its member 0/0.png is encrypted" in refused(place)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_compressed_in_other_ways_are_refused(self, tmp_path: Path, compression: int) -> None:
        assert f"by method {compression}" in refused(write_zip(tmp_path / "a.zip", FILES, compression))

    def test_of_many_megabytes_are_refused_before_they_are_read(self, tmp_path: Path) -> None:
        """300 MB of zeros in 300 KB."""
        place = write_zip(tmp_path / "a.zip", {**FILES, "0/8.png": bytes(300 << 20)})
        (train,) = load("folder", place)
        assert unreadable(train) == {
            2: f"{place}:0/8.png: of 314,572,800 bytes, where at most 268,435,456 are expected"
        }

    def test_that_grow_beyond_what_they_claim_are_refused(self, tmp_path: Path) -> None:
        """The directory says 100 bytes where 100 MB come."""
        place = write_zip(tmp_path / "a.zip", {"0/0.png": bytes(100 << 20)})
        content = bytearray(place.read_bytes())
        for signature, field in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
            struct.pack_into("<I", content, content.index(signature) + field, 100)
        place.write_bytes(content)
        assert "0/0.png: it differs from its checksum" in refused(place)


class TestDamage:
    @pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.99])
    @pytest.mark.parametrize("kind", ["zip", "tar", "gz", "bz2", "xz"])
    def test_a_cut_archive_is_refused(self, tmp_path: Path, kind: str, share: float) -> None:
        place = make_archive(tmp_path, kind)
        content = place.read_bytes().rstrip(b"\0")  # a tar is filled up with zeros
        place.write_bytes(content[: int(len(content) * share)])
        refused(place)

    @pytest.mark.parametrize("kind", ["zip", "tar", "gz", "bz2", "xz"])
    @given(data=st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=150)
    def test_whatever_is_changed_no_picture_is_lost_without_a_word(
        self, tmp_path: Path, kind: str, data: st.DataObject
    ) -> None:
        place = make_archive(tmp_path, kind)
        content = bytearray(place.read_bytes())
        # The checksum of a tar's header is a sum, which two changes may leave as it is.
        for _ in range(1 if kind == "tar" else data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        place.write_bytes(content)
        found = outcome(place)
        # A name has no checksum in a zip, so a changed one is another name.
        assert found != "other" or kind == "zip"

    def test_a_header_that_is_no_more_is_not_taken_for_the_end(self, tmp_path: Path) -> None:
        place = write_tar(tmp_path / "a.tar", FILES)
        content = bytearray(place.read_bytes())
        start = content.index(b"0/2.png")
        content[start + 200] ^= 0xFF
        place.write_bytes(content)
        assert f"a damaged header (its checksum is wrong) (header at byte {start:,})" in refused(place)

    def test_a_tar_without_its_end_is_refused(self, tmp_path: Path) -> None:
        place = write_tar(tmp_path / "a.tar", FILES)
        content = place.read_bytes()
        place.write_bytes(content[: len(content.rstrip(b"\0")) // 512 * 512 + 512])
        assert "it ends without the zeros that end a tar file" in refused(place)

    @pytest.mark.parametrize("content", [b"", b"text", b"PK", b"PK\x03\x04", bytes(3000), b"path,label\n" * 100])
    def test_what_is_no_archive_is_told(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.zip").write_bytes(content)
        assert refused(tmp_path / "a.zip")

    def test_a_size_below_zero_does_not_lead_in_circles(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("0/9.png")
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[124:136] = b"\xff" + (-512).to_bytes(11, "big", signed=True)
        header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
        whole = write_tar(tmp_path / "whole.tar", FILES).read_bytes()
        for place, content in (("first.tar", bytes(header) + whole), ("later.tar", whole[:1024] + bytes(header))):
            (tmp_path / place).write_bytes(content)
            refused(tmp_path / place)

    @pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
    def test_a_header_that_claims_to_be_huge_is_not_read(self, tmp_path: Path, kind: bytes) -> None:
        place = write_tar(tmp_path / "a.tar", {"x": special(kind, size=7 << 30), **FILES}, "w")
        assert "claims 7,516,192,768 bytes" in refused(place)


def halves(directory: Path) -> list[bytes]:
    """Two tars that hold the files together."""
    names = list(FILES)
    parts = [{name: FILES[name] for name in chosen} for chosen in (names[:2], names[2:])]
    return [write_tar(directory / f"half{number}.tar", part).read_bytes() for number, part in enumerate(parts)]


class TestConcatenation:
    """What stands behind the end of an archive is read or refused, never ignored."""

    @pytest.mark.parametrize("zeros", [0, 512, 1 << 20])
    @pytest.mark.parametrize("compress", [None, gzip.compress], ids=["tar", "gz of both"])
    def test_tars_in_one_file_are_read_as_one(
        self, tmp_path: Path, zeros: int, compress: Callable[[bytes], bytes] | None
    ) -> None:
        content = bytes(zeros).join(halves(tmp_path)) + bytes(zeros)
        (tmp_path / "a.tar").write_bytes(compress(content) if compress else content)
        assert outcome(tmp_path / "a.tar") == "whole"

    def test_compressed_tars_in_one_file_are_read_as_one(self, tmp_path: Path) -> None:
        (tmp_path / "a.tgz").write_bytes(b"".join(map(gzip.compress, halves(tmp_path))))
        assert outcome(tmp_path / "a.tgz") == "whole"

    def test_an_interrupted_append_is_refused(self, tmp_path: Path) -> None:
        first, second = halves(tmp_path)
        (tmp_path / "a.tar").write_bytes(first + second[:600])
        assert "claims" in refused(tmp_path / "a.tar")

    @pytest.mark.parametrize("garbage", [b"x", b"x" * 512, b"PK\3\4" * 300, bytes(512) + b"x"])
    def test_garbage_behind_the_end_is_refused(self, tmp_path: Path, garbage: bytes) -> None:
        place = write_tar(tmp_path / "a.tar", FILES)
        place.write_bytes(place.read_bytes() + garbage)
        assert "header" in refused(place)

    def test_zips_in_one_file_are_refused(self, tmp_path: Path) -> None:
        names = list(FILES)
        contents = [
            write_zip(tmp_path / "half.zip", {name: FILES[name] for name in chosen}).read_bytes()
            for chosen in (names[:2], names[2:])
        ]
        (tmp_path / "a.zip").write_bytes(b"".join(contents))
        assert f"{len(contents[0]):,} bytes before its first member" in refused(tmp_path / "a.zip")
        (tmp_path / "a.zip").write_bytes(contents[0] + b"PK\3\4")
        assert "4 bytes behind its end" in refused(tmp_path / "a.zip")

    def test_a_comment_of_a_zip_is_no_garbage(self, tmp_path: Path) -> None:
        place = write_zip(tmp_path / "a.zip", FILES)
        with zipfile.ZipFile(place, "a") as archive:
            archive.comment = b"by hand"
        assert outcome(place) == "whole"


class TestBombs:
    @pytest.fixture(autouse=True)
    def small_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "_MIN_EXPANDED_BYTES", 1 << 20)

    @pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
    def test_a_tar_that_grows_a_thousandfold_is_refused(self, tmp_path: Path, kind: str) -> None:
        place = write_tar(tmp_path / f"a.{kind}", {"0/0.png": bytes(20 << 20)}, f"w:{kind}")
        assert "it expands to more than" in refused(place)

    def test_a_tar_of_many_equal_pictures_is_none(self, tmp_path: Path) -> None:
        files = {f"0/{number}.png": picture(IMAGES[0]) for number in range(3000)}
        (train,) = load("folder", write_tar(tmp_path / "a.tgz", files, "w:gz"))
        assert len(train.labels) == 3000

    def test_the_limit_follows_the_size(self) -> None:
        assert max_expanded_bytes(0) == 1 << 20 and max_expanded_bytes(10**9) > 10**10


class TestSpool:
    def test_leaves_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        spool = TempFile("it", 100)
        spool.write(b"abc")
        file = spool.finish()
        assert file.read(1, 2) == b"bc" and list(tmp_path.iterdir()) == []

    def test_a_full_disk_is_told_before_it_is_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        free = [10 << 30]
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free[0]))
        spool = TempFile("set.tgz", 10 << 30)
        spool.write(bytes(1000))
        free[0] = 100 << 20
        with pytest.raises(UserError) as caught:
            spool.write(bytes(65 << 20))
        assert "no room to unpack set.tgz" in caught.value.found and "TMPDIR=" in caught.value.hint
        assert "no room" in refusal(lambda: TempFile("set.tgz", 1)).found

    def test_more_than_there_may_be_is_refused(self) -> None:
        spool = TempFile("it", 100)
        with pytest.raises(CorruptFileError):
            spool.write(bytes(101))


class TestStoredFile:
    @pytest.mark.parametrize("with_pread", [True, False])
    def test_reads_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_pread: bool) -> None:
        if not with_pread:
            monkeypatch.delattr("os.pread")
        content = np.random.default_rng(0).bytes(5000)
        (tmp_path / "x").write_bytes(content)
        with open(tmp_path / "x", "rb") as opened:
            file = StoredFile(opened)
            assert file.read(100, 50) == content[100:150] and file.read(0, 5000) == content
            assert bytes(file.mapped()) == content
            for offset, size in ((4999, 2), (-1, 2), (0, -1), (1 << 40, 1)):
                with pytest.raises(CorruptFileError):
                    file.read(offset, size)
            (tmp_path / "x").write_bytes(content[:10])
            with pytest.raises(CorruptFileError, match="changed meanwhile"):
                file.read(5, 10)

    def test_a_compressed_tar_is_read_where_reads_move_the_position(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on Windows."""
        place = write_tar(tmp_path / "a.tar.gz", FILES, "w:gz")
        monkeypatch.delattr("os.pread")
        assert outcome(place) == "whole"


class TestDecompression:
    @pytest.mark.parametrize("compress", ["gzip", "bz2", "lzma"])
    @given(parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4), zeros=st.integers(0, 3))
    def test_several_streams_are_one(self, compress: str, parts: list[bytes], zeros: int) -> None:
        module = __import__(compress)
        content = bytes(4 * zeros).join(module.compress(part) for part in parts) + bytes(4 * zeros)
        assert is_compressed(content[:6])
        assert b"".join(decompress(io.BytesIO(content))) == b"".join(parts)

    def test_large_content_comes_in_small_chunks(self) -> None:
        content = gzip.compress(bytes(50 << 20))
        sizes = [len(chunk) for chunk in decompress(io.BytesIO(content))]
        assert sum(sizes) == 50 << 20 and max(sizes) <= 1 << 20

    @pytest.mark.parametrize(
        "damage", [lambda c: c[:-1], lambda c: c + b"x", lambda c: c[:50] + bytes([c[50] ^ 1]) + c[51:]]
    )
    @pytest.mark.parametrize("compress", ["gzip", "bz2", "lzma"])
    def test_damage_is_told(self, compress: str, damage: Callable[[bytes], bytes]) -> None:
        content = __import__(compress).compress(np.random.default_rng(0).bytes(1000))
        with pytest.raises(CorruptFileError, match="does not decompress"):
            list(decompress(io.BytesIO(damage(content))))


def make_archive(directory: Path, kind: str) -> Path:
    if kind == "zip":
        return write_zip(directory / "a.zip", FILES)
    return write_tar(directory / f"a.{kind}", FILES, "w" if kind == "tar" else f"w:{kind}")
