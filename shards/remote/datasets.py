"""Resolve addresses of packed data sets and raw files to local paths in the cache, and upload packed data sets."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

from tqdm import tqdm

from shards import credentials, errors
from shards.atomic import make_directory, read_json, write_file
from shards.errors import MismatchError, UserError
from shards.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, REQUIRED_SPLITS, SPLITS, Manifest
from shards.remote.backends import open_storage
from shards.remote.base import AccessDeniedError, FileInfo, NotFoundError, RemoteStorage, TransientError, retry
from shards.remote.cache import DIRECTORY_VARIABLE, Entry, cache_directory, open_entry, write_record
from shards.remote.download import RemoteFile, check_names, download_files, remove, run_in_threads
from shards.remote.on_demand import is_read_on_demand, min_room, register_on_demand, select_on_demand

log = logging.getLogger(__name__)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_INDEX = ".index.json"
_SINGLE = ""  # in place of the name of a split, if the address is that of a single split
_UPGRADE = (
    ". A data set of format version 3 needs less: upgrade a local copy (python -m shards.convert DIR), upload it again"
)
_ATTEMPTS_WITH_COPY = 2  # for the manifests, if the cache holds a copy


def is_remote(address: str | Path) -> bool:
    """Whether an address is on the network. A path never is, nor is file://."""
    text = str(address)
    return _SCHEME.match(text) is not None and not text.lower().startswith("file:")


def resolve_local(address: str) -> Path:
    """Return a path, and that of a file:// address; raise `UserError` for an address on the network."""
    if is_remote(address):
        raise UserError(
            found=f"{address}, which is not on this machine",
            expected="a local directory",
            hint="use a local directory; transfer the files with the tool of the storage, such as aws s3 sync",
        )
    return _local_path(address)


def resolve_dataset(address: str | Path, whole: bool = False) -> Path:
    """Return the local directory of a packed data set or of one split, downloaded into the cache if it is remote.

    A data set is downloaded again only if its manifests have changed. Without a network the last copy is used, with a
    warning. The data set is not evicted from the cache while this process runs. If it exceeds the cache, its shards
    are not in the directory: `SplitFiles` fetches them when it opens them.

    Args:
        address: A path, or an address such as s3://bucket/name.
        whole: Whether all files are needed in the directory.

    Raises:
        UserError: If the data set cannot be reached, is incomplete, or does not fit into the cache.
    """
    if not is_remote(address):
        return _local_path(address)
    storage = open_storage(str(address))
    record = cache_directory() / "addresses" / _digest(credentials.canonical_address(str(address)))
    try:
        manifests = _read_manifests(storage, _ATTEMPTS_WITH_COPY if os.path.isfile(record) else None)
    except TransientError as error:
        directory = _last_copy(record)
        if directory is None:
            raise
        log.warning("%s cannot be reached (%s): the copy in %s is used", storage.shown, error.reason, directory)
        return directory
    absent = [_manifest_name(split) for split in REQUIRED_SPLITS if split not in manifests]
    if absent and _SINGLE not in manifests:
        raise errors.NotFoundError(
            found=f"{storage.shown} without {' and '.join(absent)}",
            expected=f"a complete data set: {' and '.join(REQUIRED_SPLITS)}, each with {MANIFEST_NAME}",
            hint="wait until its upload has ended, or pack it again: python -m pipeline.shard SOURCE --out ADDRESS",
        )
    return _download_set(storage, manifests, record, whole)


def resolve_files(address: str | Path) -> Path:
    """Return the local path of raw files, a directory or a single file, downloaded into the cache if they are remote.

    A file is downloaded again only if its size or version (ETag or time) has changed.

    Args:
        address: A path, or an address such as s3://bucket/name.

    Raises:
        UserError: If the files cannot be reached, or do not fit into the cache.
    """
    if not is_remote(address):
        return _local_path(address)
    storage = open_storage(str(address))
    listed = retry(storage.find)
    key = _digest(credentials.canonical_address(str(address)))
    label = _directory_name(credentials.parse_address(storage.shown).path.rstrip("/").rpartition("/")[2])
    if set(listed) != {""}:
        return _mirror(storage, listed, key, label)
    name = _file_name(str(address))
    return _mirror(_SingleFile(storage), {name: listed[""]}, key, label) / name


def remote_manifests(address: str) -> dict[str, Manifest]:
    """Return the manifests at an address by split; empty if there are none.

    Raises:
        UserError: If the bucket does not exist or cannot be reached.
    """
    try:
        return {split: manifest for split, (manifest, _) in _read_manifests(open_storage(address)).items() if split}
    except NotFoundError as error:
        if error.no_bucket:
            raise
        return {}


def check_upload(address: str) -> None:
    """Upload a small file and delete it, so that an address without write access fails before packing.

    Raises:
        UserError: If the address cannot be written to.
    """
    name = ".inkstream-check"
    storage = open_storage(address)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / name).write_text("May Inkstream write here?", encoding="utf-8")
        retry(partial(storage.put, Path(directory) / name, name))
        retry(partial(_remove_if_present, storage, name))


def remove_manifests(address: str) -> None:
    """Delete the manifests at an address. The data set is incomplete then, and its files may be replaced."""
    storage = open_storage(address)
    for name in map(_manifest_name, SPLITS):
        retry(partial(_remove_if_present, storage, name))


def upload_files(directory: Path, address: str) -> None:
    """Upload all files below a directory except the manifests."""
    manifests = set(map(_manifest_name, SPLITS))
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    _upload(directory, open_storage(address), sorted(names - manifests))


def upload_manifests(directory: Path, address: str) -> None:
    """Upload the manifests below a directory. This is the last step, which completes the data set."""
    storage = open_storage(address)
    # `val` first: once train and test are there the data set counts as complete.
    for name in map(_manifest_name, reversed(SPLITS)):
        if (directory / name).is_file():
            _upload(directory, storage, [name])


def _local_path(address: str | Path) -> Path:
    """Return a path unchanged, and the path of a file:// address."""
    text = credentials.reveal(str(address))
    if not text.lower().startswith("file://"):
        return Path(address)
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path))


class _SingleFile(RemoteStorage):
    """A storage that is a file, under any name.

    The address of the file is used as it is: servers distinguish addresses that differ only in what is percent-encoded.
    """

    def __init__(self, storage: RemoteStorage) -> None:
        self.shown = storage.shown
        self._storage = storage

    def show(self, name: str) -> str:
        return self.shown

    def stream(
        self, name: str, start: int, size: int | None, version: str = "", max_bytes: int | None = None
    ) -> Iterator[bytes]:
        return self._storage.stream("", start, size, version, max_bytes)

    def find(self) -> dict[str, FileInfo]:
        return self._storage.find()

    def info(self, name: str) -> FileInfo:
        return self._storage.info("")


def _file_name(address: str) -> str:
    """Return the name that a file at an address has on a disk."""
    _, _, path, query = credentials.parse_address(credentials.reveal(address))
    if not address.lower().startswith("http"):
        path = f"{path}{query}"
    name = path.rstrip("/").rpartition("/")[2]
    return urllib.parse.unquote(name).rpartition("/")[2] if address.lower().startswith("http") else name


def _manifest_name(split: str) -> str:
    return f"{split}/{MANIFEST_NAME}" if split else MANIFEST_NAME


def _read_manifests(storage: RemoteStorage, attempts: int | None = None) -> dict[str, tuple[Manifest, bytes]]:
    """Return the manifests of a storage by split (`_SINGLE` for a single split), each with the content of its file."""

    def read(split: str) -> bytes:
        return retry(lambda: storage.read(_manifest_name(split), MAX_MANIFEST_BYTES), attempts)

    manifests: dict[str, tuple[Manifest, bytes]] = {}
    failure: NotFoundError | AccessDeniedError = NotFoundError(
        storage.shown, f"no {MANIFEST_NAME} of a data set or of a single split"
    )
    splits = (*SPLITS, _SINGLE)
    with ThreadPoolExecutor(len(splits)) as pool:
        answers = [pool.submit(read, split) for split in splits]
    for split, answer in zip(splits, answers, strict=True):
        address = storage.show(_manifest_name(split))
        try:
            content = answer.result()
        except (NotFoundError, AccessDeniedError) as error:
            # S3 denies access to absent files if the user may not list the bucket: more useful than their absence.
            if isinstance(error, AccessDeniedError) or error.no_bucket:
                failure = error
            continue
        try:
            manifests[split] = Manifest.parse(content, address), content
        except UserError:  # possibly damaged in transfer
            content = read(split)
            manifests[split] = Manifest.parse(content, address), content
    if not manifests:
        raise failure
    if len(manifests) > 1:
        manifests.pop(_SINGLE, None)
    return manifests


def _download_set(
    storage: RemoteStorage, manifests: dict[str, tuple[Manifest, bytes]], record: Path, whole: bool
) -> Path:
    """Download a data set into the cache entry named by its content, and record it as the copy of its address."""
    splits = {split: manifest for split, (manifest, _) in manifests.items()}
    files = _files_of(splits)
    contents = {_manifest_name(split): content for split, (_, content) in manifests.items()}
    everything = [*files, *(RemoteFile(name, len(content)) for name, content in contents.items())]
    check_names(everything, storage)
    first, key = next(iter(splits.values())), _key_of(splits)
    has_arrays = all(manifest.version >= 3 for manifest in splits.values())
    on_demand = select_on_demand(files) if has_arrays and not whole else []
    advice = "" if has_arrays else _UPGRADE
    with open_entry("sets", key, _directory_name(first.name)) as entry:
        if whole and not entry.read_only and is_read_on_demand(entry):
            raise UserError(
                found=f"{storage.shown}, which another process reads on demand",
                expected="a complete copy in the cache that no process changes",
                hint=f"wait for that process to end, or use another cache: export {DIRECTORY_VARIABLE}=DIR",
            )
        _download_into(entry, storage, files, sum(file.bytes for file in everything), on_demand, advice)
        for name, content in contents.items():
            path = entry.content / name
            if path.is_file() and path.read_bytes() == content:
                continue
            if entry.read_only or os.path.lexists(path):
                entry.remove_damaged(path)
            write_file(path, content)
        # A user who may only read the cache may not be allowed to write the record, which serves without a network.
        refusals = (UserError, OSError) if entry.read_only else ()
        with contextlib.suppress(*refusals):
            make_directory(record.parent)
            write_record(record, {"key": key, "name": entry.content.name, "splits": ",".join(manifests)})
        return entry.content


def _files_of(manifests: dict[str, Manifest]) -> list[RemoteFile]:
    return [
        RemoteFile(f"{split}/{file.name}" if split else file.name, file.bytes, file.sha256)
        for split, manifest in manifests.items()
        for file in manifest.everything
    ]


def _key_of(manifests: dict[str, Manifest]) -> str:
    return _digest(*(f"{split} {manifest.digest()}" for split, manifest in manifests.items()))


def _last_copy(record: Path) -> Path | None:
    """Return the directory of the data set in a record, None if there is none or it is incomplete or damaged.

    The file name of a record is a hash of the address, because the address may contain secrets.
    """
    copy = read_json(record)
    key, name = str(copy.get("key")), str(copy.get("name"))
    splits = [split for split in (*SPLITS, _SINGLE) if split in str(copy.get("splits")).split(",")]
    is_valid = splits and _directory_name(name) == name
    if not is_valid or not re.fullmatch("[0-9a-f]{16}", key) or not os.path.isdir(cache_directory() / "sets" / key):
        return None
    with open_entry("sets", key, name) as entry:
        try:
            manifests = {split: Manifest.read(entry.content / split) for split in splits}
            files = _files_of(manifests)
            entry.check_files(files)
        except UserError:
            return None
        is_complete = key == _key_of(manifests) and all(file.is_in(entry.content) for file in files)
        return entry.content if is_complete else None


def _download_into(
    entry: Entry,
    storage: RemoteStorage,
    files: Sequence[RemoteFile],
    total: int,
    on_demand: Sequence[RemoteFile] = (),
    advice: str = "",
) -> None:
    """Download the files that are missing or damaged into a cache entry, which will have `total` bytes.

    If the cache is too small for all files, the files `on_demand` are fetched when they are opened instead. If it is
    too small for that too, `advice` is appended to the hint of the error.
    """
    if entry.read_only:
        entry.check_files(files)
        if not all(file.is_in(entry.content) for file in files):
            raise entry.refusal(
                f"{entry.directory}, which this user may only read, without all files of {storage.shown}"
            )
        return
    # A process that evicts files may run while another one, with a larger cache, starts.
    is_shared = bool(on_demand) and is_read_on_demand(entry)
    if not is_shared:
        if all(file.is_in(entry.content) for file in files):
            entry.check_files(files)
        if all(file.is_in(entry.content) for file in files):
            return
    others = total - sum(file.bytes for file in on_demand)
    try:
        room = entry.make_room(total, storage.shown, others + min_room(on_demand) if on_demand else None)
    except UserError as error:
        raise type(error)(error.found, error.expected, error.hint + advice) from None
    if is_shared or room < total:
        log.info("%s exceeds the cache: its shards are fetched when they are needed", storage.shown)
        register_on_demand(entry, storage, on_demand, room - others)
        files = sorted(set(files) - set(on_demand), key=lambda file: file.name)
    entry.check_files(files)
    download_files(storage, files, entry.content, entry.directory / ".parts", f"fetching {entry.content.name}")
    entry.check_files(files)


def _mirror(storage: RemoteStorage, listed: dict[str, FileInfo], key: str, label: str) -> Path:
    """Download the files of a storage into the cache, and delete files there that the storage no longer holds."""
    files = [RemoteFile(name, info.bytes, version=info.version) for name, info in sorted(listed.items())]
    check_names(files, storage)
    versions = {file.name: [file.bytes, file.version] for file in files}
    with open_entry("files", key, label) as entry:
        index = entry.directory / _INDEX
        known = read_json(index).get("files")
        if entry.read_only and known != versions:
            raise entry.refusal(
                f"{entry.directory}, which this user may only read, with other files than {storage.shown}"
            )
        if known is None:  # nothing is known of the files that are there
            present = [path for path in entry.content.rglob("*") if not path.is_dir()]
            known = {path.relative_to(entry.content).as_posix(): [] for path in present}
        stale = [entry.content / name for name in known if known[name] != versions.get(name) or not known[name][1]]
        if any(path.exists() for path in stale):
            busy = MismatchError(
                found=f"{storage.shown}, which has changed while another process reads an earlier copy of it",
                expected="raw files that do not change while they are packed",
                hint="run again when that process has ended",
            )
            with entry.exclusive(busy):
                for path in stale:
                    remove(path)
        if known != versions:
            write_record(index, {"files": versions})
        _download_into(entry, storage, files, sum(file.bytes for file in files))
        return entry.content


def _upload(directory: Path, storage: RemoteStorage, names: Sequence[str]) -> None:
    """Upload files in parallel, and check each after its upload."""
    # At Hugging Face every file is a commit, and commits are sequential.
    threads = 1 if storage.shown.lower().startswith("hf:") else None
    total = sum((directory / name).stat().st_size for name in names)

    def upload(name: str, stop: Event) -> None:
        retry(partial(_put, storage, directory / name, name), stop=stop)
        bar.update((directory / name).stat().st_size)

    with tqdm(total=total, desc="uploading", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        run_in_threads(upload, names, threads)


def _put(storage: RemoteStorage, path: Path, name: str) -> None:
    storage.put(path, name)
    info = storage.info(name)
    size = path.stat().st_size
    if info.bytes != size:
        raise TransientError(storage.show(name), f"{info.bytes:,} of {size:,} bytes arrived")
    if info.md5 is None:
        return
    with open(path, "rb") as file:
        sent = hashlib.file_digest(file, _new_md5).hexdigest()
    if info.md5 != sent:
        # Either other bytes arrived, or the service encrypts its files: the content is read back to decide.
        arrived = _new_md5()
        for chunk in storage.stream(name, 0, size):
            arrived.update(chunk)
        if arrived.hexdigest() != sent:
            raise TransientError(storage.show(name), "other bytes arrived than were sent")


def _new_md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


def _remove_if_present(storage: RemoteStorage, name: str) -> None:
    try:
        storage.info(name)
        storage.remove(name)
    except NotFoundError:
        pass


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _directory_name(name: str) -> str:
    """Return a name that is safe for a directory."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60] or "unnamed"
