"""Time profile of a run by sections of the step, and a trace of single steps by torch's profiler."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.transforms.spec import Transform

TimePoint = tuple[float, torch.cuda.Event | None]

LOADING = "copy and resize"  # part of the data wait on a CPU; concurrent with the step (loader thread) on a GPU


class DataWait:
    """Sums the time in which the device waits for batches.

    On a CPU it is the time between `start` and `stop`. On a GPU it is the part of it in which the GPU has finished all
    work that was queued before `start`, measured by events; no call waits for the GPU.

    Attributes:
        seconds: The sum, on a GPU of the waits whose end it has reached.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.start()

    def start(self) -> None:
        """Mark that the next batch is requested."""
        self._start = _time_point(self._device)

    def stop(self) -> None:
        """Mark that the batch has arrived; on a GPU, that the current stream waits for it."""
        start, end = self._start, _time_point(self._device)
        if start[1] is None or end[1] is None:
            self.seconds += end[0] - start[0]
            return
        self._pending.append((start[1], end[1]))
        self.update()

    def update(self) -> None:
        """Add the waits whose end the GPU has reached."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self.seconds += start.elapsed_time(end) / 1000


def _time_point(device: torch.device) -> TimePoint:
    """Return the current time of the host, and an event of the device if it is a GPU."""
    if device.type != "cuda":
        return time.perf_counter(), None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return time.perf_counter(), event


class Profile:
    """Sections of a step; this class measures nothing."""

    def mark(self, section: str) -> None:
        """Attribute the time since the last mark to a section."""


class TimeProfile(Profile):
    """Seconds of each section, by the host's clock and, on a GPU, between CUDA events.

    No call waits for the device: events that are not complete are queried again later. Device time between two marks
    is work or, if the host is slower, idle time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: dict[str, list[float]] = defaultdict(list)
        self._on_device: dict[str, list[float]] = defaultdict(list)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._lock = threading.Lock()  # the loader's thread adds events, too
        self._last = self.now()

    def mark(self, section: str) -> None:
        self._last = self.add(section, self._last)

    def timed(self, transform: Transform) -> Transform:
        """Wrap a transform so that its calls are measured as the section `LOADING`."""
        return _TimedTransform(transform, self)

    def now(self) -> TimePoint:
        """Return the current time of the host, and an event of the device if it is a GPU."""
        return _time_point(self.device)

    def add(self, section: str, start: TimePoint) -> TimePoint:
        """Attribute the time since `start` to a section; returns the current time."""
        end = self.now()
        self._host[section].append(end[0] - start[0])
        if start[1] is not None and end[1] is not None:
            with self._lock:
                self._pending.append((section, start[1], end[1]))
                while self._pending and self._pending[0][2].query():
                    self._read_event()
        return end

    def _read_event(self) -> None:
        section, start, end = self._pending.popleft()
        self._on_device[section].append(start.elapsed_time(end) / 1000)

    def summary(self) -> list[dict[str, Any]]:
        """Summarize each section; waits for the device.

        Returns:
            Records with `part` (the section), `times` (calls), `seconds` (total), `share` (fraction of the total
            without `LOADING`) and `median_ms`; on a GPU also `device_seconds` and `device_median_ms`.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        while self._pending:
            self._read_event()
        total = sum(sum(seconds) for section, seconds in self._host.items() if section != LOADING)
        records = []
        for section, seconds in self._host.items():
            record: dict[str, Any] = {"part": section, "times": len(seconds), "seconds": sum(seconds)}
            record |= {"share": sum(seconds) / total, "median_ms": 1000 * statistics.median(seconds)}
            if on_device := self._on_device.get(section):
                record["device_seconds"] = sum(on_device)
                record["device_median_ms"] = 1000 * statistics.median(on_device)
            records.append(record)
        return records


class _TimedTransform:
    def __init__(self, transform: Transform, profile: TimeProfile) -> None:
        self._transform = transform
        self._profile = profile
        self.max_fused_batch = transform.max_fused_batch
        self.op_params = transform.op_params

    def __call__(self, images: Any, params: Any = None) -> torch.Tensor:
        start = self._profile.now()
        output = self._transform(images, params)
        self._profile.add(LOADING, start)
        return output


def format_profile(records: list[dict[str, Any]]) -> str:
    """Format the records of `TimeProfile.summary` as a table."""
    on_device = any("device_seconds" in record for record in records)
    head = f"{'section':<18}{'calls':>9}{'seconds':>10}{'fraction':>10}{'median ms':>12}"
    lines = [head + (f"{'device seconds':>19}{'median ms':>12}" if on_device else "")]
    for record in records:
        fraction = "" if record["part"] == LOADING else f"{record['share']:.1%}"
        line = f"{record['part']:<18}{record['times']:>9,}{record['seconds']:>10.2f}{fraction:>10}"
        line += f"{record['median_ms']:>12.3f}"
        if "device_seconds" in record:
            line += f"{record['device_seconds']:>19.2f}{record['device_median_ms']:>12.3f}"
        lines.append(line)
    note = "concurrent with the steps, in the loader's thread" if on_device else "part of the data wait"
    return "\n".join([*lines, f"{LOADING}: {note}"])


@contextmanager
def trace_steps(steps: tuple[int, int] | None, path: Path) -> Iterator[torch.profiler.profile | None]:
    """Trace some steps of this process with torch's profiler, and write the trace to a file (.json.gz).

    Args:
        steps: First and last step, counted from 1; None for no trace.
        path: The file.

    Yields:
        The profiler, whose `step` is called after each step; None for no trace. The trace is shorter if the run ends
        before the last step.
    """
    if steps is None:
        yield None
        return

    def write(profiler: torch.profiler.profile) -> None:
        partial = path.with_name(f".partial-{path.name}")
        profiler.export_chrome_trace(str(partial))
        partial.replace(path)

    first, last = steps
    warmup = min(1, first - 1)
    schedule = torch.profiler.schedule(wait=first - 1 - warmup, warmup=warmup, active=last - first + 1, repeat=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():  # without a GPU its tracer prints an error
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler
