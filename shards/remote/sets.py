"""Addresses: sets and raw files that lie elsewhere, fetched once into the local cache; and packed sets put there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from tqdm import tqdm

from shards.atomic import make_directory, write_file
from shards.errors import UserError
from shards.manifest import ALL_PARTS, MANIFEST_NAME, PARTS, Manifest
from shards.remote.base import Listed, Missing, Place, Refused, Unreachable, explained, open_place, patiently
from shards.remote.cache import Entry, cache_directory, open_entry
from shards.remote.download import THREADS, Wanted, check_names, disk_trouble, fetch_files

log = logging.getLogger(__name__)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_INDEX = ".index.json"
_WHOLE = ""  # stands for the part, where an address is a single one
_ATTEMPTS_WITH_COPY = 2  # at the manifests, when a copy in the cache can stand in


def is_remote(address: str | Path) -> bool:
    """Whether an address names a place on the network. A path never does, nor does file://."""
    text = str(address)
    return _SCHEME.match(text) is not None and not text.lower().startswith("file:")


def resolve_dataset(address: str | Path) -> Path:
    """The local directory of a packed set or of a single part, fetched into the cache first if it is remote.

    A set whose manifests have not changed is not fetched again; without a network, what was fetched last stands in,
    with a warning. It stays in the cache as long as this process lives. Raises `UserError`.
    """
    if not is_remote(address):
        return _local(address)
    with explained():
        place = open_place(str(address))
        copy = _Copy(place)
        try:
            manifests = _read_manifests(place, _ATTEMPTS_WITH_COPY if copy.exists() else None)
        except Unreachable as error:
            directory = copy.use()
            if directory is None:
                raise
            log.warning("%s cannot be reached (%s): the copy in %s is used", place.shown, error.reason, directory)
            return directory
        _check_complete(place, manifests)
        return _fetch_set(place, manifests, copy)


def resolve_files(address: str | Path) -> Path:
    """The local path of raw files, a directory or a single file, fetched into the cache first if they are remote.

    Files whose size and version (ETag or time) have not changed are not fetched again. Raises `UserError`.
    """
    if not is_remote(address):
        return _local(address)
    with explained():
        place = open_place(str(address))
        listed = patiently(place.find)
        key = _digest(place.shown.rstrip("/"))
        last = place.shown.partition("?")[0].rstrip("/").rpartition("/")[2]
        if set(listed) != {""}:
            return _mirror(place, listed, key, _readable(last))
        place, name = _parent(str(address))
        return _mirror(place, {name: listed[""]}, key, _readable(last)) / name


def remote_manifests(address: str) -> dict[str, Manifest]:
    """The manifests of the parts that lie at an address, by part; empty if there are none.

    Raises `UserError` if there is no such bucket, or no way to it.
    """
    with explained():
        try:
            return {part: manifest for part, (manifest, _) in _read_manifests(open_place(address)).items() if part}
        except Missing as error:
            if error.no_bucket:
                raise
            return {}


def check_upload(address: str) -> None:
    """Raise `UserError` now if files could not be written to an address later: writes a small one, and removes it."""
    name = ".inkstream-check"
    with tempfile.TemporaryDirectory() as directory, explained():
        place = open_place(address)
        (Path(directory) / name).write_text("May Inkstream write here?", encoding="utf-8")
        patiently(lambda: place.put(Path(directory) / name, name))
        patiently(lambda: _remove_if_there(place, name))


def remove_manifests(address: str) -> None:
    """Make a pack at an address incomplete, so that its files may be replaced."""
    with explained():
        _remove_manifests(open_place(address))


def upload_files(directory: Path, address: str) -> None:
    """Upload everything below a directory but the manifests of parts."""
    manifests = {f"{part}/{MANIFEST_NAME}" for part in ALL_PARTS}
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    with explained():
        _upload(directory, open_place(address), sorted(names - manifests))


def upload_manifests(directory: Path, address: str) -> None:
    """Upload the manifests of the parts below a directory: the last step, with which the pack is complete."""
    with explained():
        _upload_manifests(directory, open_place(address))


def upload_set(directory: Path, address: str) -> None:
    """Upload a packed set: the files that its manifests name, then the manifests. What was packed there is replaced."""
    manifests = {part: Manifest.read(directory / part) for part in ALL_PARTS if (directory / part).is_dir()}
    with explained():
        place = open_place(address)
        _remove_manifests(place)
        _upload(directory, place, [f"{part}/{file.name}" for part in manifests for file in manifests[part].everything])
        _upload_manifests(directory, place)


def _local(address: str | Path) -> Path:
    """A plain path unchanged, file:// without its scheme."""
    text = str(address)
    if not text.lower().startswith("file://"):
        return Path(address)
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path))


def _parent(address: str) -> tuple[Place, str]:
    """The place that a single file lies in, and its name there."""
    path, mark, query = address.partition("?")
    above, _, name = path.rstrip("/").rpartition("/")
    web = address.lower().startswith("http")
    return open_place(f"{above}{mark}{query}"), urllib.parse.unquote(name) if web else name


def _read_manifests(place: Place, attempts: int | None = None) -> dict[str, tuple[Manifest, bytes]]:
    """The manifests at a place, by part (`_WHOLE` for that of a single part), each with the bytes of its file."""

    def read(part: str) -> tuple[Manifest, bytes] | Missing | Refused:
        name = f"{part}/{MANIFEST_NAME}" if part else MANIFEST_NAME
        try:
            content = patiently(lambda: place.read(name), attempts)
        except (Missing, Refused) as error:
            return error
        try:
            return Manifest.parse(content, place.show(name)), content
        except UserError:  # damaged on the way, perhaps
            content = patiently(lambda: place.read(name), attempts)
            return Manifest.parse(content, place.show(name)), content

    parts = (*ALL_PARTS, _WHOLE)
    with ThreadPoolExecutor(len(parts)) as pool:
        answers = dict(zip(parts, pool.map(read, parts), strict=True))
    found = {part: answer for part, answer in answers.items() if isinstance(answer, tuple)}
    if not found:
        # S3 refuses those who may not list a bucket what is merely not there: of both, the refusal says more.
        errors = [answer for answer in answers.values() if isinstance(answer, Exception)]
        telling = (error for error in errors if isinstance(error, Refused) or error.no_bucket)
        raise next(telling, Missing(place.shown, f"no {MANIFEST_NAME}, of a set's parts or of a single one"))
    if len(found) > 1:
        found.pop(_WHOLE, None)
    return found


def _check_complete(place: Place, manifests: Mapping[str, object]) -> None:
    absent = [f"{part}/{MANIFEST_NAME}" for part in PARTS if part not in manifests]
    if absent and _WHOLE not in manifests:
        raise UserError(
            found=f"{place.shown} without {' and '.join(absent)}",
            expected=f"a complete set: {' and '.join(PARTS)}, each with {MANIFEST_NAME}",
            hint="wait until it is written, or pack it again: python -m pipeline.shard SOURCE --out ADDRESS",
        )


def _fetch_set(place: Place, manifests: dict[str, tuple[Manifest, bytes]], copy: _Copy) -> Path:
    """Bring a set into the cache, where it is named by its content: another set is another entry."""
    files = [
        Wanted(f"{part}/{file.name}" if part else file.name, file.bytes, file.sha256)
        for part, (manifest, _) in manifests.items()
        for file in manifest.everything
    ]
    names = {part: f"{part}/{MANIFEST_NAME}" if part else MANIFEST_NAME for part in manifests}
    check_names([*files, *(Wanted(name, 0) for name in names.values())], place)
    first, _ = next(iter(manifests.values()))
    key = _digest(*(f"{part} {manifest.digest()}" for part, (manifest, _) in manifests.items()))
    name = _readable(first.name)
    with open_entry("sets", key, name) as entry:
        complete = all((entry.content / name).is_file() for name in names.values())
        if not complete or not all(file.is_in(entry.content) for file in files):
            total = sum(file.bytes for file in files) + sum(len(content) for _, content in manifests.values())
            entry.make_room(total, place.shown)
            fetch_files(place, files, entry.content, entry.partials, f"fetching {name}")
            try:
                for part, (_, content) in manifests.items():
                    write_file(entry.content / names[part], content)
            except OSError as error:
                raise disk_trouble(error, entry.content) from None
            shutil.rmtree(entry.partials)
        copy.remember(entry, list(names.values()))
        return entry.content


class _Copy:
    """What was fetched last from a place, by the hash of its address: an address may hold secrets."""

    def __init__(self, place: Place) -> None:
        self._record = cache_directory() / "addresses" / _digest(place.shown.rstrip("/"))

    def exists(self) -> bool:
        return self._record.is_file()

    def remember(self, entry: Entry, manifests: list[str]) -> None:
        content = {"key": entry.directory.name, "name": entry.content.name, "manifests": manifests}
        make_directory(self._record.parent)
        temporary = self._record.with_name(f".{self._record.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self._record)

    def use(self) -> Path | None:
        """The directory of the copy, None if it is not whole or there is none."""
        if not self.exists():
            return None
        content = json.loads(self._record.read_text(encoding="utf-8"))
        if not (cache_directory() / "sets" / content["key"]).is_dir():
            return None
        with open_entry("sets", content["key"], content["name"]) as entry:
            whole = all((entry.content / name).is_file() for name in content["manifests"])
            return entry.content if whole else None


def _mirror(place: Place, listed: dict[str, Listed], key: str, name: str) -> Path:
    """Bring the files of a place into the cache, and remove there what is not in the place any more."""
    files = [Wanted(name, info.bytes, version=info.version) for name, info in sorted(listed.items())]
    check_names(files, place)
    versions = {file.name: [file.bytes, file.version] for file in files}
    with open_entry("files", key, name) as entry:
        index = entry.directory / _INDEX
        known = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        stale = [entry.content / name for name in known if known[name] != versions.get(name)]
        if any(path.exists() for path in stale):
            busy = UserError(
                found=f"{place.shown}, which has changed while another process reads an earlier copy of it",
                expected="raw files that stay as they are while they are packed",
                hint="run again when that process has ended",
            )
            with entry.alone(busy):
                for path in stale:
                    path.unlink(missing_ok=True)
        if not all(file.is_in(entry.content) for file in files):
            entry.make_room(sum(file.bytes for file in files), place.shown)
            write_file(index, json.dumps(versions))
            fetch_files(place, files, entry.content, entry.partials, f"fetching {name}")
            shutil.rmtree(entry.partials)
        elif known != versions:
            write_file(index, json.dumps(versions))
        return entry.content


def _remove_manifests(place: Place) -> None:
    for name in (f"{part}/{MANIFEST_NAME}" for part in ALL_PARTS):
        patiently(lambda name=name: _remove_if_there(place, name))


def _upload_manifests(directory: Path, place: Place) -> None:
    # `val` first: a set is complete with train and test, and must have all of its parts then.
    for part in reversed(ALL_PARTS):
        if (directory / part / MANIFEST_NAME).is_file():
            _upload(directory, place, [f"{part}/{MANIFEST_NAME}"])


def _upload(directory: Path, place: Place, names: Sequence[str]) -> None:
    """Upload files side by side, and check each at the other side."""
    # Every file is a commit at Hugging Face, and only one is possible at a time.
    threads = 1 if place.shown.lower().startswith("hf:") else THREADS
    total = sum((directory / name).stat().st_size for name in names)
    bar = tqdm(total=total, desc="uploading", unit="B", unit_scale=True, leave=False, disable=None)
    stop = Event()

    def put(name: str) -> None:
        patiently(lambda: _put(place, directory / name, name), stop=stop)
        bar.update((directory / name).stat().st_size)

    with bar, ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(put, names):
                pass
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _put(place: Place, path: Path, name: str) -> None:
    place.put(path, name)
    there = place.info(name)
    size = path.stat().st_size
    if there.bytes != size:
        raise Unreachable(place.show(name), f"{there.bytes:,} of {size:,} bytes arrived")
    if there.md5 is not None and there.md5 != _hash(path, "md5"):
        # Other bytes, or a service that encrypts what it keeps: reading it back tells.
        back = hashlib.sha256()
        for chunk in place.stream(name, 0, size):
            back.update(chunk)
        if back.hexdigest() != _hash(path, "sha256"):
            raise Unreachable(place.show(name), "other bytes arrived than were sent")


def _hash(path: Path, algorithm: str) -> str:
    def new() -> hashlib._Hash:
        return hashlib.new(algorithm, usedforsecurity=False)

    with open(path, "rb") as file:
        return hashlib.file_digest(file, new).hexdigest()


def _remove_if_there(place: Place, name: str) -> None:
    try:
        place.info(name)
        place.remove(name)
    except Missing:
        pass


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _readable(name: str) -> str:
    """A name for a directory, whatever the name holds."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60] or "unnamed"
