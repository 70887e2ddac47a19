"""Under torchrun, an error of all ranks is one message of rank 0, and an error of one rank is a message too.

Ranks wait for one that works alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from support import warm_process

PROGRAM = """
import os, time
from pipeline.common import process_group
from shards import UserError
from shards.cli import run_command
process_group._REPORT_SECONDS = {seconds}
def main():
    rank = int(os.environ["RANK"])
    with process_group.report_errors_on_main():
        time.sleep({delays}[rank])
        raise UserError(found=f"what rank {{rank}} found", expected="something else", hint="change it")
run_command(main)
"""


def launch(program: Path) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return warm_process.run([*torchrun, str(program)], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("delays", "seconds", "reporting"),
    [([1.0, 0.0], 100.0, 0), ([0.0, 1.0], 100.0, 0), ([100.0, 0.0], 0.5, 1)],
    ids=["rank 0 last", "rank 0 first", "rank 1 only"],
)
def test_one_rank_reports(tmp_path: Path, delays: list[float], seconds: float, reporting: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(seconds=seconds, delays=delays))
    process = launch(program)
    assert process.returncode == 1  # of torchrun
    assert process.stderr.count("what rank ") == 1, process.stderr
    assert f"error: what rank {reporting} found\nexpected: " in process.stderr


# torch gives gloo 30 minutes, less than the search for near-duplicates or the download of another host may take.
ALONE = """
import datetime, time
import torch.distributed.distributed_c10d as c10d
from pipeline.common.process_group import init_process_group
c10d.default_pg_timeout = datetime.timedelta(seconds=1)
with init_process_group() as group:
    results = [group.run_on_main(lambda: time.sleep(1.5) or "searched")]
    results += group.all_gather(lambda: time.sleep(1.5 * (group.rank == 1)) or group.rank)
    assert results == ["searched", 0, 1]
"""


def test_ranks_wait_for_one_that_works_alone(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ALONE)
    process = launch(program)
    assert process.returncode == 0, process.stderr
