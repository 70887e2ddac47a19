"""Freed memory stays with the process: the next large block costs no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import resource
import torch
from trainer.runtime.memory import keep_freed_memory
def page_faults():
    for number in range(20):
        if number == 10:  # by then the allocator has settled
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(page_faults())
keep_freed_memory()
print(page_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_large_blocks_are_reused() -> None:
    process = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    default, kept = map(int, process.stdout.split())
    assert kept < 100
    assert default > 50 * max(kept, 1), "else the setting would be of no use"
