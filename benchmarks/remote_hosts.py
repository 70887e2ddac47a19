"""Measure how 1, 2 and 4 hosts read a remote data set that is larger than their cache.

    python benchmarks/remote_hosts.py [--hosts 1,2,4] [--images N] [--rate MBIT] [--latency MS] [--out DIR]

The hosts are network namespaces of this machine (Linux, root) with a cache each. The web server sends every answer
after the latency, and a token bucket limits the rate of each host. A host reads its batches without training and sleeps
between them. For comparison, it also runs with a cache for the whole data set, which is then downloaded before the
first batch. Output: remote_hosts.jsonl and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.arguments import add_out_argument, parse_numbers, positive
from benchmarks.common.harness import write_results
from benchmarks.common.text import markdown_table
from shards.cli import USER_ERROR_STATUS, run_command
from shards.errors import UserError
from shards.stores.base import is_image_store

_SERVER = "10.77.32.1"
_PORT = 29480
_SIDE = 28  # pixels
_BATCH_SIZE = 512
_MEMORY = 64 << 20  # bytes of images that a host holds
_EPOCHS = 2


class Handler(SimpleHTTPRequestHandler):
    """Serves complete files after a pause; byte ranges are requested only after a failure."""

    latency = 0.0

    def do_GET(self) -> None:
        time.sleep(self.latency)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def serve(directory: str, latency: float) -> int:
    """Serve a directory until the process is ended."""
    Handler.latency = latency
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer((_SERVER, _PORT), partial(Handler, directory=directory)).serve_forever()
    return 0


def run(program: str, *arguments: str) -> str:
    """Run a command of iproute2; returns its output."""
    process = subprocess.run([program, *arguments], capture_output=True, text=True)
    if process.returncode != 0:
        raise UserError(
            found=f"{program} {' '.join(arguments)}: {process.stderr.strip()}",
            expected="a machine or container on which root may create network namespaces, bridges and token buckets",
            hint="run it on a machine, or in a container with these rights (docker run --privileged)",
        )
    return process.stdout


ip = partial(run, "ip")


@contextmanager
def network(hosts: int, rate: float) -> Iterator[list[str]]:
    """Create network namespaces, each behind a token bucket of `rate` Mbit/s, for the block. Yields their names."""
    names = [f"inkhost{number}" for number in range(hosts)]
    try:
        ip("link", "add", "inkbridge", "type", "bridge")
        ip("address", "add", f"{_SERVER}/24", "dev", "inkbridge")
        ip("link", "set", "inkbridge", "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"ink{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"ink{number}", "master", "inkbridge", "up")
            bucket = ["rate", f"{rate:g}mbit", "burst", "256kb", "latency", "200ms"]
            run("tc", "qdisc", "add", "dev", f"ink{number}", "root", "tbf", *bucket)
            ip("-n", name, "address", "add", f"10.77.32.{10 + number}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", "inkbridge"], check=False, capture_output=True)


def received(host: str) -> int:
    """Return the bytes that the interface of a host has received."""
    return json.loads(ip("-n", host, "-json", "-statistics", "link", "show", "eth0"))[0]["stats64"]["rx"]["bytes"]


def read_share(rank: int, hosts: int, epochs: int, rate: float) -> int:
    """Read the batches of one host at up to `rate` images/s. After each epoch, print a line of JSON, read a line."""
    from pipeline.sampler import ShuffledBatchSampler, max_shuffle_window, shard_window
    from shards import open_split

    start = time.perf_counter()
    store = open_split(f"http://{_SERVER}:{_PORT}/set", "train", _MEMORY)
    assert is_image_store(store)
    manifest, cache = store.manifest, store.cache_bytes
    units = None if cache is None else store.shard_bounds
    window = (
        max_shuffle_window(manifest, _MEMORY, _BATCH_SIZE)
        if cache is None
        else shard_window(manifest, _MEMORY, cache, _BATCH_SIZE)
    )
    every = np.arange(len(store))
    sampler = ShuffledBatchSampler(every, _BATCH_SIZE, 0, manifest.block_size, window, unit_bounds=units)
    images = np.empty((_BATCH_SIZE, *store.manifest.pixel_shape), np.uint8)
    pause = _BATCH_SIZE / hosts / rate
    for epoch in range(epochs):
        waits = []
        with store.prefetch(partial(sampler.shard_uses, epoch, rank, hosts, 0)) as advance:
            asked = start
            for step in sampler.steps(epoch, rank, hosts):
                advance(step.step)
                store.gather(step.samples, images[: len(step.samples)])
                waits.append(time.perf_counter() - asked)
                time.sleep(pause)
                asked = time.perf_counter()
        result = {"first_batch": waits[0], "stall": sum(waits[1:]), "seconds": asked - start}
        print(json.dumps(result), flush=True)
        sys.stdin.readline()
        start = time.perf_counter()
    return 0


def measure(hosts: int, cache: int, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Return the measurements of each epoch, with caches that are empty at first and hold `cache` bytes."""
    results = []
    with ExitStack() as stack:
        names = stack.enter_context(network(hosts, arguments.rate))
        server = [sys.executable, __file__, "--serve", str(scratch), str(arguments.latency / 1000)]
        stack.enter_context(_process(server))
        workers = []
        for rank, name in enumerate(names):
            settings = {
                "INKSTREAM_CACHE": f"{scratch}/cache-{hosts}-{cache}-{rank}",
                "INKSTREAM_CACHE_SIZE": str(cache),
            }
            command = [sys.executable, __file__, "--read", str(rank), str(hosts), str(arguments.images_per_second)]
            environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
            workers.append(stack.enter_context(_process(["ip", "netns", "exec", name, *command], environment)))
        before = [received(name) for name in names]
        for epoch in range(_EPOCHS):
            lines = [_read_line(worker) for worker in workers]
            now = [received(name) for name in names]
            results.append(
                {
                    "hosts": hosts,
                    "cache_bytes": cache,
                    "epoch": epoch + 1,
                    "received": [after - earlier for after, earlier in zip(now, before, strict=True)],
                    **{key: [line[key] for line in lines] for key in lines[0]},
                }
            )
            before = now
            for worker in workers:
                assert worker.stdin is not None
                print(file=worker.stdin, flush=True)
    return results


@contextmanager
def _process(command: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()


def _read_line(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdout is not None and worker.stderr is not None
    line = worker.stdout.readline()
    if not line:
        message = worker.stderr.read().strip()
        if worker.wait() == USER_ERROR_STATUS:
            first_line = message.removeprefix("error: ").partition("\n")[0]
            raise UserError(
                found=f"a host that failed: {first_line}",
                expected="a cache with room for the arrays and four shards",
                hint="choose a larger --cache, or more --images",
            )
        raise RuntimeError(f"a host failed: {message}")
    return json.loads(line)


def report(records: Sequence[dict[str, Any]], total: int, arguments: argparse.Namespace) -> str:
    """Format a table of the highest value of all hosts, for a data set of `total` bytes."""
    rows = [
        [
            str(record["hosts"]),
            f"{record['cache_bytes'] / total:.0%}",
            str(record["epoch"]),
            f"{max(record['received']) / total:.0%}",
            *(f"{max(record[key]):.1f} s" for key in ("first_batch", "stall", "seconds")),
            f"{max(record['received']) * 8 / 1e6 / max(record['seconds']) / arguments.rate:.0%}",
        ]
        for record in records
    ]
    head = [
        "hosts",
        "cache",
        "epoch",
        "received per host",
        "first batch",
        "stall after it",
        "epoch time",
        "network use",
    ]
    return "\n".join(
        [
            f"{arguments.images:,} images of {_SIDE} pixels ({total / 1e6:,.0f} MB), {arguments.rate:g} Mbit/s and "
            f"{arguments.latency:g} ms per host, at most {arguments.images_per_second:,.0f} images/s per host. The "
            "table shows the highest value of the hosts.",
            "",
            markdown_table(head, rows),
        ]
    )


def main() -> int:
    """Run the command. Returns the exit status."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], float(sys.argv[3]))
    if sys.argv[1:2] == ["--read"]:
        return read_share(int(sys.argv[2]), int(sys.argv[3]), _EPOCHS, float(sys.argv[4]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", default="1,2,4", help="numbers of hosts (default: %(default)s)")
    parser.add_argument(
        "--images", type=positive(int), default=200_000, help="size of the data set (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=positive(float), default=200.0, help="network rate of each host, Mbit/s (default: %(default)s)"
    )
    parser.add_argument(
        "--latency", type=positive(float), default=20.0, help="of the server, ms (default: %(default)s)"
    )
    parser.add_argument(
        "--images-per-second",
        type=positive(float),
        default=25_000.0,
        help="highest reading rate of each host (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=positive(float),
        default=0.4,
        help="size of the small cache, as a fraction of the data set (default: %(default)s)",
    )
    add_out_argument(parser)
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        raise UserError(
            found="a user other than root, or no iproute2",
            expected="root on Linux, and the commands ip and tc, which create network namespaces",
            hint="sudo env PYTHONPATH=. python benchmarks/remote_hosts.py",
        )
    records = []
    with tempfile.TemporaryDirectory() as directory:
        pack_random(Path(directory) / "set", arguments.images)
        size = sum(path.stat().st_size for path in (Path(directory) / "set").rglob("*") if path.is_file())
        for cache in (2 * size, int(arguments.cache * size)):
            for hosts in parse_numbers("--hosts", arguments.hosts, int, "numbers of hosts", "1,2,4", 1, 64):
                records += measure(hosts, cache, arguments, Path(directory))
    write_results(arguments.out / "remote_hosts", records, report(records, size, arguments), None)
    return 0


def pack_random(out: Path, images: int) -> None:
    """Pack random images in small shards, so that there are as many shards as in a large data set."""
    from pipeline.packing import pack
    from pipeline.readers.raw_split import RawSplit

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, _SIDE, _SIDE, 1), dtype=np.uint8)
    labels = random.integers(0, 10, images)
    names = tuple(map(str, range(10)))

    def splits() -> tuple[RawSplit, ...]:
        parts = (("train", slice(None)), ("test", slice(_BATCH_SIZE)))
        return tuple(
            RawSplit.from_arrays(name, pixels[part], labels[part], names, transposed=False) for name, part in parts
        )

    pack.SHARD_BYTES = 1 << 19
    pack.pack(splits, out, pack.PackSettings("random", block_size=32))


if __name__ == "__main__":
    run_command(main)
