"""Number of CPU cores available to this process."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """Return the number of cores in the affinity mask (`taskset`, cgroup cpusets), or of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
