"""Ranks with directories of their own upload one data set, the same as one process writes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from support import warm_process
from support.s3_server import BUCKET, environment, s3_server

from shards.remote.backends import open_storage


@pytest.mark.slow
@pytest.mark.parametrize("store", ["tar", "zarr"])
def test_ranks_pack_to_a_remote_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    program = (
        "import pipeline.packing.pack as p; p.SHARD_BYTES = 20000; from pipeline.shard import *; run_command(main)"
    )
    (tmp_path / "shard.py").write_text(program)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    address, local = f"s3://{BUCKET}/digits", tmp_path / "local"
    with s3_server() as port:
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)
        for launch, out in ((torchrun, address), ([], local)):
            options = [str(tmp_path / "shard.py"), "digits", "--block-size=16", f"--store={store}", f"--out={out}"]
            process = warm_process.run(
                [sys.executable, *launch, *options],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=180,
            )
            assert process.returncode == 0, process.stderr
        storage = open_storage(address)
        names = [path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()]
        assert len(names) > 10
        for name in names:
            assert storage.read(name, 1 << 30) == (local / name).read_bytes(), name
