"""Runs of the loader benchmark: pack, find the number of workers, measure the loaders in turn."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.processes import WorkerError, WorkerProcess, wait_until_idle, workers_memory
from benchmarks.loaders.baselines import IMPORT_ERRORS, LoaderSpec, missing_requirement
from benchmarks.loaders.baselines.base import Task, Variant
from benchmarks.loaders.loader_worker import LoaderWorker, Packer
from benchmarks.loaders.setting import BenchmarkConfig
from benchmarks.loaders.verify import tolerance
from shards.limits import available_cpus
from trainer.runtime.env_info import collect_env_info, installed_version
from trainer.runtime.memory import peak_memory

_PACKAGES = (
    "webdataset",
    "litdata",
    "mosaicml-streaming",
    "datasets",
    "ffcv",
    "numba",
    "grain",
    "array-record",
    "spdl-core",
    "zarr",
    "tensorstore",
)
_TRIAL_SECONDS = 0.4
_GPU_BATCHES = 20


@dataclass(frozen=True)
class Contestant:
    """Variant of a loader whose images are packed.

    Args:
        spec: The loader.
        variant: Its variant.
        directory: Directory of the packed images.
        packed: Seconds and bytes of packing.
    """

    spec: LoaderSpec
    variant: Variant
    directory: Path
    packed: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.spec.name} {self.variant.name}"


@dataclass
class BenchmarkResults:
    """Measurements (as in the JSON lines), and the reason of each skipped loader and failed variant."""

    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def fail(self, title: str, error: WorkerError) -> None:
        self.failed[title] = error.reason
        print(f"{title}: FAILED, {error.reason}", flush=True)


def measure_all(loaders: Sequence[LoaderSpec], config: BenchmarkConfig, scratch: Path) -> Iterator[BenchmarkResults]:
    """Measure all loaders, one resolution after another.

    A loader that fails is reported; the others continue.

    Yields:
        The results so far, after each resolution.
    """
    results = BenchmarkResults()
    source = config.make_source(scratch / "source")
    print(f"{config.dataset}: {len(source):,} images, batch size {config.batch_size} on {config.device}", flush=True)
    contestants = [one for spec in loaders for one in _pack(spec, config, scratch, results)]
    machine = _environment(config)
    with contextlib.ExitStack() as stack:
        runners: list[Runner] = []
        for contestant in contestants:
            runner = Runner(contestant, scratch, config.device)
            stack.enter_context(runner.process)
            runners.append(runner)
            with _record_failure(runner, results, runners):
                runner.process.call("ready")
        for resolution in config.resolutions:
            _measure_resolution(runners, config.make_task(source, resolution), config, results, machine)
            yield results


def _pack(spec: LoaderSpec, config: BenchmarkConfig, scratch: Path, results: BenchmarkResults) -> list[Contestant]:
    """Pack the images for a loader and return its variants; none if it is not installed or fails."""
    reason = missing_requirement(spec)
    if reason is None:
        directory = scratch / spec.name
        arguments = (spec.name, scratch / "source", directory, config.batch_size)
        with WorkerProcess(Packer, *arguments, log=scratch / "log") as process:
            try:
                variants = process.call("variants")
                formats = dict.fromkeys(variant.file_format for variant in variants)
                packed = {file_format: process.call("pack", file_format) for file_format in formats}
                return [Contestant(spec, variant, directory, packed[variant.file_format]) for variant in variants]
            except WorkerError as error:
                if error.kind not in IMPORT_ERRORS:
                    results.fail(spec.name, error)
                    return []
                reason = f"{error.reason} ({spec.install})"
    results.skipped[spec.name] = reason
    print(f"{spec.name}: skipped, {reason}", flush=True)
    return []


def _measure_resolution(
    runners: list[Runner], task: Task, config: BenchmarkConfig, results: BenchmarkResults, machine: dict[str, Any]
) -> None:
    """Measure the loaders in turn. A loader that fails is removed from the list."""
    print(f"{task.resolution}x{task.resolution} ...", flush=True)
    # Reading alone does not depend on the resolution, so it is measured once.
    is_first = task.resolution == config.resolutions[0]
    active = [runner for runner in runners if is_first or not runner.contestant.variant.is_raw]
    trial_seconds = min(_TRIAL_SECONDS, config.seconds)
    rounds = [lambda runner: runner.warm_up(task, trial_seconds)]
    rounds += [lambda runner: runner.run(config.seconds)] * config.runs
    with tqdm(total=len(rounds) * len(active), leave=False, disable=None) as progress:
        for measure in rounds:
            for runner in list(active):
                progress.set_description(runner.contestant.title)
                with _record_failure(runner, results, active, runners):
                    measure(runner)
                progress.update()
    for runner in list(active):
        with _record_failure(runner, results, active, runners):
            record = runner.record(config) | {"environment": machine}
            results.records.append(record)
            print(f"  {runner.contestant.title}: {record['images_per_second']:,.0f} images/s", flush=True)


@contextlib.contextmanager
def _record_failure(runner: Runner, results: BenchmarkResults, *lists: list[Runner]) -> Iterator[None]:
    """Record the failure of a loader and remove it from the lists."""
    try:
        yield
    except WorkerError as error:
        results.fail(runner.contestant.title, error)
        for runners in lists:
            runners.remove(runner)


class Runner:
    """A contestant in its process, which serves all resolutions, and its measurements at the current one."""

    def __init__(self, contestant: Contestant, scratch: Path, device: torch.device) -> None:
        self.contestant = contestant
        self._workers: tuple[int, ...] = (0,)
        if contestant.variant.uses_workers:
            cores = available_cpus()
            self._workers = tuple(sorted({0, 1, 2, cores, 2 * cores}))
        names = (contestant.spec.name, contestant.variant.name)
        arguments = (*names, scratch / "source", contestant.directory, device)
        self.process = WorkerProcess(LoaderWorker, *arguments, log=scratch / "log")

    def warm_up(self, task: Task, seconds: float) -> None:
        """Open the loader with the fastest number of workers, read the first batch and make an unmeasured run."""
        self._task = replace(task, workers=self._find_workers(task, seconds))
        self._runs: list[dict[str, Any]] = []
        self._workers_memory = 0
        self._first = self.process.call("start", self._task, meanwhile=self._update_memory)
        self._warm = self.process.call("run", seconds, meanwhile=self._update_memory)
        wait_until_idle(self.process.pid)

    def _find_workers(self, task: Task, seconds: float) -> int:
        """Return the fastest number of worker processes in a short trial.

        From the second resolution on, only the two fastest numbers are tried.
        """
        if len(self._workers) == 1:
            return self._workers[0]
        speeds = {}
        for workers in self._workers:
            self.process.call("start", replace(task, workers=workers))
            speeds[workers] = self.process.call("run", seconds)["images_per_second"]
        *_, second, best = sorted(speeds, key=speeds.__getitem__)
        self._workers = (second, best)
        return best

    def _update_memory(self) -> None:
        self._workers_memory = max(self._workers_memory, workers_memory(self.process.pid))

    def run(self, seconds: float) -> None:
        """Measure one run."""
        self._runs.append(self.process.call("run", seconds))
        wait_until_idle(self.process.pid)

    def record(self, config: BenchmarkConfig) -> dict[str, Any]:
        """Return all measurements at the current resolution."""
        variant, task = self.contestant.variant, self._task
        speeds = [run["images_per_second"] for run in self._runs]
        record = {
            "name": self.contestant.spec.name,
            "variant": variant.name,
            "note": variant.note,
            "dataset": config.dataset,
            "samples": task.samples,
            # Reading alone returns the raw images at any resolution.
            "resolution": task.image_shape[0] if variant.is_raw else task.resolution,
            "batch_size": task.batch_size,
            "device": str(task.device),
            "images_per_second": statistics.median(speeds),
            "images_per_second_low": min(speeds),
            "images_per_second_high": max(speeds),
            "runs": len(speeds),
            "cpu_seconds_per_thousand": 1000
            * sum(run["cpu_seconds"] for run in self._runs)
            / sum(run["images"] for run in self._runs),
            "bytes_per_image": self.contestant.packed["bytes"] / task.samples,
            "pack_seconds": self.contestant.packed["seconds"],
            "first_batch_seconds": self._first["first_batch_seconds"],
            "peak_memory_bytes": peak_memory(self.process.pid) + self._workers_memory,
            "reach": self._first["reach"],
            "max_error": max(measured["error"] for measured in (self._first, self._warm, *self._runs)),
            "tolerance": 0.0 if variant.is_raw else tolerance(variant, task),
            "workers": task.workers,
        }
        if task.device.type == "cuda":
            record["gpu_milliseconds_per_thousand"] = self.process.call("gpu_milliseconds", _GPU_BATCHES)
        return record


def _environment(config: BenchmarkConfig) -> dict[str, Any]:
    """Return the environment with the versions of the other loaders."""
    machine = collect_env_info(config.device)
    for package in _PACKAGES:
        if version := installed_version(package):
            machine["packages"][package] = version
    return machine
