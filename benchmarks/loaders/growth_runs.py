"""Runs of the growth benchmark: each loader at each size in a fresh process with a limit of time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.processes import cpu_seconds, process_tree
from benchmarks.common.text import format_bytes
from benchmarks.loaders import growth_worker
from benchmarks.loaders.baselines import REGISTRY, missing_requirement
from shards.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
_WALL_FACTOR = 6  # other processes may run at the same time
_TREE_SECONDS = 0.5
_RESERVE = 1e9  # bytes of memory that are left to other processes
_OTHERS_REAL = 1_000_000  # of other libraries, which pack only 20,000 to 200,000 images/s
OURS = "inkstream"


@dataclass(frozen=True)
class Subject:
    """Loader whose growth is measured.

    Args:
        name: Name in the report.
        loader: Name in `growth_worker.LOADERS`.
        tree: Working tree of its code.
        requires: Name in the registry of loaders, whose modules must be installed.
        options: Arguments of the class in `growth_worker`.
        data: Name of its files; subjects with the same files share them.
        real: Largest number of images of which it packs real files.
    """

    name: str
    loader: str
    data: str
    tree: Path = _ROOT
    requires: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    real: int = sys.maxsize

    @property
    def missing(self) -> str | None:
        """The module that is not installed and how to install it; None if nothing is missing."""
        return missing_requirement(REGISTRY[self.requires]) if self.requires else None


@dataclass(frozen=True)
class Limits:
    """Limits of one process and its children.

    Args:
        memory: Bytes of memory, without pages of mapped files.
        seconds: CPU time.
        real: Largest number of images of which real files are written; more are synthetic.
    """

    memory: float
    seconds: float
    real: int


def subjects_of(before: Path | None, window_gb: float) -> list[Subject]:
    """Return all subjects.

    Args:
        before: Working tree of an earlier revision of this project, or None.
        window_gb: Memory for images of the windowed order.
    """
    trees = [(OURS, _ROOT), *([(f"{OURS}-before", before)] if before else [])]
    ours = []
    for name, tree in trees:
        ours.append(Subject(name, OURS, name, tree))
        ours.append(Subject(f"{name}-windowed", OURS, name, tree, options={"cache_gb": window_gb}))
    return [
        *ours,
        Subject("torch", "torch", "array"),
        Subject("spdl", "spdl", "array", requires="spdl"),
        *(
            Subject(name, name, name, requires=name, real=_OTHERS_REAL)
            for name in ("grain", "litdata", "mosaicml-streaming")
        ),
    ]


@contextlib.contextmanager
def checkout(revision: str | None) -> Iterator[Path | None]:
    """Check out a revision of this repository into a temporary working tree."""
    if revision is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="inkstream-before-") as directory:
        tree = Path(directory) / "tree"
        git = ["git", "-C", str(_ROOT), "worktree"]
        added = subprocess.run([*git, "add", "--detach", str(tree), revision], capture_output=True, text=True)
        if added.returncode != 0:
            raise UserError(
                found=f"--before {revision}, which git does not check out: {added.stderr.strip()}",
                expected="a branch, tag or commit of this repository",
                hint="list the commits: git log",
            )
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)


def measure_all(
    subjects: Sequence[Subject], sizes: Sequence[int], source: Path, scratch: Path, limits: Limits
) -> Iterator[dict[str, Any]]:
    """Yield a record for each phase of each subject at each size; the files of a size are removed after it."""
    for size in sizes:
        directory = scratch / str(size)
        made: dict[str, dict[str, Any]] = {}
        for subject in subjects:
            if subject.missing is not None:
                continue
            work = {"loader": subject.loader, "samples": size, "directory": str(directory / subject.data)}
            work |= {"source": str(source), "options": dict(subject.options)}
            is_real = size <= min(limits.real, subject.real)
            base = {"name": subject.name, "samples": size, "data": "real" if is_real else "synthetic"}
            if subject.data not in made:
                action = "pack" if is_real else "make"
                made[subject.data], _ = run_worker({**work, "action": action}, subject.tree, limits)
                if is_real:
                    yield base | made[subject.data]
            if "failed" in made[subject.data]:
                yield base | {"phase": "open", "failed": f"no data: {made[subject.data]['failed']}"}
                continue
            for phase in run_worker({**work, "action": "measure"}, subject.tree, limits):
                yield base | phase
        shutil.rmtree(directory, ignore_errors=True)


def run_worker(work: Mapping[str, Any], tree: Path, limits: Limits) -> list[dict[str, Any]]:
    """Run `growth_worker` in a fresh process and return the phases that it printed.

    If it exceeded a limit or failed, the last one has the reason as `failed`.
    """
    command = [sys.executable, "-P", growth_worker.__file__, json.dumps(work)]
    # One thread: torch's threads busy-wait for each other, which counts as CPU time while other processes run.
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=out, stderr=errors, stdin=subprocess.DEVNULL
        )
        peak, reason = _watch(process, limits)
        out.seek(0)
        errors.seek(0)
        lines = [json.loads(line) for line in out.read().splitlines() if line.startswith('{"phase"')]
        phases = {line["phase"]: line for line in lines}
        if reason is None and process.returncode != 0:
            lines = errors.read().splitlines()
            # The last line of a message in several lines is only its hint.
            named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
            reason = [f"exit status {process.returncode}", *lines, *named][-1]
    imported = phases.pop("import", {}).get("private_bytes", 0)
    last = next(reversed(phases), "open")
    memory = {"phase": "memory", "memory_bytes": peak - imported}
    if reason is not None:
        phases[last] = {"phase": last, "failed": reason}
        memory = {"phase": "memory", "failed": reason}
    return [*phases.values(), memory]


def _watch(process: subprocess.Popen[Any], limits: Limits) -> tuple[int, str | None]:
    """Wait for a process; return its peak memory, and the limit that it exceeded, if any. It is killed then."""
    peak = 0
    reason: str | None = None
    start = checked = time.monotonic()
    try:
        while process.poll() is None and reason is None:
            time.sleep(0.05)
            peak = max(peak, private_memory([process.pid]))
            if time.monotonic() - checked > _TREE_SECONDS:  # listing the processes of a machine takes CPU time
                checked = time.monotonic()
                peak = max(peak, private_memory([one.pid for one in process_tree(process.pid)]))
                if cpu_seconds(process.pid) > limits.seconds or checked - start > _WALL_FACTOR * limits.seconds:
                    reason = f"over {limits.seconds:g} s"
                elif psutil.virtual_memory().available < _RESERVE:
                    reason = f"less than {format_bytes(_RESERVE)} of memory left on the machine"
            if peak > limits.memory:
                reason = f"over {format_bytes(limits.memory)} of memory"
    finally:  # also on a signal
        for one in process_tree(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
    return peak, reason


def private_memory(pids: Sequence[int]) -> int:
    """Return the bytes of processes without pages of files, which the system can drop."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            total += sum(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return total
