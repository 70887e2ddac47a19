"""The number of CPU cores that this process may use."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """The cores that the scheduler grants this process (`taskset`, cgroup cpusets), or all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
