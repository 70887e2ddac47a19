"""What one run and a search send to every logger, read back from their files."""

from __future__ import annotations

import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from conftest import pack_splits, synthetic_splits
from support.training_runs import train_here, write_recipe

from trainer.config.schema import Config
from trainer.loop import engine
from trainer.runtime.loggers.base import StepFile, flat_metrics
from trainer.runtime.loggers.tensorboard_logger import TensorBoardLogger

SETTINGS: dict[str, Any] = {
    "data": {"val_fraction": 0.25, "resolution": 8},
    "loader": {"batch_size": 8},
    "model": {"name": "three_block_cnn"},
    "optim": {"grad_accumulation": 2, "max_grad_norm": 0.5, "lr": 1e-5},
    "trainer": {"precision": "fp32", "epochs": 2},
    "logging": {"tensorboard": True, "wandb": "auto", "mlflow": find_spec("mlflow") is not None, "every_steps": 2},
}
CLOCKED = {"images_per_second", "data_wait_share"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("logged")
    splits = synthetic_splits(train=96, test=24, classes=3, shape=(8, 8, 1), transposed=False)
    return write_recipe(directory / "small.yaml", SETTINGS, pack_splits(splits, directory / "set", block_size=16))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Logged:
    """A run with all loggers, and what its steps should have logged."""

    def __init__(self, recipe: Path, path: Path) -> None:
        self.path, self.store = path, path.parent / "mlruns"
        self.losses: list[float] = []
        self.updates: list[dict[str, float]] = []
        compute, update = engine.compute_loss, engine._update

        def computing(logits: torch.Tensor, *others: Any) -> torch.Tensor:
            loss = compute(logits, *others)
            self.losses.append(float(loss.detach()) / len(logits))
            return loss

        def updating(training: Any) -> None:
            squares = [float(each.grad.double().square().sum()) for each in training.state.model.parameters()]
            update(training)
            self.updates.append(
                {"loss": self.losses[-1], "gradient_norm": sum(squares) ** 0.5, "lr": training.state.lr}
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "compute_loss", computing)
            patch.setattr(engine, "_update", updating)
            patch.setenv("WANDB_MODE", "offline")
            patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
            patch.setenv("MLFLOW_TRACKING_URI", self.store.as_uri())
            assert train_here(patch, recipe, path) == 0
        wandb.teardown()  # it keeps its mode
        self.history, self.steps = lines(path / "metrics.jsonl"), lines(path / "steps.jsonl")
        self.summary = json.loads((path / "summary.json").read_text())


@pytest.fixture(scope="module")
def logged(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    return Logged(recipe, tmp_path_factory.mktemp("runs") / "run")


def test_steps_have_the_values_of_their_update(logged: Logged) -> None:
    assert [record["step"] for record in logged.steps] == list(range(2, len(logged.updates) + 1, 2))
    assert max(update["gradient_norm"] for update in logged.updates) > 0.5, "the norm before clipping"
    per_epoch = len(logged.updates) // 2
    for record in logged.steps:
        for name, value in logged.updates[record["step"] - 1].items():
            assert record[name] == pytest.approx(value, rel=1e-5), name
        assert record["epoch"] == (record["step"] - 1) // per_epoch + 1
        assert record["images_per_second"] > 0 and 0 <= record["data_wait_share"] <= 1
    assert [record["step"] for record in logged.history] == [per_epoch, 2 * per_epoch]


def test_steps_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 8, "lo')
    logger = StepFile(path, step=5)
    logger.log_step({"step": 6, "lr": 0.5})
    assert lines(path) == [{"step": 2}, {"step": 4}, {"step": 6, "lr": 0.5}]


@pytest.mark.slow
def test_a_resumed_run_continues_the_steps(
    logged: Logged, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after more steps were written than the checkpoint has, and within a line."""
    step, path = engine.train_step, tmp_path / "run" / "steps.jsonl"
    done = 0

    def until_death(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal done
        done += 1
        if done == 13:  # epoch 2 has begun
            raise KeyboardInterrupt
        return step(*arguments, **options)

    options = ["logging.tensorboard=false", "logging.wandb=off", "logging.mlflow=false"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", until_death)
        with pytest.raises(KeyboardInterrupt):
            train_here(patch, recipe, tmp_path / "run", *options)
    with open(path, "a") as file:
        file.write(json.dumps({"step": 7, "loss": 1.0}) + "\n" + '{"step": 8, "lo')
    assert train_here(monkeypatch, recipe, tmp_path / "run", *options, "resume=auto") == 0
    found, expected = (
        [{name: value for name, value in record.items() if name not in CLOCKED} for record in records]
        for records in (lines(path), logged.steps)
    )
    assert found == expected


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    logger = StepFile(tmp_path / "steps.jsonl", 0)
    logger.log_step({"step": 1, "loss": float("nan"), "gradient_norm": float("inf"), "lr": 0.5})
    assert lines(tmp_path / "steps.jsonl") == [{"step": 1, "loss": None, "gradient_norm": None, "lr": 0.5}]
    assert flat_metrics({"epoch": 1, "loss": float("nan"), "lr": 0.5, "validation": {"loss": 1}}, "training/") == {
        "training/lr": 0.5,
        "validation/loss": 1,
    }


def test_histograms_of_weights_are_those_of_numpy(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    torch.nn.init.constant_(model[1].weight, 0.25)
    logger = TensorBoardLogger(Config(data={"shards": "x"}), tmp_path, [], 0)
    logger.log_weights({"epoch": 1}, model)
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()
    assert events.Tags()["histograms"] == ["weights/0.weight", "weights/1.weight"]
    counts, edges = np.histogram(model[0].weight.detach().numpy(), bins=64)
    found = events.Histograms("weights/0.weight")[0].histogram_value
    assert np.array_equal(found.bucket, [0, *counts]) and np.allclose(found.bucket_limit, edges)
    assert sum(events.Histograms("weights/1.weight")[0].histogram_value.bucket) == 15


def test_tensorboard_has_curves_pictures_histograms_and_hyperparameters(logged: Logged) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    by_step, by_epoch = (
        accumulator.EventAccumulator(str(path), {"images": 0, "histograms": 0}).Reload()
        for path in (logged.path / "tensorboard" / "steps", logged.path / "tensorboard")
    )
    for name in ("loss", "gradient_norm", "lr", "images_per_second", "data_wait_share"):
        found = [(event.step, event.value) for event in by_step.Scalars(f"step/{name}")]
        assert found == [(each["step"], pytest.approx(each[name], rel=1e-5)) for each in logged.steps]
    accuracy = [event.value for event in by_epoch.Scalars("training/train_accuracy")]
    assert accuracy == pytest.approx([record["train_accuracy"] for record in logged.history])
    assert by_epoch.Scalars("test/balanced_accuracy")[0].value == pytest.approx(logged.summary["balanced_accuracy"])
    assert {"test/confusion_matrix", "test/misclassified"} <= set(by_epoch.Tags()["images"])
    histogram = by_epoch.Histograms("weights/0.weight")[-1]
    assert (histogram.step, histogram.histogram_value.num) == (2, 32 * 9)
    parsed = HParamsPluginData.FromString(
        by_epoch.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert parsed["optim.lr"].number_value == 1e-5 and parsed["model.name"].string_value == "three_block_cnn"


def test_mlflow_has_curves_pictures_and_parameters(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(logged.store.as_uri())
    run = client.get_run((logged.path / "mlflow_run_id").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "1e-05"
    assert run.data.metrics["test/accuracy"] == logged.summary["accuracy"]
    found = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "step/gradient_norm")}
    assert found == {record["step"]: record["gradient_norm"] for record in logged.steps}
    found = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "validation/accuracy")}
    assert found == {record["step"]: record["validation"]["accuracy"] for record in logged.history}
    pictures = {each.path for each in client.list_artifacts(run.info.run_id, "test")}
    assert pictures == {"test/confusion_matrix.png", "test/misclassified.png"}


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline run: 7 bytes of header, then LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, records, parts = path.read_bytes(), 7, [], b""
    while position + 7 <= len(content):
        if 0 < (left := -position % 32768) < 7:  # the end of a block is padded
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_weights_and_biases_has_curves_tables_histograms_and_hyperparameters(logged: Logged) -> None:
    (path,) = logged.path.glob("wandb/offline-run-*/run-*.wandb")
    rows, config = [], {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, name = item.nested_key
                section = row
                for each in outer:
                    section = section.setdefault(each, {})
                section[name] = json.loads(item.value_json)
            rows.append(row)
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    assert config["optim"]["lr"] == 1e-5
    curves = {row["step"]: row["step/gradient_norm"] for row in rows if "step/gradient_norm" in row}
    assert curves == {record["step"]: pytest.approx(record["gradient_norm"]) for record in logged.steps}
    (last,) = (row for row in rows if "test/misclassified" in row)
    predictions = np.load(logged.path / "predictions.npz")
    wrong = predictions["labels"] != predictions["predicted"]
    assert last["test/misclassified"]["nrows"] == wrong.sum() > 0
    assert sum(last["test/confidence"]["values"]) == 24
    assert any("confusion_matrix" in name for name in last)
    assert [row for row in rows if "weights/0.weight" in row and row["epoch"] in (1, 2)]
    table = json.loads(next(logged.path.rglob("media/table/test/misclassified*.json")).read_text())
    found = {(row[1], row[2], row[4]) for row in table["data"]}
    columns = (predictions[name][wrong] for name in ("labels", "predicted", "rows"))
    assert found == {(f"class {true}", f"class {said}", row) for true, said, row in zip(*columns, strict=True)}
