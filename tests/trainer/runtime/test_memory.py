"""Freed memory stays with the process: the next large block costs no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import resource, sys
import torch
from trainer.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for number in range(40):
    if number == 30:  # by then the allocator has settled
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_large_blocks_are_reused() -> None:
    faults = {}
    for how in ("keep", "default"):
        process = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        faults[how] = int(process.stdout)
    assert faults["keep"] < 100
    assert faults["default"] > 50 * max(faults["keep"], 1), "else the setting would be of no use"
