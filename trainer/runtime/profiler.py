"""Where the time of a run goes: by part of the step, and as a trace of every kernel."""

from __future__ import annotations

import gzip
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.loader import Batch
from pipeline.transforms.augmentation import AugmentationParams
from pipeline.transforms.spec import Transform
from shards.atomic import replace_file
from shards.stores.base import Images

LOADING = "copy and resize"  # within the data wait on a CPU; beside the step, in the loader's thread, for a GPU


class Profile(Protocol):
    def mark(self, part: str) -> None:
        """What happened since the mark before belongs to this part."""
        ...


class NoProfile:
    """Takes no time and tells nothing."""

    def mark(self, part: str) -> None:
        pass


class TimeProfile:
    """Seconds of each part, by the host's clock and, on a GPU, between events in the device's queue of work.

    Nothing here waits for the device: events that have not happened yet are looked at again later. What the device
    spends between two marks is work or, where the host is the slower one, waiting for work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: dict[str, list[float]] = defaultdict(list)
        self._on_device: dict[str, list[float]] = defaultdict(list)
        self._open: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._events = threading.Lock()  # the loader's thread adds to them
        self._last = time.perf_counter()
        self._last_event = self._event()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self._host[part].append(now - self._last)
        self._last = now
        if self._last_event is not None:
            event = self._event()
            self._add(part, self._last_event, event)
            self._last_event = event

    def timed(self, graph: Transform) -> Transform:
        """The graph, with its time taken as a part of its own."""

        return _TimedGraph(graph, self)

    def time_graph(self, graph: Transform, images: Images, draws: AugmentationParams | None) -> torch.Tensor:
        start, event = time.perf_counter(), self._event()
        output = graph(images, draws)
        self._host[LOADING].append(time.perf_counter() - start)
        if event is not None:
            self._add(LOADING, event, self._event())
        return output

    def _event(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _add(self, part: str, before: torch.cuda.Event, after: torch.cuda.Event) -> None:
        with self._events:
            self._open.append((part, before, after))
            while self._open and self._open[0][2].query():
                self._take()

    def _take(self) -> None:
        part, before, after = self._open.popleft()
        self._on_device[part].append(before.elapsed_time(after) / 1000)

    def figures(self) -> list[dict[str, Any]]:
        """For each part: its name, how often it came, seconds in total, share of all, median in milliseconds.

        On a GPU with `device_seconds` and `device_median_ms` beside. `LOADING` is no part of the sum.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        while self._open:
            self._take()
        whole = sum(sum(seconds) for part, seconds in self._host.items() if part != LOADING)
        found = []
        for part, seconds in self._host.items():
            record = {
                "part": part,
                "times": len(seconds),
                "seconds": sum(seconds),
                "share": sum(seconds) / whole,
                "median_ms": 1000 * statistics.median(seconds),
            }
            if measured := self._on_device.get(part):
                record["device_seconds"] = sum(measured)
                record["device_median_ms"] = 1000 * statistics.median(measured)
            found.append(record)
        return found


class _TimedGraph:
    """A graph whose calls a profile takes the time of."""

    def __init__(self, graph: Transform, profile: TimeProfile) -> None:
        self._graph = graph
        self._profile = profile
        self.max_fused_batch = graph.max_fused_batch

    def __call__(self, images: Images, draws: AugmentationParams | None = None) -> torch.Tensor:
        return self._profile.time_graph(self._graph, images, draws)


def table(figures: list[dict[str, Any]]) -> str:
    """The figures of a profile as text."""
    on_device = any("device_seconds" in record for record in figures)
    head = f"{'part':<18}{'times':>9}{'seconds':>10}{'share':>8}{'median ms':>12}"
    lines = [head + (f"{'on the device: s':>19}{'median ms':>12}" if on_device else "")]
    for record in figures:
        share = "" if record["part"] == LOADING else f"{record['share']:.1%}"
        line = (
            f"{record['part']:<18}{record['times']:>9,}{record['seconds']:>10.2f}{share:>8}{record['median_ms']:>12.3f}"
        )
        if "device_seconds" in record:
            line += f"{record['device_seconds']:>19.2f}{record['device_median_ms']:>12.3f}"
        lines.append(line)
    beside = "beside the steps, in the loader's thread" if on_device else "part of the data wait"
    return "\n".join([*lines, f"{LOADING}: {beside}"])


class Trace:
    """Traces some steps of this process with torch's profiler."""

    def __init__(self, steps: tuple[int, int] | None, device: torch.device) -> None:
        """steps: first and last one, counted from 1 since the process began; None for none."""
        self._first, self._last = steps or (0, 0)
        self._step = 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities) if steps else None
        self._runs = False

    def over(self, batches: Iterable[Batch], path: Path) -> Iterator[Batch]:
        """The batches of an epoch; what is done with those to be traced is written to `path` (.json.gz)."""
        for batch in batches:
            self._step += 1
            if self._step == self._first and self._profiler:
                self._profiler.start()
                self._runs = True
            yield batch
            del batch  # whose memory may be the next one's
            if self._step == self._last:
                self.finish(path)

    def finish(self, path: Path) -> None:
        """Write what was traced, though there may have been fewer steps than were asked for."""
        if not self._runs or not self._profiler:
            return
        self._runs = False
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as directory:
            plain = Path(directory) / "trace.json"
            self._profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, replace_file(path) as file, gzip.open(file, "wb") as packed:
                shutil.copyfileobj(source, packed)
