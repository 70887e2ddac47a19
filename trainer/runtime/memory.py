"""How much memory there is, how much of it is free, and how much this process ever took."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_GROUP = Path("/sys/fs/cgroup")  # of this process, where a container has one


def granted() -> int:
    """Bytes of memory that this machine has, or fewer where a Linux control group grants fewer."""
    limit = _of_group("memory.max")
    whole = psutil.virtual_memory().total
    return whole if limit is None else min(whole, limit)


def free() -> int:
    """Bytes that this process could still take."""
    limit, used = _of_group("memory.max"), _of_group("memory.current")
    available = psutil.virtual_memory().available
    return available if limit is None or used is None else min(available, limit - used)


def peak(pid: int | None = None) -> int:
    """Most bytes of memory that a process (by default this one) ever held; elsewhere than on Linux, another's now."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        # Not getrusage, whose maximum a process inherits from the one that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if pid is not None:
        return psutil.Process(pid).memory_info().rss
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _of_group(name: str) -> int | None:
    try:
        return int((_GROUP / name).read_text())
    except (OSError, ValueError):  # no control groups here, or "max"
        return None
