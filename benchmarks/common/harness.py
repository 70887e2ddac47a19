"""What every benchmark shares: timing, isolation in a process, peak memory, JSON lines and tables."""

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

from shards.atomic import make_directory, write_file
from trainer.runtime.memory import peak_memory

DEFAULT_OUT = Path("benchmarks/out")
# Imported once, by the process that all others are forked from: a fresh process is there in a moment.
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


def rates(works: Mapping[str, Callable[[], int]], runs: int, warmup: int = 1) -> dict[str, Spread]:
    """Items a second of several works, run in turn (A B A B ...), so that a drifting machine hits all alike.

    works: by name, a function that does its work once and returns how many items it did. The first `warmup` rounds
    are not counted.
    """
    measured: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(warmup + runs):
        for name, work in works.items():
            start = time.perf_counter()
            items = work()
            seconds = time.perf_counter() - start
            if round_number >= warmup:
                measured[name].append(items / seconds)
    return {name: Spread.of(values) for name, values in measured.items()}


def in_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a function in a fresh process and return its result with `peak_memory_bytes` of that process added.

    work: a function of a module, with picklable arguments and result. If the process is killed (out of memory) the
    result is `{"failed": reason}`; an exception of the function is raised here. A signal ends the process, too.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_with_peak_memory, work, arguments).result()
        except BrokenProcessPool:
            return {"failed": KILLED}
        except BaseException:
            # Stopped: otherwise leaving the pool would wait until the work is done.
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _with_peak_memory(work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    return work(*arguments) | {"peak_memory_bytes": peak_memory()}


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    make_directory(path.parent)
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def write_results(
    path: Path, records: Sequence[Mapping[str, Any]], text: str, draw: Callable[[Path], None] | None
) -> None:
    """Write the records as PATH.jsonl, the table as PATH.md and the plot as PATH.png, and print the table.

    path: without an ending. draw: makes the picture; None where nothing was measured that could be drawn.
    """
    write_lines(path.with_suffix(".jsonl"), records)
    write_file(path.with_suffix(".md"), text + "\n")
    if draw is not None:
        draw(path.with_suffix(".png"))
    print(f"\n{text}\n\n{path}.jsonl, .md{', .png' if draw is not None else ''}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right, aligned for reading as text."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (width - 1)}{'-' if column == 0 else ':'}" for column, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def size(count: float) -> str:
    """Bytes for people: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
