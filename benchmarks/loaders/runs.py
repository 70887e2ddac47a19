"""Measures loaders against each other: packs, tries numbers of workers, and runs them in turn."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.processes import KeptProcess, ProcessFailed, wait_until_quiet, workers_memory
from benchmarks.loaders.baselines import IMPORT_FAILURES, Listing, absent
from benchmarks.loaders.baselines.peer import Task, Variant
from benchmarks.loaders.loader_worker import MeasuredLoader, Packer
from benchmarks.loaders.setting import Setting
from benchmarks.loaders.verify import tolerance
from shards.cpus import available_cpus
from trainer.runtime.env_info import collect_env_info
from trainer.runtime.memory import peak_memory

_PEERS_PACKAGES = ("webdataset", "litdata", "mosaicml-streaming", "datasets", "ffcv", "numba", "zarr", "tensorstore")
_TRIAL_SECONDS = 0.4
_GPU_BATCHES = 20


@dataclass(frozen=True)
class Entrant:
    """A variant of a loader, packed and ready to be measured. packed: seconds and bytes of its form."""

    listing: Listing
    variant: Variant
    directory: Path
    packed: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.listing.name} {self.variant.name}"


@dataclass
class Results:
    """records: a measurement each, as in the JSON lines. skipped, failed: why, by loader (and variant)."""

    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def fail(self, title: str, error: ProcessFailed) -> None:
        self.failed[title] = error.reason
        print(f"{title}: FAILED, {error.reason}", flush=True)


def measure_all(loaders: Sequence[Listing], setting: Setting, scratch: Path) -> Iterator[Results]:
    """Measure all loaders, one resolution after another, and give what there is so far after each of them.

    What fails is told, and the others go on.
    """
    results = Results()
    source = setting.source(scratch / "source")
    print(f"{setting.dataset}: {len(source):,} images, batches of {setting.batch_size} on {setting.device}", flush=True)
    entrants = [entrant for listing in loaders for entrant in _packed(listing, setting, scratch, results)]
    stamp = _stamp(setting)
    with contextlib.ExitStack() as stack:
        runners = []
        for entrant in entrants:
            runner = Runner(entrant, scratch, setting.device)
            stack.enter_context(runner.process)
            runners.append(runner)
            with _told(runner, results, runners):
                runner.process.call("ready")
        for resolution in setting.resolutions:
            _race(runners, setting.task(source, resolution), setting, results, stamp)
            yield results


def _packed(listing: Listing, setting: Setting, scratch: Path, results: Results) -> list[Entrant]:
    """Pack the images for a loader; its variants, or none if it is not there or fails."""
    reason = absent(listing)
    if reason is None:
        directory = scratch / listing.name
        arguments = (listing.name, scratch / "source", directory, setting.batch_size)
        with KeptProcess(Packer, *arguments, log=scratch / "log") as process:
            try:
                variants = process.call("variants")
                packed = {form: process.call("pack", form) for form in dict.fromkeys(one.form for one in variants)}
                return [Entrant(listing, variant, directory, packed[variant.form]) for variant in variants]
            except ProcessFailed as error:
                if error.kind not in IMPORT_FAILURES:
                    results.fail(listing.name, error)
                    return []
                reason = f"{error.reason} ({listing.install})"
    results.skipped[listing.name] = reason
    print(f"{listing.name}: skipped, {reason}", flush=True)
    return []


def _race(runners: list[Runner], task: Task, setting: Setting, results: Results, stamp: dict[str, Any]) -> None:
    """Measure loaders in turn at one resolution. One that fails leaves the list."""
    print(f"{task.resolution}x{task.resolution} ...", flush=True)
    # Reading alone knows no resolution: it is measured once.
    racing = [one for one in runners if not one.entrant.variant.raw or task.resolution == setting.resolutions[0]]
    moment = min(_TRIAL_SECONDS, setting.seconds)
    rounds = [lambda runner: runner.warm_up(task, moment), *[lambda runner: runner.run(setting.seconds)] * setting.runs]
    with tqdm(total=len(rounds) * len(racing), leave=False, disable=None) as bar:
        for measure in rounds:
            for runner in list(racing):
                bar.set_description(runner.entrant.title)
                with _told(runner, results, racing, runners):
                    measure(runner)
                bar.update()
    for runner in list(racing):
        with _told(runner, results, racing, runners):
            record = runner.record(setting) | {"environment": stamp}
            results.records.append(record)
            print(f"  {runner.entrant.title}: {record['images_per_second']:,.0f} images/s", flush=True)


@contextlib.contextmanager
def _told(runner: Runner, results: Results, *lists: list[Runner]) -> Iterator[None]:
    """Take in the failure of one loader, which leaves the lists, so that the others go on."""
    try:
        yield
    except ProcessFailed as error:
        results.fail(runner.entrant.title, error)
        for runners in lists:
            runners.remove(runner)


class Runner:
    """A loader in its process, which is kept for all resolutions, and what was measured at the present one."""

    def __init__(self, entrant: Entrant, scratch: Path, device: torch.device) -> None:
        self.entrant = entrant
        self._workers: tuple[int, ...] = (0,)
        if entrant.variant.processes:
            cores = available_cpus()
            self._workers = tuple(sorted({0, 1, 2, cores, 2 * cores}))
        arguments = (entrant.listing.name, entrant.variant.name, scratch / "source", entrant.directory, device)
        self.process = KeptProcess(MeasuredLoader, *arguments, log=scratch / "log")

    def warm_up(self, task: Task, seconds: float) -> None:
        """Open with the best number of workers, take the first batch and make a run that counts for memory only."""
        self._task = replace(task, workers=self._best_workers(task, seconds))
        self._runs: list[dict[str, Any]] = []
        self._workers_memory = 0
        self._first = self.process.call("start", self._task, meanwhile=self._see_memory)
        self._warm = self.process.call("run", seconds, meanwhile=self._see_memory)
        wait_until_quiet(self.process.pid)

    def _best_workers(self, task: Task, seconds: float) -> int:
        """The number of worker processes with which the loader is fastest, each tried for a moment.

        From the second resolution on only the two that were best before.
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

    def _see_memory(self) -> None:
        self._workers_memory = max(self._workers_memory, workers_memory(self.process.pid))

    def run(self, seconds: float) -> None:
        self._runs.append(self.process.call("run", seconds))
        wait_until_quiet(self.process.pid)

    def record(self, setting: Setting) -> dict[str, Any]:
        """All that was measured."""
        variant, task = self.entrant.variant, self._task
        speeds = [run["images_per_second"] for run in self._runs]
        record = {
            "name": self.entrant.listing.name,
            "variant": variant.name,
            "note": variant.note,
            "dataset": setting.dataset,
            "samples": task.samples,
            # Raw images are as large as they are, whichever resolution is measured around them.
            "resolution": task.image_shape[0] if variant.raw else task.resolution,
            "batch_size": task.batch_size,
            "device": str(task.device),
            "images_per_second": statistics.median(speeds),
            "images_per_second_low": min(speeds),
            "images_per_second_high": max(speeds),
            "runs": len(speeds),
            "cpu_seconds_per_thousand": 1000
            * sum(run["cpu_seconds"] for run in self._runs)
            / sum(run["images"] for run in self._runs),
            "bytes_per_image": self.entrant.packed["bytes"] / task.samples,
            "pack_seconds": self.entrant.packed["seconds"],
            "first_batch_seconds": self._first["first_batch_seconds"],
            "peak_memory_bytes": peak_memory(self.process.pid) + self._workers_memory,
            "reach": self._first["reach"],
            "max_error": max(measured["error"] for measured in (self._first, self._warm, *self._runs)),
            "tolerance": 0.0 if variant.raw else tolerance(variant, task),
            "workers": task.workers,
        }
        if task.device.type == "cuda":
            record["gpu_milliseconds_per_thousand"] = self.process.call("gpu_milliseconds", _GPU_BATCHES)
        return record


def _stamp(setting: Setting) -> dict[str, Any]:
    """The environment, with the versions of the other loaders that are installed."""
    stamp = collect_env_info(setting.device)
    for package in _PEERS_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            stamp["packages"][package] = version(package)
    return stamp
