"""CPU cores and control groups of this process."""

from __future__ import annotations

import functools
import os
from pathlib import Path, PurePosixPath

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNTS = Path("/sys/fs/cgroup")
_UNIFIED = "unified"  # the directory of version 2 where controllers of version 1 have directories of their own


def available_cpus() -> int:
    """Return the number of cores that this process may use.

    It is the size of the affinity mask (`taskset`, cgroup cpusets), or of the machine where there are no masks; but at
    most the CPU time that control groups grant (limits of Docker and Kubernetes), in cores, rounded up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else min(cores, quota)


@functools.cache
def _cpu_quota() -> int | None:
    """The CPU time that control groups grant, in cores, rounded up; None without a limit. It is read once."""
    quotas = [quota for group in control_groups("cpu") if (quota := _read_quota(group)) is not None]
    return min(quotas, default=None)


def control_groups(controller: str) -> list[Path]:
    """Return the directories of the Linux control groups that may limit this process, of cgroup versions 1 and 2.

    A limit of a group holds for all groups below it. In a container, the path of a group is often that of the host; its
    own group then lies at the mount point, which is the last directory.

    Args:
        controller: Name of the controller, for version 1: `cpu` or `memory`.

    Returns:
        The existing directories, each hierarchy from the group of this process to the root. Some may have no files of
        the controller.
    """
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # another system, or no /proc
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [_MOUNTS, _MOUNTS / _UNIFIED]
        elif controller in controllers.split(","):
            mounts = [_MOUNTS / controllers, _MOUNTS / controller]  # some systems list the names in another order
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # outside the cgroup namespace
            group = PurePosixPath()
        found += [mount / place for mount in mounts for place in (group, *group.parents)]
    return [directory for directory in dict.fromkeys(found) if directory.is_dir()]


def _read_quota(group: Path) -> int | None:
    try:
        quota, period = map(int, (group / "cpu.max").read_text().split())
    except (OSError, ValueError):  # version 1, the root group, or "max"
        try:
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        except (OSError, ValueError):
            return None
    return -(-quota // period) if quota > 0 else None  # -1 is no limit
