"""Points of a resolution sweep, the file of their results, and the estimate of their duration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.atomic import append_line, make_directory, write_file
from shards.errors import UserError, os_errors_as_user_errors
from trainer.config.load import replace_settings, validate
from trainer.config.schema import Config

NAME = "resolution_sweep"
INTERPOLATIONS = ("nearest", "linear", "cubic", "lanczos")
_VARIED: Mapping[str, bool | set[str]] = {
    "seed": True,
    "resume": True,
    "run": True,
    "checkpoint": True,
    "logging": True,
    "model": {"name"},
    "data": {"shards", "train_fraction", "resolution", "interpolation", "verify"},
}


@dataclass(frozen=True)
class Point:
    """One measurement, made in its own process. `subset` is the fraction of the training images, in (0, 1]."""

    model: str
    subset: float
    resolution: int
    interpolation: str
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.model} at {self.resolution}x{self.resolution}, {self.interpolation}, "
            f"{100 * self.subset:.3g}% of the images, seed {self.seed}"
        )


@dataclass(frozen=True)
class SweepConfig:
    """Settings common to all points of a sweep.

    Args:
        shards: Packed data set.
        dataset: Name of the data set.
        data_identity: Concatenated `Manifest.identity()` of its splits.
        recipe: Training settings as nested values; each point overrides some of them.
        seconds: Training time of the runs of equal time.
        test_images: Number of test images to use, the first ones in packed (random) order; None for all.
    """

    shards: Path
    dataset: str
    data_identity: str
    recipe: dict[str, Any]
    seconds: float
    test_images: int | None

    def point_config(self, point: Point, batch_size: int, accumulation: int) -> Config:
        """Build the training settings of a point.

        Raises:
            UserError: The settings are invalid.
        """
        values = {
            "data.shards": str(self.shards),
            "data.train_fraction": point.subset,
            "data.resolution": point.resolution,
            "data.interpolation": point.interpolation,
            "loader.batch_size": batch_size,
            "model.name": point.model,
            "optim.grad_accumulation": accumulation,
            "checkpoint.every_minutes": None,
            "checkpoint.every_steps": None,
            "seed": point.seed,
            "resume": "never",
            "logging": {},
        }
        return replace_settings(self.settings, values, "the sweep")

    @property
    def settings(self) -> Config:
        return validate(self.recipe, "the sweep")

    def is_timed(self, point: Point) -> bool:
        """Return whether the point is also trained for equal time; points that compare interpolations are not."""
        return point.interpolation == self.settings.data.interpolation

    def identity(self) -> dict[str, str]:
        """Return the fields that all records of this sweep have in common."""
        content = self.settings.model_dump(mode="json", exclude=_VARIED)
        content |= {"seconds": self.seconds, "test_images": self.test_images}
        return {"set": self.data_identity, "settings": hashlib.sha256(json.dumps(content).encode()).hexdigest()}


def make_points(
    config: SweepConfig, models: Sequence[str], subsets: Sequence[float], resolutions: Sequence[int], seeds: int
) -> list[Point]:
    """List all points, ordered by seed first, so that an interrupted sweep covers every resolution."""
    settings = config.settings
    return [
        Point(model, subset, resolution, settings.data.interpolation, settings.seed + number)
        for number in range(seeds)
        for subset in sorted(subsets)
        for model in models
        for resolution in sorted(resolutions)
    ]


class Journal:
    """JSON lines of a sweep, one per measured point, appended as points finish.

    Args:
        path: File of the lines.
        config: The sweep.
        resume: Whether to keep the existing lines; otherwise the file is moved to NAME.previous.jsonl.
    """

    def __init__(self, path: Path, config: SweepConfig, resume: bool) -> None:
        self._path = path
        self._identity = config.identity()
        make_directory(path.parent)
        self.other_records: list[dict[str, Any]] = []
        """Records of other settings or another data set, which stay in the file and are not reported."""
        self.records: list[dict[str, Any]] = []
        if path.exists() and resume:
            content = path.read_bytes()
            write_file(path, content[: content.rfind(b"\n") + 1])  # without an incomplete last line
            for record in read_records(path):
                is_ours = self._identity.items() <= record.items()
                (self.records if is_ours else self.other_records).append(record)
        elif path.exists():
            os.replace(path, path.with_name(f"{path.stem}.previous.jsonl"))

    @property
    def all_records(self) -> list[dict[str, Any]]:
        return [*self.other_records, *self.records]

    def failures(self) -> dict[str, str]:
        """Return the reason of each failed point."""
        return {str(point_of(record)): record["failed"] for record in self.records if "failed" in record}

    def has(self, point: Point) -> bool:
        return any(point_of(record) == point for record in self.records)

    def append(self, point: Point, result: dict[str, Any]) -> None:
        record = {"name": NAME, **asdict(point), **self._identity, **result}
        self.records.append(record)
        append_line(self._path, json.dumps(record))


def point_of(record: dict[str, Any]) -> Point:
    """Return the point that a record belongs to."""
    return Point(*(record[name] for name in Point.__dataclass_fields__))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a sweep, a file of JSON lines.

    Raises:
        UserError: The file cannot be read or has other content.
    """
    with os_errors_as_user_errors(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            point_of(record), record["set"], record["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                found=f"{path}, line {number}: not a point of a resolution sweep",
                expected="the lines that python benchmarks/resolution_sweep.py writes",
                hint="measure again (older versions wrote other lines), or name another file",
            ) from None
        yield record


def expected_seconds(point: Point, records: Sequence[dict[str, Any]]) -> float | None:
    """Estimate the duration of a point from the measured points of its model that are nearest in cost.

    The time of the epochs is scaled by pixels and images, an upper bound of its growth. The rest (start, loader
    benchmark, training of fixed time) is constant.

    Returns:
        Seconds, or None if the model has not been measured.
    """
    estimates = []
    for record in records:
        if "failed" not in record and record["model"] == point.model:
            scale = (point.resolution / record["resolution"]) ** 2 * point.subset / record["subset"]
            seconds = record["point_seconds"] + record["by_epochs"]["wall_seconds"] * (scale - 1)
            estimates.append((abs(scale - 1), seconds))
    nearest = min((distance for distance, _ in estimates), default=None)
    return max((seconds for distance, seconds in estimates if distance == nearest), default=None)
