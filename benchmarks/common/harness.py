"""Timing, process isolation and result files of all benchmarks."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.processes import fresh_processes
from shards.atomic import make_directory, write_file
from trainer.runtime.memory import peak_memory

_PRELOADED = ["timm", "torch", "torchvision"]
KILLED = "the process was killed, most likely out of memory"


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of n measurements."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high, "n": self.n}


def measure_rates(workloads: Mapping[str, Callable[[], int]], runs: int, warmup: int = 1) -> dict[str, Spread]:
    """Measure items/s of several workloads in turn (A B A B ...), so that drift of the machine affects all alike.

    Args:
        workloads: By name, a function that does its work once and returns the number of items.
        runs: Measured rounds.
        warmup: Rounds before them that are not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in workloads}
    for round_number in range(warmup + runs):
        for name, work in workloads.items():
            start = time.perf_counter()
            items = work()
            seconds = time.perf_counter() - start
            if round_number >= warmup:
                rates[name].append(items / seconds)
    return {name: Spread.of(values) for name, values in rates.items()}


def in_process(work: Callable[..., dict[str, Any] | None], *arguments: Any) -> dict[str, Any]:
    """Run a function in a fresh process.

    Exceptions of the function are raised in this process. A signal that stops this process stops the other one as well.

    Args:
        work: Function of a module, with picklable arguments and result.
        arguments: Its arguments.

    Returns:
        Its result (nothing for None) and the `peak_memory_bytes` of the process; `{"failed": reason}` if the process
        was killed.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh_processes(_PRELOADED)) as pool:
        try:
            return pool.submit(_with_peak_memory, work, arguments).result()
        except BrokenProcessPool:
            return {"failed": KILLED}
        except BaseException:
            # On a signal: otherwise the exit of the pool waits until the work is complete.
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _with_peak_memory(work: Callable[..., dict[str, Any] | None], arguments: tuple[Any, ...]) -> dict[str, Any]:
    return (work(*arguments) or {}) | {"peak_memory_bytes": peak_memory()}


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    make_directory(path.parent)
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def write_results(
    path: Path, records: Sequence[Mapping[str, Any]], report: str, write_png: Callable[[Path], None] | None
) -> None:
    """Write the results of a benchmark and print the report.

    Args:
        path: Path without suffix of the .jsonl, .md and .png files.
        records: Measurements.
        report: Report in Markdown.
        write_png: Draws the chart to a path; None if there is nothing to draw.
    """
    write_lines(path.with_suffix(".jsonl"), records)
    write_file(path.with_suffix(".md"), report + "\n")
    if write_png is not None:
        write_png(path.with_suffix(".png"))
    print(f"\n{report}\n\n{path}.jsonl, .md{', .png' if write_png is not None else ''}")
