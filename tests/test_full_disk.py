"""A full disk, at whatever write: one message, nothing incomplete under a final name, and the same command works later.

Runs and their checkpoints: `trainer/loop/test_train.py`.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.damaged_runs import Outcome, run
from support.full_disk import full_disk
from support.synthetic_records import foreign_set
from support.training_runs import train_here, write_smallest_recipe

from benchmarks import ablation
from pipeline import preview, shard
from pipeline.dedup import overlap
from shards import convert, index
from trainer.evaluate import __main__ as evaluate
from trainer.export import ensemble, export
from trainer.loop import find_lr
from trainer.predict import __main__ as predict
from trainer.predict import label_errors, pseudo_label
from trainer.report import __main__ as report
from trainer.tune import __main__ as tune

MESSAGE = ("error: ", "expected: ", "hint: ")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set, images, foreign shards, a search and a plan: what the commands read, but for a run."""
    place = tmp_path_factory.mktemp("template")
    write_smallest_recipe(place, epochs=1)
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (place / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                picture = random.integers(0, 255, (9 + number, 8), np.uint8)
                Image.fromarray(picture).save(place / "images" / split / name / f"{number}.png")
    foreign_set(place / "foreign")
    space = {"optim.lr": {"type": "float", "low": 1e-3, "high": 1e-2}}
    search = {"recipe": str(place / "recipe.yaml"), "budget": {"trials": 1}, "pruner": {"name": "none"}, "space": space}
    (place / "search.yaml").write_text(yaml.safe_dump(search))
    plan = {"base": str(place / "recipe.yaml"), "recipe": {}, "additions": [{"name": "x", "set": {"optim.lr": 1e-3}}]}
    (place / "plan.yaml").write_text(yaml.safe_dump(plan))
    return place


@pytest.fixture(scope="module")
def trained(template: Path) -> Path:
    """The same with a run."""
    with pytest.MonkeyPatch.context() as patch:
        assert train_here(patch, template / "recipe.yaml", template / "run") == 0
    return template


def commands(template: Path, out: Path) -> dict[str, tuple[Callable[[], object] | None, Callable[[], Outcome]]]:
    """What is to be done before each command, and the command, which writes below `out`."""
    run_dir, shards = template / "run", template / "set"

    def copy(name: str) -> Callable[[], object]:
        return lambda: shutil.copytree(template / name, out / name)

    def packed(*options: object) -> Callable[[], Outcome]:
        return lambda: run(shard.main, "pack", *options, "--workers=1", f"--out={out / 'packed'}")

    def exported(name: str) -> Callable[[], Outcome]:
        return lambda: run(export.main, "export", run_dir, f"--format={name}", f"--out={out / 'export'}")

    folder = ["folder", f"--raw={template / 'images'}"]
    return {
        "pack": (None, packed("digits")),
        "pack zarr": (None, packed("digits", "--store=zarr")),
        "pack records": (None, packed(*folder, "--store=records")),
        "pack resized": (None, packed(*folder, "--size=8", "--val-fraction=0.3")),
        "pack again": (packed("digits"), packed("digits", "--store=zarr", "--force")),
        "convert": (None, lambda: run(convert.main, "convert", shards, out / "zarr", "--store=zarr")),
        "convert back": (
            lambda: shutil.copytree(shards, out / "tar"),
            lambda: run(convert.main, "convert", shards, out / "tar", "--store=tar", "--force"),
        ),
        "index": (copy("foreign"), lambda: run(index.main, "index", out / "foreign")),
        "remove": (
            None,
            lambda: run(
                *(overlap.main, "overlap", shards, shards, f"--csv={out / 'same.csv'}", f"--remove={out / 'others'}")
            ),
        ),
        "preview": (None, lambda: run(preview.main, "preview", shards, f"--out={out / 'page.png'}")),
        "evaluate": (
            None,
            lambda: run(evaluate.main, "evaluate", run_dir, shards, f"--json={out / 'a.json'}", "--device=cpu"),
        ),
        "predict": (
            None,
            lambda: run(
                *(predict.main, "predict", run_dir, template / "images" / "train" / "cat", "--device=cpu"),
                *(f"--csv={out / 'a.csv'}", f"--json={out / 'a.json'}", f"--sheet={out / 'a.png'}"),
            ),
        ),
        "pseudo-label": (
            None,
            lambda: run(
                *(pseudo_label.main, "label", run_dir, shards, "--confidence=0.01", f"--csv={out / 'labels.csv'}"),
                *(f"--add-to={shards}", f"--out={out / 'more'}"),
            ),
        ),
        "export safetensors": (None, exported("safetensors")),
        "export onnx": (None, exported("onnx")),
        "export torch": (None, exported("torch-export")),
        "ensemble": (None, lambda: run(ensemble.main, "ensemble", run_dir, run_dir, f"--out={out / 'both'}")),
        "find-lr": (
            None,
            lambda: run(find_lr.main, "find-lr", template / "recipe.yaml", "--steps=3", f"--out={out / 'rates'}"),
        ),
        "label-errors": (
            None,
            lambda: run(
                *(label_errors.main, "label-errors", template / "recipe.yaml", "--folds=2", f"--out={out / 'errors'}")
            ),
        ),
        "report": (copy("run"), lambda: run(report.main, "report", out / "run")),
        "compare": (
            copy("run"),
            lambda: run(report.main, "report", out / "run", run_dir, f"--out={out / 'page.html'}"),
        ),
        "tune": (None, lambda: run(tune.main, "tune", template / "search.yaml", f"dir={out / 'study'}")),
        "ablation": (
            None,
            lambda: run(
                *(ablation.main, "ablation", f"--plan={template / 'plan.yaml'}", f"--shards={shards}", "--seeds=1"),
                f"--out={out}",
            ),
        ),
    }


# Clocks and the names of the machine decide some bytes of these; an incomplete one lacks its end.
ENDS = {
    ".html": b"</html>",
    ".md": b"",
    ".yaml": b"",
    ".json": b"}",
    ".jsonl": b"}",
    ".journal": b"}",
    ".svg": b"</svg>",
    ".png": b"IEND\xaeB`\x82",
}
SIZED = {".safetensors", ".onnx", ".pt2"}  # as large as ever


def content(directory: Path) -> dict[str, str | int | bool]:
    """What tells whether each file below a directory is complete."""
    found: dict[str, str | int | bool] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        if path.suffix in {".log", ".lock"} or path.parent.name == "checkpoints":
            continue
        data = path.read_bytes()
        value: str | int | bool = hashlib.sha256(data).hexdigest()
        if path.suffix in ENDS:
            is_empty = not data and path.suffix in {".jsonl", ".journal"}  # lines are appended; none yet
            value = is_empty or data.rstrip(b"\n").endswith(ENDS[path.suffix])
        elif path.suffix in SIZED:
            value = len(data)
        found[str(path.relative_to(directory))] = value
    return found


def attack(name: str, template: Path, place: Path, points: int = sys.maxsize) -> list[str]:
    """Let a command fail at every operation, or at some; returns what is wrong."""
    out = place / "out"

    def start() -> Callable[[], Outcome]:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        prepare, command = commands(template, out)[name]
        if prepare is not None:
            prepare()
        return command

    command = start()
    before = content(out)
    with full_disk(out, sys.maxsize) as disk:
        outcome = command()
    assert outcome.status == 0, outcome
    expected = content(out)
    assert disk.count > 2, "the command writes"
    wrong = []
    for first in np.unique(np.linspace(0, disk.count - 1, min(points, disk.count), dtype=int)):
        command = start()
        with full_disk(out, first) as disk_then:
            outcome = command()
        if disk_then.count <= first:
            continue  # clocks decide how often some commands write
        after = content(out)
        what = f"{name}, {first} of {disk.count}"
        is_refused = outcome.status == 2 and [outcome.errors.count(word) for word in MESSAGE] == [1, 1, 1]
        if not is_refused or "Traceback" in outcome.errors or str(out) not in outcome.errors:
            wrong.append(f"{what}: status {outcome.status}\n{outcome.errors[-2000:]}")
        final = {path: digest for path, digest in after.items() if ".packing/" not in path}  # packing continues there
        if odd := [path for path, digest in final.items() if digest not in (before.get(path), expected.get(path))]:
            wrong.append(f"{what}: incomplete {odd}")
        outcome = command()
        if outcome.status != 0 or content(out) != expected:
            difference = content(out).items() ^ expected.items()
            wrong.append(f"{what}: again: status {outcome.status}, {difference}\n{outcome.errors[-2000:]}")
    return wrong


@pytest.mark.parametrize("name", ["pack records", "convert back", "index", "remove", "preview"])
def test_commands_at_some_writes(name: str, template: Path, tmp_path: Path) -> None:
    wrong = attack(name, template, tmp_path, points=4)
    assert not wrong, "\n\n".join(wrong)


NAMES = [*commands(Path(), Path())]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_command_at_every_write(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "in_process", lambda work, *arguments: work(*arguments))
    wrong = attack(name, trained, tmp_path)
    assert not wrong, "\n\n".join(wrong)
