"""Check and measure a device in a few minutes, the most valuable figures first.

    python benchmarks/device_check.py [--minutes 8] [--shards DIR] [--only correctness,loader] [--out DIR]

The sections are device (bandwidth), correctness (batches against a float64 reference), loader, step (with the longest
kernels), loop (the complete loop against one on batches that stay on the device) and run (a short training). Each has a
time at which it ends; what is left then is skipped. A case that fails is recorded, and the next one starts in a new
process. Cases of DALI are skipped if it is not installed. Without a GPU the check runs at tiny size, which tests the
check itself. It needs no network. Output: device_check_DEVICE.jsonl and .md, complete after every case.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common.arguments import DEFAULT_OUT, positive, select_names
from benchmarks.common.processes import WorkerError, WorkerProcess
from benchmarks.training.device.cases import GPU, TINY, Section, Settings, make_sections
from benchmarks.training.device.report import Results
from benchmarks.training.device.worker import DeviceWorker, pack_synthetic_set
from pipeline.common.device import choose_device
from pipeline.transforms.build import choose_backend
from shards.cli import run_command
from shards.errors import UserError
from shards.remote.datasets import resolve_dataset
from trainer.runtime.env_info import collect_env_info

RESULTS = Path("benchmarks/results")
_LEAST_SECONDS = 3.0  # of a case; with less time left it does not start
_RESERVE_SECONDS = 5.0  # for the end of the last process


def missing_backend(settings: Settings) -> str:
    """Return why the backend of a case cannot run, or an empty string."""
    try:
        choose_backend(settings.get("loader.backend", "auto"), "cuda", encoded=False)
    except UserError as error:
        return error.found
    return ""


class Check:
    """Runs cases in a worker process until their time is over.

    Args:
        results: Receives the records.
        start_worker: Starts a worker process.
        deadline: Returns the time (of `time.monotonic`) at which a section ends.
    """

    def __init__(
        self, results: Results, start_worker: Callable[[], WorkerProcess], deadline: Callable[[Section], float]
    ) -> None:
        self._results = results
        self._start_worker = start_worker
        self._deadline = deadline
        self._worker: WorkerProcess | None = None

    def run(self, section: Section) -> None:
        """Run the cases of a section. An error is recorded, and the next case starts in a new process."""
        end = self._deadline(section)
        for case, settings in section.cases.items():
            labels = {"section": section.name, "case": case}
            reason = missing_backend(settings) or ("no time left" if end - time.monotonic() < _LEAST_SECONDS else "")
            if reason:
                self._results.add(labels | {"skipped": reason})
                continue
            self._worker = self._worker or self._start_worker()
            try:
                for record in self._worker.call(section.name, settings, timeout=end - time.monotonic()):
                    self._results.add(labels | record)
            except WorkerError as error:
                failure = {"error": error.reason, "kind": error.kind, "traceback": error.details}
                in_time = time.monotonic() < end
                self._results.add(labels | (failure if in_time else {"skipped": "stopped, no time left"}))
                self.close()  # after an error of CUDA, everything in its process fails

    def close(self) -> None:
        """End the worker process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def main() -> int:
    """Run the command. The exit status is 1 if a case failed or an output is wrong."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description="Check and measure a device in a few minutes.")
    add = parser.add_argument
    add("--minutes", type=positive(float), default=8.0, help="time after which the check ends (default: 8)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: auto)")
    add("--shards", metavar="DIR", help="packed data set of one image size (default: synthetic images)")
    add("--only", metavar="A,B", help="sections to run (default: all)")
    add("--tiny", action="store_true", help="tiny size, the default without a GPU; its figures mean nothing")
    add("--out", type=Path, metavar="DIR", help=f"output directory (default: {RESULTS}; at tiny size {DEFAULT_OUT})")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    tiny = arguments.tiny or device.type == "cpu"
    scale = TINY if tiny else GPU
    sections = make_sections(scale)
    names = select_names("--only", arguments.only, [section.name for section in sections])
    shards = resolve_dataset(arguments.shards) if arguments.shards else None
    environment = collect_env_info(device)
    name = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    results = Results((arguments.out or (DEFAULT_OUT if tiny else RESULTS)) / f"device_check_{name}", environment)
    seconds = 60 * arguments.minutes - _RESERVE_SECONDS
    with tempfile.TemporaryDirectory(prefix="device-check-") as text:
        directory = Path(text)
        runs = directory / "runs"
        runs.mkdir()
        shards = shards or pack_synthetic_set(directory / "set", scale.images)
        make_worker = partial(WorkerProcess, DeviceWorker, shards, device.type, scale, runs, log=directory / "log")
        check = Check(results, make_worker, lambda section: start + section.until * seconds)
        with contextlib.closing(check):
            for section in sections:
                if section.name in names:
                    check.run(section)
                    if not tiny:
                        check.close()  # frees the memory of the device
    failed = [record for record in results.records if "error" in record or record.get("ok") is False]
    print(f"{time.monotonic() - start:.0f} s, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    run_command(main)
