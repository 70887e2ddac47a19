"""Files that are fetched when they are needed: what is fetched, kept and evicted, by one process and by several."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.full_disk import full_disk

from shards.errors import DiskFullError, MismatchError, UserError
from shards.remote import base, on_demand
from shards.remote.base import FileInfo, RemoteStorage, TransientError
from shards.remote.cache import Entry, open_entry
from shards.remote.download import RemoteFile
from shards.remote.on_demand import OnDemandFiles, is_read_on_demand

SIZE = 1000
CONTENTS = [np.random.default_rng(number).bytes(SIZE) for number in range(12)]
FILES = [
    RemoteFile(f"train/{number:02d}", SIZE, hashlib.sha256(content).hexdigest())
    for number, content in enumerate(CONTENTS)
]
posix = pytest.mark.skipif(sys.platform == "win32", reason="no forks and no locks of byte ranges")


class Storage(RemoteStorage):
    """Files in memory. `spoil` changes an answer or raises; `requests` notes the files by number."""

    def __init__(self) -> None:
        super().__init__("https://host/set")
        self.requests: list[int] = []
        self.spoil: Callable[[int, bytes], bytes] = lambda number, content: content

    def stream(
        self, name: str, start: int, size: int | None, version: str = "", max_bytes: int | None = None
    ) -> Iterator[bytes]:
        number = int(name[-2:])
        self.requests.append(number)
        yield self.spoil(number, CONTENTS[number])[start:size]

    def find(self) -> dict[str, FileInfo]:
        raise NotImplementedError

    def info(self, name: str) -> FileInfo:
        raise NotImplementedError


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(base, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(on_demand, "_ROOM_SECONDS", 0.2)
    monkeypatch.setattr(on_demand, "_YIELD_SECONDS", 0.05)
    monkeypatch.setattr(on_demand, "_RETRY_PAUSE", 0.01)
    with open_entry("sets", "0" * 16, "name") as entry:
        (entry.content / "train").mkdir(parents=True)
        return entry


def open_files(entry: Entry, room: int = 4, storage: Storage | None = None) -> OnDemandFiles:
    """The files in a cache with room for a number of them."""
    return OnDemandFiles(entry, storage or Storage(), FILES, room * SIZE)


def path(files: OnDemandFiles, number: int) -> str:
    return str(files._entry.content / FILES[number].name)


def read(files: OnDemandFiles, number: int) -> bytes:
    with files.held(path(files, number)):
        return Path(path(files, number)).read_bytes()


def present(entry: Entry) -> list[int]:
    return sorted(int(file.name) for file in (entry.content / "train").iterdir())


def use(entry: Entry, number: int, first: int, last: int) -> tuple[str, int, int]:
    return str(entry.content / FILES[number].name), first, last


def uses(entry: Entry, numbers: Iterable[int] = range(12), window: int = 1) -> list[tuple[str, int, int]]:
    """A file a step, each needed for `window` steps."""
    return [use(entry, number, step, step + window - 1) for step, number in enumerate(numbers)]


@contextlib.contextmanager
def child(work: Callable[[], None]) -> Iterator[None]:
    """Run a function in a forked process, which then waits for the end of the block."""
    ready, over = os.pipe(), os.pipe()
    process = os.fork()
    if not process:
        try:
            work()
            os.write(ready[1], b".")
            os.close(over[1])
            os.read(over[0], 1)
        finally:
            os._exit(0)
    os.close(ready[1])
    assert os.read(ready[0], 1) == b".", "the child failed"
    try:
        yield
    finally:
        os.close(over[1])
        os.waitpid(process, 0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_file_is_fetched_when_it_is_opened_and_stays(entry: Entry) -> None:
    storage = Storage()
    files = open_files(entry, storage=storage)
    assert present(entry) == []
    for _ in range(2):
        assert [read(files, number) for number in (3, 1)] == [CONTENTS[3], CONTENTS[1]]
    assert storage.requests == [3, 1] and files.fetched_bytes == 2 * SIZE
    again = open_files(entry, storage=storage)  # as a later process
    assert read(again, 3) == CONTENTS[3] and storage.requests == [3, 1]
    with files.held(str(entry.content / "train" / "labels.npy")) as identity:
        assert identity is None


def test_files_of_an_earlier_complete_copy_are_used(entry: Entry) -> None:
    (entry.content / FILES[5].name).write_bytes(CONTENTS[5])
    (entry.content / FILES[6].name).write_bytes(CONTENTS[5])
    storage = Storage()
    files = open_files(entry, storage=storage)
    assert [read(files, number) for number in (5, 6)] == [CONTENTS[5], CONTENTS[6]]
    assert storage.requests == [6]  # another content than its hash says


def test_without_a_plan_the_least_recently_used_file_is_evicted(entry: Entry) -> None:
    files = open_files(entry)
    for number in (0, 1, 2, 3, 0, 4):
        read(files, number)
    assert present(entry) == [0, 2, 3, 4]


def test_of_files_that_the_epoch_has_passed_the_last_one_is_evicted_first(entry: Entry) -> None:
    """A shuffled epoch needs those that it has not reached yet before those that it has just passed."""
    storage = Storage()
    files = open_files(entry, 6, storage)
    for epoch, order in enumerate([[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]]):
        storage.requests.clear()
        with files.prefetch(uses(entry, order)) as advance:
            for step, number in enumerate(order):
                advance(step)
                assert read(files, number) == CONTENTS[number]
        if epoch:  # a cache that evicts the least recently used file would fetch 0 and 1
            assert len(storage.requests) <= 6


def test_prefetching_is_bounded_by_the_room(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage()
    files = open_files(entry, 10, storage)
    assert files.share == 8 * SIZE
    with files.prefetch(uses(entry, window=2)) as advance:
        for step in range(12):
            advance(step)
            # A quarter of the share is for files of later steps.
            wait_until(lambda step=step: len(set(storage.requests)) == min(12, step + 3))
            time.sleep(0.005)
            assert len(set(storage.requests)) == min(12, step + 3) and len(files._claims) <= 4
            assert read(files, step) == CONTENTS[step]
    assert sorted(storage.requests) == list(range(12)) and files.fetched_bytes == 12 * SIZE
    assert len(present(entry)) == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert files.share == 3 * SIZE  # processes of a host divide its cache


def test_a_long_window_is_fetched_as_far_as_the_share_allows(entry: Entry) -> None:
    files = open_files(entry, 8)
    with files.prefetch([use(entry, number, 0, 9) for number in range(12)]) as advance:
        advance(0)
        wait_until(lambda: len(present(entry)) == 6)
        time.sleep(0.01)
        assert present(entry) == [0, 1, 2, 3, 4, 5]


def test_what_is_needed_longer_than_expected_is_kept(entry: Entry) -> None:
    """A file that a later use names again stays until that one has passed."""
    files = open_files(entry, 8)
    with files.prefetch([use(entry, 0, 0, 0), use(entry, 1, 0, 5), use(entry, 0, 1, 9)]) as advance:
        wait_until(lambda: present(entry) == [0, 1])
        advance(8)
        assert set(files._claims) == {0}


@posix
def test_a_file_that_another_process_needs_is_not_evicted(entry: Entry) -> None:
    files = open_files(entry)
    on_demand._open[entry.content] = files  # its locks are those of a process: forked ones start anew

    def claim() -> None:
        files.claim(0)
        files.fetch(0)

    try:
        with child(claim):
            for number in range(1, 10):
                assert read(files, number) == CONTENTS[number]
            assert 0 in present(entry) and len(present(entry)) == 4
        with contextlib.ExitStack() as stack:
            for number in range(1, 5):
                stack.enter_context(files.held(path(files, number)))
            assert present(entry) == [1, 2, 3, 4]  # it has ended
    finally:
        del on_demand._open[entry.content]


@posix
def test_processes_that_need_everything_leave_no_room(entry: Entry) -> None:
    files = open_files(entry, 2)
    on_demand._open[entry.content] = files

    def claim() -> None:
        for number in (0, 1):
            files.claim(number)
            files.fetch(number)

    try:
        with child(claim):
            with pytest.raises(
                UserError,
                match=r"train/05 in 2\.00KB of the cache: this process reads 0B, and other processes need 2\.00KB",
            ) as caught:
                read(files, 5)
            assert caught.value.hint == "export INKSTREAM_CACHE_SIZE=4.00KB, or run fewer processes at a time"
            assert present(entry) == [0, 1]
        assert read(files, 5) == CONTENTS[5]
    finally:
        del on_demand._open[entry.content]


@posix
def test_processes_fetch_a_file_once(entry: Entry) -> None:
    """The other one waits for the first, and reads what it has fetched."""
    storage, pipe = Storage(), os.pipe()
    files = open_files(entry, storage=storage)
    on_demand._open[entry.content] = files

    def slow(number: int, content: bytes) -> bytes:
        os.write(pipe[1], b".")
        time.sleep(0.2)
        return content

    def fetch() -> None:
        threading.Thread(target=read, args=(files, 7), daemon=True).start()

    storage.spoil = slow
    try:
        with child(fetch):
            assert os.read(pipe[0], 1) == b"."
            assert read(files, 7) == CONTENTS[7]
            assert storage.requests == []
            assert is_read_on_demand(entry)
    finally:
        del on_demand._open[entry.content]


@posix
def test_a_process_that_evicts_files_is_seen_by_others(entry: Entry) -> None:
    def look() -> None:
        on_demand._open.clear()
        assert is_read_on_demand(entry)

    assert not is_read_on_demand(entry)
    files = open_files(entry)
    with child(look):
        pass
    assert read(files, 0) == CONTENTS[0]


@posix
def test_a_forked_process_reads_while_its_parent_fetches(entry: Entry) -> None:
    storage = Storage()
    files = open_files(entry, 8, storage)
    on_demand._open[entry.content] = files

    def slow(number: int, content: bytes) -> bytes:
        time.sleep(0.05)
        return content

    def reads() -> None:
        for number in (0, 11, 3):
            assert read(files, number) == CONTENTS[number]

    storage.spoil = slow
    try:
        with files.prefetch(uses(entry, window=12)) as advance:
            advance(0)
            with child(reads):
                pass
            reads()
    finally:
        del on_demand._open[entry.content]


@posix
def test_an_iterator_that_a_forked_process_inherits_goes_on_and_ends_there(entry: Entry) -> None:
    """Its files are fetched by the steps then. The iterator of the parent is not affected."""
    files = open_files(entry, 8)
    on_demand._open[entry.content] = files
    prefetch = files.prefetch(uses(entry))
    advance = prefetch.__enter__()
    advance(0)
    assert read(files, 0) == CONTENTS[0]

    def goes_on() -> None:
        for step in range(1, 6):
            advance(step)
            assert read(files, step) == CONTENTS[step]
        prefetch.__exit__(None, None, None)

    try:
        with child(goes_on):
            pass
        for step in range(1, 12):
            advance(step)
            assert read(files, step) == CONTENTS[step]
    finally:
        prefetch.__exit__(None, None, None)
        del on_demand._open[entry.content]


def test_an_error_appears_where_the_file_is_needed(entry: Entry) -> None:
    """Other steps go on, and the file is fetched when the server has it again."""
    storage = Storage()
    files = open_files(entry, 8, storage)
    storage.spoil = lambda number, content: bytes(SIZE) if number == 2 else content
    with files.prefetch(uses(entry, range(5))) as advance:
        for step in (0, 1):
            advance(step)
            assert read(files, step) == CONTENTS[step]
        advance(2)
        with pytest.raises(MismatchError, match="train/02, whose content has SHA-256"):
            read(files, 2)
        storage.spoil = lambda number, content: content
        assert read(files, 2) == CONTENTS[2]


def test_the_network_is_cut_and_returns(entry: Entry) -> None:
    """Files that have arrived are read meanwhile, and the others arrive later."""
    storage, is_cut = Storage(), threading.Event()

    def spoil(number: int, content: bytes) -> bytes:
        if is_cut.is_set():
            raise TransientError(storage.show(f"train/{number:02d}"), "cut")
        return content

    storage.spoil = spoil
    files = open_files(entry, 24, storage)
    with files.prefetch(uses(entry)) as advance:
        advance(0)
        wait_until(lambda: len(present(entry)) == 6)
        is_cut.set()
        for step in range(6):
            advance(step)
            assert read(files, step) == CONTENTS[step]
        with pytest.raises(TransientError, match="no way to reach https://host/set/train/06: cut"):
            read(files, 6)
        is_cut.clear()
        for step in range(6, 12):
            advance(step)
            assert read(files, step) == CONTENTS[step]


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(entry: Entry) -> None:
    files = open_files(entry)
    read(files, 0)
    Path(path(files, 0)).write_bytes(CONTENTS[1])
    assert read(files, 0) == CONTENTS[0] and files.fetched_bytes == 2 * SIZE


def test_a_full_disk(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that nobody needs make room; without any there is one message."""
    files = open_files(entry, 8)
    for number in range(3):
        read(files, number)
    download, free = on_demand.download_file, [1]

    def on_full_disk(storage: Storage, file: RemoteFile, target: Path, *rest: object) -> None:
        if len(present(entry)) >= free[0]:
            raise DiskFullError(found="no space left on device", expected="room", hint="df -h")
        download(storage, file, target, *rest)

    monkeypatch.setattr(on_demand, "download_file", on_full_disk)
    assert read(files, 5) == CONTENTS[5]
    assert present(entry) == [5]
    free[0] = 0
    with pytest.raises(DiskFullError):
        read(files, 6)
    assert present(entry) == []
    free[0] = 9
    assert read(files, 6) == CONTENTS[6]


@pytest.mark.parametrize("first", range(3))
def test_a_write_fails(entry: Entry, first: int) -> None:
    files = open_files(entry)
    with full_disk(entry.directory, first, errno.ENOSPC), pytest.raises(DiskFullError):
        for number in range(4):
            read(files, number)
    assert [read(files, number) for number in range(4)] == CONTENTS[:4]


def test_the_end_of_an_epoch_ends_the_threads(entry: Entry) -> None:
    storage, waits = Storage(), threading.Event()

    def spoil(number: int, content: bytes) -> bytes:
        waits.wait(0.05)
        return content

    storage.spoil = spoil
    files = open_files(entry, storage=storage)

    def is_fetching() -> bool:
        return any(thread.name == "fetch" for thread in threading.enumerate())

    with files.prefetch(uses(entry)) as advance:
        advance(0)
        assert is_fetching()
    assert not is_fetching() and not files._claims
    assert read(files, 11) == CONTENTS[11]


def test_several_iterators_share_one_budget(entry: Entry) -> None:
    """Of training, evaluation and the next epoch at the same time: each of them needs other files, for long."""
    files = open_files(entry, 6)
    orders = [range(12), range(11, -1, -1), [5, 0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 11]]
    with contextlib.ExitStack() as stack:
        iterators = [stack.enter_context(files.prefetch(uses(entry, order, window=6))) for order in orders]
        for step in range(12):
            for advance, order in zip(iterators, orders, strict=True):
                advance(step)
                assert read(files, order[step]) == CONTENTS[order[step]]
                with files._mutex:
                    assert len(files._claims) * SIZE <= files.share + 2 * SIZE
                assert len(present(entry)) <= 6
    assert not files._claims


def test_an_iterator_that_rests_holds_up_no_other(entry: Entry) -> None:
    """The training has its window in the cache while evaluations keep files too."""
    files = open_files(entry, 6)
    with files.prefetch([use(entry, number, 0, 99) for number in range(6)]) as advance:
        advance(0)
        wait_until(lambda: len(present(entry)) == 4)
        for _ in range(2):
            with files.prefetch(uses(entry, window=4)) as advance_evaluation:
                for step in range(12):
                    advance_evaluation(step)
                    assert read(files, step) == CONTENTS[step]
        assert {0, 1, 2, 3} <= set(present(entry)), "the window is kept"


def test_iterators_in_threads_each_need_a_file(entry: Entry) -> None:
    """More of them than the budget has files."""
    files, failures = open_files(entry, 4), []

    def iterate(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(12).tolist()
        try:
            with files.prefetch(uses(entry, order, window=4)) as advance:
                for step, number in enumerate(order):
                    advance(step)
                    assert read(files, number) == CONTENTS[number]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=iterate, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(present(entry)) <= 4


def test_a_file_that_two_iterators_need_counts_once(entry: Entry) -> None:
    files = open_files(entry, 6)
    with files.prefetch([use(entry, number, 0, 9) for number in range(2)]) as one:
        wait_until(lambda: present(entry) == [0, 1])
        with files.prefetch([use(entry, number, 0, 9) for number in range(2)]) as other:
            wait_until(lambda: [claim.count for claim in files._claims.values()] == [2, 2])
            assert files._kept_bytes == 2 * SIZE
            one(10)
            assert set(files._claims) == {0, 1}
            other(10)
            assert not files._claims and not files._kept_bytes


@posix
def test_a_step_takes_the_room_of_files_that_later_steps_need(entry: Entry) -> None:
    """Two processes that keep all they can would wait for each other otherwise."""
    files = open_files(entry, 6)
    on_demand._open[entry.content] = files

    def rest() -> None:
        for number in range(4):
            files.claim(number)
            files.fetch(number)

    try:
        with child(rest), files.prefetch([use(entry, number, 0, 99) for number in range(4, 8)]) as advance:
            advance(0)
            wait_until(lambda: len(present(entry)) == 6)
            for number in (11, 10, 9):
                assert read(files, number) == CONTENTS[number]
            assert {0, 1, 2, 3} <= set(present(entry)), "another process needs them"
    finally:
        del on_demand._open[entry.content]


def test_files_whose_steps_have_passed_are_not_fetched(entry: Entry) -> None:
    storage = Storage()
    files = open_files(entry, 4, storage)
    with files.prefetch([use(entry, 10, 0, 99), use(entry, 11, 0, 99)]):
        wait_until(lambda: present(entry) == [10, 11])
        with files.prefetch(uses(entry, range(5))) as advance:  # there is no room for it
            advance(5)
            time.sleep(0.05)
    assert set(storage.requests) <= {0, 10, 11}


def test_a_step_takes_the_space_of_later_files_on_a_full_disk(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_files(entry, 8)
    download = on_demand.download_file

    def on_full_disk(storage: Storage, file: RemoteFile, target: Path, *rest: object) -> None:
        if len(present(entry)) >= 3:
            raise DiskFullError(found="no space left on device", expected="room", hint="df -h")
        download(storage, file, target, *rest)

    monkeypatch.setattr(on_demand, "download_file", on_full_disk)
    monkeypatch.setattr(on_demand, "_RETRY_PAUSE", 10.0)
    with files.prefetch([use(entry, number, 0, 99) for number in range(3)]) as advance:
        advance(0)
        wait_until(lambda: len(present(entry)) == 3)
        time.sleep(0.05)
        assert read(files, 11) == CONTENTS[11]
        assert len(present(entry)) <= 3
