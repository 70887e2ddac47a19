"""Ablations: runs of a plan, resumption after interruption, gains by seed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from support.version_2 import downgrade

from benchmarks import ablation
from benchmarks.ablation import RECIPE, Ablation, RunRecords, identity_of, read_plan
from benchmarks.common.charts import Chart
from benchmarks.training.ablation_report import METRICS, ablation_markdown, find_outlier, gains, mean_and_error
from benchmarks.training.frontier_report import plot_frontier
from shards import UserError
from shards.convert import upgrade
from trainer.config.load import load

SMALL = {
    "data.resolution": 8,
    "data.val_fraction": 0.3,
    "data.train_fraction": 0.2,
    "trainer.epochs": 1,
    "trainer.precision": "fp32",
    "loader.batch_size": 32,
}


def write_plan(path: Path, additions: list[dict[str, Any]], recipe: dict[str, Any]) -> Path:
    base = str(ROOT / "configs" / "quickstart.yaml")
    path.write_text(yaml.safe_dump({"base": base, "recipe": recipe, "additions": additions}))
    return path


def test_runs_are_found_after_an_upgrade_of_the_data(digits_set: Path, tmp_path: Path) -> None:
    shards = downgrade(Path(shutil.copytree(digits_set, tmp_path / "set")))
    plan = read_plan(write_plan(tmp_path / "ours.yaml", [], SMALL), [])
    results = RunRecords(tmp_path / "ours.jsonl")

    def measured() -> Ablation:
        return Ablation(plan, shards, 1, results, tmp_path / "teachers")

    before = measured()
    settings = plan.variants[0].make_config(plan, 0, shards, before.teachers)
    results.append({"variant": RECIPE, "seed": 0, "identity": identity_of(settings, before._data)})
    upgrade(shards)
    assert [list(row["records"]) for row in measured().rows()] == [[0]]


def test_an_interrupted_ablation_resumes(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    additions = [
        {"name": "faster", "set": {"optim.lr": 3e-3}},
        {"name": "no dropout", "set": {"model.drop_rate": 0.0, "optim.lr": 2e-3}},
    ]
    plan = write_plan(tmp_path / "ours.yaml", additions, SMALL | {"optim.lr": 1e-5})
    calls: list[tuple[float, int]] = []
    cut = [3]

    def here(work: Callable[..., dict[str, Any]], settings: Any, checkpoint: Path | None) -> dict[str, Any]:
        if len(calls) == cut[0]:
            raise KeyboardInterrupt
        calls.append((settings.optim.lr, settings.seed))
        return work(settings, checkpoint)

    monkeypatch.setattr(ablation, "in_process", here)

    def run(*arguments: str) -> str:
        options = ["--plan", str(plan), "--shards", str(digits_set), "--seeds", "2", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["ablation.py", *options, *arguments])
        assert ablation.main() == 0
        return capsys.readouterr().out

    assert "run the same command to resume" in run("--budget-minutes", "0")
    assert not calls
    with pytest.raises(KeyboardInterrupt):
        run()
    assert calls == [(1e-5, 0), (3e-3, 0), (2e-3, 0)], "seed by seed"
    lines = tmp_path / "ours.jsonl"
    with lines.open("a") as file:
        file.write('{"name": "ablation", "vari')  # killed as it wrote
    cut[0] = -1
    shown = run()
    assert calls[3:6] == [(1e-5, 1), (3e-3, 1), (2e-3, 1)]
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(records) == len(calls) == 6
    assert len({record["images_seen"] for record in records}) == 1, "equal compute"
    for record in records:
        assert record["environment"]["processor"] and record["test"]["samples"] == 359
    assert run() == shown.replace(shown[: shown.index("\n| ")], "", 1), "nothing is run again"
    assert len(calls) == len(records)
    assert (tmp_path / "ours.md").read_text().strip() in shown
    assert Image.open(tmp_path / "ours.png").width > 1000
    run("trainer.epochs=1", "data.train_fraction=0.1", "--budget-minutes", "0")
    assert len(calls) == len(records), "other settings are other runs, for which there was no time"


def test_records_from_before_a_setting_was_there_still_count(tmp_path: Path) -> None:
    settings = load(ROOT / "configs" / "quickstart.yaml", ["optim.lr=0.5"])
    known = identity_of(settings, "digest")
    at_default, changed = (
        {name: known[name] for name in known if name != left} for left in ("augment.hue", "optim.lr")
    )
    (tmp_path / "ours.jsonl").write_text(json.dumps({"identity": at_default}) + "\n")
    (tmp_path / "theirs.jsonl").write_text(json.dumps({"identity": changed}) + "\n")
    assert RunRecords(tmp_path / "ours.jsonl").find(settings, "digest") == {"identity": at_default}
    assert RunRecords(tmp_path / "ours.jsonl").find(settings, "other") is None
    assert RunRecords(tmp_path / "theirs.jsonl").find(settings, "digest") is None


@pytest.mark.parametrize(
    ("gains", "place"), [([0.1, -19.0, 4.8], 1), ([9.7, 4.8, -4.8], 0), ([9.5, 4.8, 0.0], None), ([5.0, 0.1], None)]
)
def test_one_gain_far_from_the_others_is_not_drawn_to_scale(gains: list[float], place: int | None) -> None:
    assert find_outlier(gains) == place


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/training/plans").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_shipped_plans_are_valid(path: Path) -> None:
    plan = read_plan(path, ["trainer.precision=fp32"])
    assert plan.common == {"trainer.precision": "fp32"}
    for variant in plan.variants:
        settings = variant.make_config(plan, 3, Path("set"), Path("teachers"))
        assert settings.seed == 3 and settings.data.shards == "set"
    names = [variant.name for variant in plan.variants]
    assert names[0] == RECIPE and len(names) > 2


# Table 2 of the published system on NumtaDB without its rows with pseudo-labels: macro F1 on the validation split.
NUMTADB_ROWS = """
Model1 (64): Reverse 0.001 0.48 | BBox, Reverse 0.001 0.8859 | BBox, Reverse, Dilation 0.001 0.8929
    | BBox, Reverse, Mixup 0.001 0.8799
LeNet (28): Reverse 0.01 0.8858 | Reverse, Dilation 0.01 0.8837 | Reverse, Dilation 0.001 0.7353
    | BBox, Reverse, Dilation 0.01 0.9598 | BBox, Reverse, Dilation 0.001 0.9202
Model2 (48): Reverse, Dilation 0.001 0.7657 | BBox, Reverse, Dilation 0.001 0.9206 | BBox, Reverse, Dilation 0.01 0.9662
    | BBox, Reverse, Dilation, Contour Cutout 0.01 0.966
Model3 (48): Reverse, Dilation 0.001 0.7285 | BBox, Reverse, Dilation 0.001 0.9378 | BBox, Reverse, Dilation 0.01 0.9643
"""


def test_the_numtadb_plan_has_the_rows_of_the_published_table() -> None:
    plan = read_plan(ROOT / "benchmarks/training/plans/numtadb.yaml", [])
    rows = [("Model1", "64", "N/A", "0.001", None)]  # the recipe
    for line in NUMTADB_ROWS.replace("\n    |", " |").strip().splitlines():
        network, side, cells = re.fullmatch(r"(\w+) \((\d+)\): (.*)", line).groups()
        rows += [(network, side, *cell.rsplit(" ", 2)) for cell in cells.split(" | ")]
    for variant, (network, side, steps, lr, score) in zip(plan.variants, rows, strict=True):
        assert variant.name == (RECIPE if score is None else f"{network}, {steps}, {lr}: {score}")
        config = variant.make_config(plan, 0, Path("set"), Path("teachers"))
        assert config.model.name == {"LeNet": "lenet"}.get(network, f"numtadb_{network.lower()}")
        assert (config.data.resolution, config.optim.lr) == (int(side), float(lr))
        data = config.data
        found = {
            "Reverse": data.invert == "auto",
            "BBox": (data.crop_to_foreground, data.foreground_opening_radius) == (0, 1),
            "Dilation": data.dilation_radius == 1,
            "Mixup": (config.mixup.prob, config.mixup.cutmix_alpha) == (1, 0),
            "Contour Cutout": config.augment.erase > 0 and config.augment.erase_at == "contour",
        }
        assert {name for name, is_on in found.items() if is_on} == set(steps.split(", ")) - {"N/A"}
        assert not config.augment.augmentation() or "Contour Cutout" in steps
        assert round(35477 * config.data.train_fraction) == (10721 if network == "Model1" else 35477)


def test_a_plan_needs_validation_images(digits_set: Path, tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path / "ours.yaml", [], SMALL), ["data.val_fraction=0"])
    with pytest.raises(UserError, match="has no val split"):
        Ablation(plan, digits_set, 1, RunRecords(tmp_path / "ours.jsonl"), tmp_path / "teachers")


@pytest.mark.parametrize(
    ("additions", "word"),
    [
        ([{"name": RECIPE}], RECIPE),
        ([{"name": "a", "teacher": "b"}], "teacher b"),
        ([{"set": {}}], "name"),
    ],
)
def test_invalid_plans_are_refused(tmp_path: Path, additions: list[dict[str, Any]], word: str) -> None:
    with pytest.raises(UserError, match=word):
        read_plan(write_plan(tmp_path / "plan.yaml", additions, {}), [])
    with pytest.raises(UserError, match=r"none\.yaml"):
        read_plan(tmp_path / "none.yaml", [])


def row(name: str, validation: list[tuple[float, float]], test: float = 0.5) -> dict[str, Any]:
    records = {
        seed: {
            "validation": dict(zip(METRICS, figures, strict=True)),
            "test": dict.fromkeys(METRICS, test),
            "training_seconds": 1.0,
            "images_seen": 100,
            "environment": {"cores": 2, "processor": "one", "device": "cpu"},
        }
        for seed, figures in enumerate(validation)
    }
    return {"name": name, "records": records}


def test_gains_are_paired_by_seed() -> None:
    recipe = [(0.80, 0.60), (0.82, 0.64), (0.81, 0.62)]  # seeds differ by more than the addition gains
    rows = [
        row("recipe", recipe, test=0.9),
        row("both", [(a + 0.01, f + 0.02) for a, f in recipe], test=0.1),
    ]
    for metric, gain in zip(METRICS, (0.01, 0.02), strict=True):
        mean, error = mean_and_error(gains(rows[1], rows[0], "validation", metric))
        assert mean == pytest.approx(gain) and error == pytest.approx(0, abs=1e-9)
    text = ablation_markdown(rows)
    assert "| +1" not in text and "-80.00 ± 0.00" in text


def test_the_frontier_is_drawn_over_the_fastest_run_of_each_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("long", [(0.9, 0.8)] * 2, test=0.88), row("short", [(0.9, 0.8)] * 3, test=0.8)]
    for each, minutes in zip(rows, ([12, 10], [2, 3, 4]), strict=True):
        for record, duration in zip(each["records"].values(), minutes, strict=True):
            record["cpu_seconds"] = 60 * duration
    published = [{"name": "others", "accuracy": 0.85, "minutes": 5}, {"name": "best", "macro_f1": 0.7}]
    drawn: list[list[tuple[list[float], list[float]]]] = []

    def write_png(chart: Chart, path: Path) -> None:
        panels = matplotlib.figure.Figure().subplots(1, 2)
        chart.draw(panels)
        lines = [
            [line for line in axes.lines if line.get_linestyle() != "None" or line.get_marker() == "D"]
            for axes in panels
        ]
        drawn.extend([[(list(line.get_xdata()), list(line.get_ydata())) for line in each] for each in lines])

    monkeypatch.setattr(Chart, "write_png", write_png)
    plot_frontier(rows, published, tmp_path / "frontier.png")
    curve = ([2, 10], [pytest.approx(80), pytest.approx(88)])
    assert drawn == [[curve, ([5], [85])], [curve, ([0, 1], [70, 70])]]


def test_a_teacher_is_the_run_of_the_same_seed(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    additions = [
        {"name": "faster", "set": {"optim.lr": 3e-3}},
        {"name": "little dropout", "set": {"model.drop_rate": 0.1}},
        {"name": "taught", "teacher": "faster", "set": {"distillation.weight": 0.3}},
    ]
    plan = write_plan(tmp_path / "ours.yaml", additions, {"optim.lr": 1e-3, "model.drop_rate": 0.4})
    taught_by: list[str | None] = []

    def fake_in_process(work: Callable[..., Any], settings: Any, checkpoint: Path | None) -> dict[str, Any]:
        teacher = settings.distillation.teacher
        assert teacher is None or teacher.exists()
        taught_by.append(teacher and teacher.name)
        if checkpoint is not None:
            checkpoint.parent.mkdir(exist_ok=True, parents=True)
            checkpoint.touch()
        gains = (settings.optim.lr == 3e-3) + (settings.model.drop_rate == 0.1) + (settings.distillation.weight == 0.3)
        return {"seconds": 1.0, **row("", [(0.5 + 0.01 * gains,) * 2], test=0.6)["records"][0]}

    monkeypatch.setattr(ablation, "in_process", fake_in_process)
    options = ["--plan", str(plan), "--shards", str(digits_set), "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *options])
    assert ablation.main() == 0
    records = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    assert [record["variant"] for record in records] == [RECIPE, "faster", "little dropout", "taught"]
    assert taught_by == [None, None, None, "faster-0.pt"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *options, "trainer.epochs=1"])
    assert ablation.main() == 0
    assert len(taught_by) == 8 and len([*tmp_path.glob("teachers/*/*/faster-0.pt")]) == 2, "a teacher for each setting"
    assert records[-1]["overrides"] == {"distillation.weight": 0.3}


def test_the_standard_error_is_that_of_a_mean() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))
    assert mean_and_error([5.0]) == (5.0, 0.0)
