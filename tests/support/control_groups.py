"""Trees of control groups, as Linux shows them to a process, in which one group has a limit."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shards import limits


@dataclass(frozen=True)
class Tree:
    """What a process reads in /proc/self/cgroup, and its groups below /sys/fs/cgroup, the first with the limit."""

    membership: str
    version: int
    cpu: tuple[str, ...]
    memory: tuple[str, ...]


TREES = {
    "version 2, the root of a namespace": Tree("0::/\n", 2, (".",), (".",)),
    "version 2, the own group": Tree("0::/run-7.scope\n", 2, ("run-7.scope", "."), ("run-7.scope", ".")),
    "version 2, a parent": Tree(
        *("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n", 2),
        cpu=("system.slice/slurmstepd.scope/job_7", "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"),
        memory=("system.slice/slurmstepd.scope/job_7/step_0", "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"),
    ),
    "version 2, the path of the host": Tree("0::/kubepods/pod7/0a85\n", 2, (".",), (".",)),
    "version 2, outside the namespace": Tree("0::/../other\n", 2, (".",), (".",)),
    "version 1": Tree(
        "9:name=systemd:/user\n8:pids:/\n4:memory:/slurm/uid_1/job_7/step_0\n3:cpu,cpuacct:/slurm/uid_1/job_7\n",
        *(1, ("cpu,cpuacct/slurm/uid_1/job_7",), ("memory/slurm/uid_1/job_7", "memory/slurm/uid_1/job_7/step_0")),
    ),
    "version 1, names in another order": Tree(
        *("4:memory:/\n3:cpuacct,cpu:/user.slice\n", 1, ("cpu/user.slice", "cpu"), ("memory",))
    ),
    "version 1, the path of the host": Tree(
        *("4:memory:/docker/0a85\n3:cpu,cpuacct:/docker/0a85\n", 1, ("cpu,cpuacct",), ("memory",))
    ),
    "both versions": Tree(
        "4:memory:/user.slice/session-3.scope\n3:cpu:/user.slice\n1:name=systemd:/user.slice\n0::/user.slice\n",
        *(1, ("cpu/user.slice", "unified/user.slice"), ("memory/user.slice", "memory/user.slice/session-3.scope")),
    ),
    "both versions, the limit in version 2": Tree(
        *("1:name=systemd:/user.slice\n0::/user.slice/session-3.scope\n", 2),
        cpu=("unified/user.slice", "unified/user.slice/session-3.scope"),
        memory=("unified/user.slice", "unified/user.slice/session-3.scope"),
    ),
}


def show_tree(
    monkeypatch: pytest.MonkeyPatch, directory: Path, membership: str, files: dict[str, Any] | None = None
) -> None:
    """Show this process a /proc/self/cgroup, and files below /sys/fs/cgroup."""
    mounts, proc = directory / "cgroup", directory / "membership"
    proc.write_text(membership)
    mounts.mkdir(exist_ok=True)
    for name, content in (files or {}).items():
        (mounts / name).parent.mkdir(parents=True, exist_ok=True)
        (mounts / name).write_text(f"{content}\n")
    monkeypatch.setattr(limits, "_MEMBERSHIP", proc)
    monkeypatch.setattr(limits, "_MOUNTS", mounts)
    monkeypatch.setattr(limits, "_cpu_quota", functools.cache(inspect.unwrap(limits._cpu_quota)))
