"""Run directories that are damaged at random, and all commands that take one, in this process."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml

from shards.cli import run_command
from trainer.evaluate import __main__ as evaluate
from trainer.export import export
from trainer.loop import replay_step
from trainer.predict import __main__ as predict
from trainer.predict import demo, pseudo_label
from trainer.report import __main__ as report
from trainer.run import main as train

_SECONDS = 60  # of a command; a hang takes for ever
_ALIEN: tuple[Any, ...] = (
    *(None, True, -1, 0, 7, 10**30, 0.5, -1e300, math.inf, math.nan, "", "x", "\x1b[31m", "a" * 100_000, [], [[]]),
    *({}, {"x": 1}, [None] * 3, ["x", 1]),
)


class Hang(BaseException):
    """A command takes too long."""


@dataclass(frozen=True)
class Outcome:
    """What a command came to: its exit status (None for an exception), and its standard error."""

    status: int | None
    errors: str


def run(main: Callable[[], int | None], name: str, *arguments: object) -> Outcome:
    """Run a command as a user does."""

    def interrupt(*_: object) -> None:
        raise Hang

    status: int | None = None
    errors = io.StringIO()
    terminate = signal.getsignal(signal.SIGTERM)
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(_SECONDS)
    try:
        with (
            mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(errors),
        ):
            run_command(main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except (Exception, Hang):
        errors.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        signal.signal(signal.SIGTERM, terminate)
    return Outcome(status, errors.getvalue())


@dataclass(frozen=True)
class Place:
    """Where the commands run: a run on a packed data set, another complete run, an image, and a recipe."""

    shards: Path
    other: Path
    image: Path
    recipe: Path


def commands(directory: Path, place: Place) -> dict[str, Callable[[], Outcome]]:
    """The commands that take a run directory, each by its name. Those that write into it come last."""
    out = directory.parent
    teach = ["model.name=three_block_cnn", "--dry-run"]
    return {
        "evaluate": lambda: run(evaluate.main, "evaluate", directory, place.shards, "--device=cpu"),
        "predict": lambda: run(predict.main, "predict", directory, place.image, "--device=cpu"),
        "demo": lambda: run(_open_demo(directory), "demo"),
        "pseudo_label": lambda: run(
            pseudo_label.main, "label", directory, place.shards, "--confidence=0.5", f"--csv={out / 'labels.csv'}"
        ),
        "replay_step": lambda: run(replay_step.main, "replay", directory / "nonfinite" / "step.pt", "--device=cpu"),
        "teacher": lambda: run(train, "run", place.recipe, f"distillation.teacher={directory}", *teach),
        "weights": lambda: run(
            train, "run", place.recipe, f"model.init_checkpoint={directory / 'checkpoints' / 'best.pt'}", *teach
        ),
        "compare": lambda: run(report.main, "report", directory, place.other, f"--out={out / 'page.html'}"),
        "export": lambda: run(export.main, "export", directory, "--format=safetensors"),
        "report": lambda: run(report.main, "report", directory),
        "run": lambda: run(train, "run", directory / "config.yaml", "resume=auto", f"run.dir={directory}"),
        "resume": lambda: _resume(directory),
    }


def _open_demo(directory: Path) -> Callable[[], int]:
    def main() -> int:
        demo.DrawingClassifier(demo.Predictor(directory, "cpu"))
        return 0

    return main


def _resume(directory: Path) -> Outcome:
    """Complete the run again from its checkpoint before the last."""
    last = directory / "checkpoints" / "last.pt"
    with contextlib.suppress(OSError):
        last.unlink()
    with contextlib.suppress(OSError):
        (directory / "summary.json").unlink()
    return run(train, "run", directory / "config.yaml", "resume=auto", f"run.dir={directory}")


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))


def damage(directory: Path, other: Path, seed: int) -> str:
    """Damage one file of a run directory; returns a description."""
    random = np.random.default_rng(seed)
    paths = files(directory)
    path = paths[random.integers(len(paths))]
    kinds = [*_KINDS, *(_SPECIAL.get(path.suffix, ()) * 4)]
    kind = kinds[random.integers(len(kinds))]
    kind(path, random, other / path.relative_to(directory))
    return f"seed {seed}: {kind.__name__.strip('_')} {path.relative_to(directory)}"


def _flip_bits(path: Path, random: np.random.Generator, _: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(int(random.integers(1, 20))):
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


def _cut(path: Path, random: np.random.Generator, _: Path) -> None:
    os.truncate(path, int(random.random() * path.stat().st_size))


def _empty(path: Path, *_: object) -> None:
    os.truncate(path, 0)


def _append(path: Path, random: np.random.Generator, _: Path) -> None:
    with open(path, "ab") as file:
        file.write(random.bytes(100))


def _delete(path: Path, *_: object) -> None:
    path.unlink()


def _make_directory(path: Path, *_: object) -> None:
    path.unlink()
    path.mkdir()


def _make_pipe(path: Path, *_: object) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_loop(path: Path, *_: object) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _make_endless(path: Path, *_: object) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _from_other_run(path: Path, _: object, other: Path) -> None:
    shutil.copy(other, path)


def _from_other_file(path: Path, random: np.random.Generator, other: Path) -> None:
    paths = files(other.parent)
    shutil.copy(paths[random.integers(len(paths))], path)


_KINDS = (
    *(_flip_bits, _cut, _empty, _append, _delete, _make_directory, _make_pipe, _make_loop, _make_endless),
    *(_from_other_run, _from_other_file),
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Container and key of every value inside."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(inner)


def _mutate(content: Any, random: np.random.Generator) -> Any:
    """Replace, remove or double one value."""
    places = [*_places(content)]
    container, key = places[int(len(places) * random.random() ** 2)]  # more often one of the first
    what = random.integers(5)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container[key], int | float):
        container[key] = container[key] * 2 + 1
    elif what == 2 and isinstance(container[key], list):
        container[key] = container[key] * 2
    elif isinstance(container[key], torch.Tensor):
        tensor = container[key]
        variants = (tensor[None], tensor.flatten()[:1], tensor.to_sparse(), tensor.flatten()[:1].expand(10**9), None)
        container[key] = variants[random.integers(len(variants))]
    else:
        container[key] = _ALIEN[random.integers(len(_ALIEN))]
    return content


def _mutate_json(path: Path, random: np.random.Generator, _: Path) -> None:
    if random.random() < 0.1:
        path.write_text("[" * 100_000)
        return
    path.write_text(json.dumps(_mutate(json.loads(path.read_text()), random)))


def _mutate_lines(path: Path, random: np.random.Generator, _: Path) -> None:
    records = _mutate([json.loads(line) for line in path.read_text().splitlines()], random)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _mutate_yaml(path: Path, random: np.random.Generator, _: Path) -> None:
    path.write_text(yaml.safe_dump(_mutate(yaml.safe_load(path.read_text()), random)))


def _mutate_checkpoint(path: Path, random: np.random.Generator, _: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save(_mutate(state, random), path)


def _mutate_arrays(path: Path, random: np.random.Generator, _: Path) -> None:
    columns = dict(np.load(path))
    name = [*columns][random.integers(len(columns))]
    column = columns.pop(name)
    variants = (
        *(None, column[:-1], column * -1, column + 10**6, column[:, None], column.astype(np.float16), column[::-1]),
        *(np.full(len(column), "x"), np.full(len(column), None), np.array(3), np.zeros(len(column), column.dtype)),
        np.full(len(column), np.nan),
    )
    changed = variants[random.integers(len(variants))]
    np.savez_compressed(path, **columns, **({} if changed is None else {name: changed}))


def _make_bomb(path: Path, random: np.random.Generator, _: Path) -> None:
    """Replace the contents of an archive's member by compressed zeros."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    chosen = max(contents, key=lambda name: len(contents[name]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, bytes(1 << 28) if name == chosen else content)


_SPECIAL: dict[str, tuple[Callable[..., None], ...]] = {
    ".json": (_mutate_json,),
    ".jsonl": (_mutate_lines,),
    ".yaml": (_mutate_yaml,),
    ".pt": (_mutate_checkpoint, _mutate_checkpoint, _mutate_checkpoint, _mutate_checkpoint, _make_bomb),
    ".npz": (_mutate_arrays, _mutate_arrays, _make_bomb),
}
