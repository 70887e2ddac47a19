"""A program that packs synthetic images slowly, to be stopped in the midst of its work."""

from __future__ import annotations

from pathlib import Path

from conftest import ROOT

_PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from dataclasses import replace
import pipeline.packing.pack
from conftest import synthetic_splits, Path
from pipeline.common.process_group import init_process_group
from shards.cli import run_command
pipeline.packing.pack.SHARD_BYTES = {shard_images} * 784
def slow(part):
    def read(rows):
        print("reading", flush=True)
        time.sleep({seconds})
        return part.read(rows)
    return replace(part, read=read)
def main():
    parts = tuple(map(slow, synthetic_splits()))
    settings = pipeline.packing.pack.PackSettings("synthetic", block_size=16)
    with init_process_group() as group:
        pipeline.packing.pack.pack(lambda: parts, Path({out!r}), settings, workers={workers}, group=group)
run_command(main)
"""


def slow_packing(out: Path, shard_images: int, seconds: float, workers: int) -> str:
    """Return the program. It prints a line before each block that it reads in `seconds`."""
    return _PROGRAM.format(
        tests=str(ROOT / "tests"), out=str(out), shard_images=shard_images, seconds=seconds, workers=workers
    )
