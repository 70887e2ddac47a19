"""Which points the resolution study measures, which of them are there already, and which still fit into its time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.harness import write_lines
from shards.atomic import make_directory
from shards.errors import UserError
from trainer.config.load import validate
from trainer.config.schema import Config

NAME = "resolution_sweep"
INTERPOLATIONS = ("nearest", "linear", "cubic", "lanczos")
_VARIED = {
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
    """What is measured in a process of its own. subset: share of the training images. interpolation: of the resize."""

    model: str
    subset: float
    resolution: int
    interpolation: str
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.model} at {self.resolution}x{self.resolution}, {self.interpolation}, "
            f"{self.subset:.3g} of the images, seed {self.seed}"
        )


@dataclass(frozen=True)
class Study:
    """What all points of a study share.

    shards: the packed set, `digest` stands for its content. recipe: settings as nested values; what a point says takes
    their place. seconds: of training, of the runs of a fixed time. test_images: of a larger test part the first in
    packed order, which is random; None for all.
    """

    shards: Path
    dataset: str
    digest: str
    recipe: dict[str, Any]
    seconds: float
    test_images: int | None

    def config(self, point: Point, batch_size: int, accumulation: int) -> Config:
        """The settings of a point. Raises `UserError` where they do not agree."""
        content = {**self.recipe, "seed": point.seed, "resume": "never", "logging": {}}
        changed = {
            "data": {
                "shards": str(self.shards),
                "train_fraction": point.subset,
                "resolution": point.resolution,
                "interpolation": point.interpolation,
            },
            "loader": {"batch_size": batch_size},
            "model": {"name": point.model},
            "optim": {"grad_accumulation": accumulation},
            "checkpoint": {"every_minutes": None, "every_steps": None},
        }
        for section, values in changed.items():
            content[section] = {**content.get(section, {}), **values}
        return validate(content, "the study")

    @property
    def settings(self) -> Config:
        return validate(self.recipe, "the study")

    def is_timed(self, point: Point) -> bool:
        """Whether it is also trained for a fixed time: the points that only compare interpolations are not."""
        return point.interpolation == self.settings.data.interpolation

    def identity(self) -> dict[str, str]:
        """What lines of a file must agree in to belong to this study."""
        content = self.settings.model_dump(mode="json", exclude=_VARIED)
        content |= {"seconds": self.seconds, "test_images": self.test_images}
        return {"set": self.digest, "settings": hashlib.sha256(json.dumps(content).encode()).hexdigest()}


def points(
    study: Study, models: Sequence[str], subsets: Sequence[float], resolutions: Sequence[int], seeds: int
) -> list[Point]:
    """All points by the one seed before the next, so that a study that is cut off has every resolution."""
    settings = study.settings
    return [
        Point(model, subset, resolution, settings.data.interpolation, settings.seed + number)
        for number in range(seeds)
        for subset in sorted(subsets)
        for model in models
        for resolution in sorted(resolutions)
    ]


class Journal:
    """The file of lines, one for each point, that grows as they finish."""

    def __init__(self, path: Path, study: Study, resume: bool) -> None:
        """resume: go on with the lines that are there. Without, they are moved to NAME.previous.jsonl."""
        self._path = path
        self._identity = study.identity()
        make_directory(path.parent)
        self._others: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        if path.exists() and resume:
            for record in read_lines(path, whole=False):
                mine = all(record.get(name) == value for name, value in self._identity.items())
                (self.records if mine else self._others).append(record)
            # A line that was cut off by a kill goes.
            write_lines(path, self.lines)
        elif path.exists():
            os.replace(path, path.with_name(f"{path.stem}.previous.jsonl"))

    @property
    def others(self) -> int:
        """Lines of other settings or another set, which are kept and not shown."""
        return len(self._others)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All records of the file."""
        return [*self._others, *self.records]

    def failures(self) -> list[tuple[Point, str]]:
        return [(point_of(record), record["failed"]) for record in self.records if "failed" in record]

    def has(self, point: Point) -> bool:
        return any(point_of(record) == point for record in self.records)

    def append(self, point: Point, found: dict[str, Any]) -> None:
        record = {"name": NAME, **asdict(point), **self._identity, **found}
        self.records.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def point_of(record: dict[str, Any]) -> Point:
    return Point(*(record[name] for name in Point.__dataclass_fields__))


def read_lines(path: Path, whole: bool = True) -> Iterator[dict[str, Any]]:
    """The records of a study's file. whole: a last line that was cut off is an error too. Raises `UserError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise UserError(
            found=f"{path}: {reason}",
            expected=f"the lines that a study wrote, for instance benchmarks/out/{NAME}.jsonl",
            hint="python benchmarks/resolution_sweep.py writes them",
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            point_of(record), record["set"], record["settings"]
        except (ValueError, KeyError, TypeError):
            if not whole and number == len(lines) and not line.endswith("\n"):
                return
            raise UserError(
                found=f"{path}, line {number}, which is no point of a study",
                expected="the lines that python benchmarks/resolution_sweep.py writes",
                hint="measure again (an older version wrote other lines), or name another file",
            ) from None
        yield record


def expected_seconds(point: Point, records: Sequence[dict[str, Any]]) -> float | None:
    """How long a point may take, going by those that were measured; None if nothing can be said.

    What training for a number of epochs took is scaled by pixels and images (which is more than it grows by, if
    anything); the rest (starting, measuring the loader, a fixed time of training) stays as it was.
    """
    alike = [record for record in records if "failed" not in record and record["model"] == point.model]
    guesses = []
    for record in alike:
        scale = (point.resolution / record["resolution"]) ** 2 * point.subset / record["subset"]
        guess = record["point_seconds"] + record["by_epochs"]["wall_seconds"] * (scale - 1)
        guesses.append((abs(scale - 1), guess))
    nearest = min((distance for distance, _ in guesses), default=None)
    return max((guess for distance, guess in guesses if distance == nearest), default=None)
