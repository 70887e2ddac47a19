"""Checkpoints of a run: which files there are after each write, after a full disk, and what `best.pt` holds."""

from __future__ import annotations

import errno
import shutil
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from support.simulated_gpu import GPU, simulated_gpu

from shards import Manifest, UserError
from shards.errors import DiskFullError
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint import trained_model
from trainer.checkpoint.checkpointer import Checkpointer, _copy
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel, load_model, load_trained_model
from trainer.config.load import load
from trainer.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig
from trainer.models.factory import make_model

LAST, PREVIOUS, BEST = checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST
CLASSES = ("a", "b", "c")


def state_of(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 2,
        "history": [{"epoch": 1}] * step,
        "model": {"weight": torch.full((3,), 1.0 * step)},
    }


def model_of(epoch: int) -> TrainedModel:
    config = load(ROOT / "configs" / "quickstart.yaml", ["model.name=three_block_cnn", "trainer.precision=fp32"])
    torch.manual_seed(epoch)
    return TrainedModel(
        weights=make_model(config.model, 1, len(CLASSES)).state_dict(),
        config=config,
        classes=CLASSES,
        data_identity="digest",
        image_shape=(8, 9, 1),
        mean=(0.25,),
        std=(0.5,),
        adapter_state={"version": 1},
        epoch=epoch,
        tau=0.0,
        offsets=np.zeros(len(CLASSES), np.float32),
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path)
    directory.checkpoints.mkdir()
    return directory


def checkpointer_of(run: RunDirectory, last_is_intact: bool = True) -> Checkpointer:
    return Checkpointer(run, CheckpointConfig(), 0, last_is_intact)


def steps(run: RunDirectory) -> dict[str, int]:
    """The step of each checkpoint of the state that there is."""
    paths = [run.checkpoints / name for name in (LAST, PREVIOUS)]
    return {path.name: checkpoint.load(path, needed=("step",))["step"] for path in paths if path.exists()}


def test_the_checkpoint_before_the_last_is_kept(run: RunDirectory) -> None:
    assert not checkpoint.has_checkpoint(run.checkpoints)
    with checkpointer_of(run) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(state_of(step))
            checkpointer.finish()
            assert steps(run) == ({LAST: step, PREVIOUS: step - 1} if step > 1 else {LAST: 1})
    assert run.metrics.read_text() == '{"epoch": 1}\n' * 3
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [LAST, PREVIOUS]


def test_the_newest_checkpoint_that_is_whole_is_loaded(run: RunDirectory) -> None:
    needed = dict.fromkeys(("classes", "data", "recipe"))
    with checkpointer_of(run) as checkpointer:
        for step in (1, 2):
            checkpointer.save(state_of(step) | needed)
    state, path = checkpoint.load_newest(run.checkpoints)
    assert (state["step"], path) == (2, run.checkpoints / LAST)
    path.write_bytes(path.read_bytes()[:-100])
    state, path = checkpoint.load_newest(run.checkpoints)
    assert (state["step"], path) == (1, run.checkpoints / PREVIOUS)
    path.unlink()
    with pytest.raises(UserError, match=f"{LAST}, which cannot be read"):
        checkpoint.load_newest(run.checkpoints)


def test_a_damaged_last_checkpoint_does_not_drive_out_the_one_before(run: RunDirectory) -> None:
    checkpoint.save(run.checkpoints / PREVIOUS, state_of(1))
    (run.checkpoints / LAST).write_bytes(b"damaged")
    with checkpointer_of(run, last_is_intact=False) as checkpointer:
        checkpointer.save(state_of(2))
        checkpointer.finish()
        assert steps(run) == {LAST: 2, PREVIOUS: 1}
        checkpointer.save(state_of(3))
    assert steps(run) == {LAST: 3, PREVIOUS: 2}


def test_a_kill_between_the_renames_leaves_a_checkpoint(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(run.checkpoints / PREVIOUS, state_of(1) | dict.fromkeys(("classes", "data", "recipe")))
    assert checkpoint.has_checkpoint(run.checkpoints)
    state, path = checkpoint.load_newest(run.checkpoints)
    assert (state["step"], path) == (1, run.checkpoints / PREVIOUS)
    assert caplog.text == "", "nothing is damaged"


def test_a_full_disk_is_survived(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The best model that could not be written is kept in memory, and written with the next checkpoint."""

    def full(path: Path, state: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with checkpointer_of(run) as checkpointer:
        checkpointer.save(state_of(1), model_of(1))
        checkpointer.finish()
        assert load_trained_model(run.path).epoch == 1
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", full)
            checkpointer.save(state_of(2), model_of(2))
            checkpointer.finish()
            assert "checkpoint for epoch 3, step 2 not written" in caplog.text
            assert "No space left on device. Training continues; the previous checkpoint is intact. Free" in caplog.text
            assert steps(run) == {LAST: 1}
            assert checkpointer.best().epoch == 2
            assert load_trained_model(run.path).epoch == 1
            checkpointer.replace_best(replace(model_of(2), temperature=1.5))
            with pytest.raises(DiskFullError, match="no space left on device"):
                checkpointer.ensure_saved()
            assert checkpointer.best().temperature == 1.5
        checkpointer.save(state_of(3))
        checkpointer.finish()
        assert steps(run) == {LAST: 3, PREVIOUS: 1}
        assert load_trained_model(run.path).temperature == 1.5


@pytest.mark.parametrize("action", ["remove", "move"])
def test_a_run_directory_that_goes_away_is_written_again(
    tmp_path: Path, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.begin(Config(data=DataConfig(shards=str(tmp_path))), {"python": "3"}, [])
    files = {path: path.read_text() for path in (run.config, run.environment)}
    with checkpointer_of(run) as checkpointer:
        checkpointer.save(state_of(1), model_of(1))
        checkpointer.finish()
        if action == "remove":
            shutil.rmtree(run.path)
        else:
            run.path.rename(tmp_path / "elsewhere")
        checkpointer.save(state_of(2))
        checkpointer.finish()
        assert "was removed or moved" in caplog.text and "not written" not in caplog.text
        assert steps(run) == {LAST: 2}
        assert load_trained_model(run.path).epoch == 1 == checkpointer.best().epoch
        assert {path: path.read_text() for path in files} == files


def test_another_fault_of_the_disk_is_not_called_a_full_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(path: Path, state: dict[str, Any]) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "save", faulty)
    with checkpointer_of(run) as checkpointer:
        checkpointer.save(state_of(1))
    assert "Input/output error" in caplog.text
    assert "intact" not in caplog.text and "disk space" not in caplog.text


def test_best_is_written_before_last(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "save_last", fails)
    with checkpointer_of(run) as checkpointer:
        checkpointer.save(state_of(1), model_of(4))
    assert steps(run) == {} and load_trained_model(run.path).epoch == 4


def test_another_error_of_the_writer_is_not_hidden(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise TypeError("never")

    monkeypatch.setattr(checkpoint, "save_last", broken)
    checkpointer = checkpointer_of(run)
    checkpointer.save(state_of(1))
    with pytest.raises(TypeError, match="never"):
        checkpointer.__exit__(None, None, None)


def test_a_full_disk_within_torch_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's writer fails again while it closes the archive."""

    def failing(state: dict[str, Any], file: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(tmp_path / LAST, {})
    assert caught.value.errno == errno.ENOSPC

    def other(state: dict[str, Any], file: object) -> None:
        raise RuntimeError("no tensor")

    monkeypatch.setattr(torch, "save", other)
    with pytest.raises(RuntimeError, match="no tensor"):
        checkpoint.save(tmp_path / LAST, {})


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    """`torch.load` alone would return it."""
    path = tmp_path / LAST
    checkpoint.save(path, {"weights": torch.arange(1000.0)})
    with zipfile.ZipFile(path) as archive:
        place = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[place.header_offset + place.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"wrong checksum of .*data/0"):
        checkpoint.load(path, needed=())


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / LAST, {"a": 1, "b": None})
    assert checkpoint.load(tmp_path / LAST, needed=("b", "a")) == {"a": 1, "b": None}
    with pytest.raises(UserError, match="key c is missing"):
        checkpoint.load(tmp_path / LAST, needed=("a", "c", "d"))


@pytest.mark.parametrize("fitted", [False, True], ids=["plain", "calibrated"])
def test_the_best_model_is_read_as_it_was_written(run: RunDirectory, fitted: bool) -> None:
    best = model_of(3)
    if fitted:
        best = replace(best, tau=0.5, temperature=1.25, offsets=np.array([0.5, -1, 0], np.float32))
        best = replace(best, logit_bias=np.array([1, -2, 0], np.float32))
    with checkpointer_of(run) as checkpointer:
        checkpointer.replace_best(best)
        found = checkpointer.best()
    for field in fields(TrainedModel):
        if field.name not in ("weights", "offsets", "logit_bias"):
            assert getattr(found, field.name) == getattr(best, field.name), field.name
    assert found.offsets.dtype == np.float32
    assert found.offsets.tolist() == ([0.5, -1, 0] if fitted else [0, 0, 0])
    assert (None if found.logit_bias is None else found.logit_bias.tolist()) == ([1, -2, 0] if fitted else None)
    assert found.posthoc_kwargs()["temperature"] == (1.25 if fitted else 1)
    assert found.channels == 1
    images = torch.rand(2, 1, 16, 16)
    built = found.build_model(torch.device("cpu")).eval()
    with torch.no_grad():
        expected = load_model(best.weights, best.config, 1, 3, torch.device("cpu")).eval()(images)
        assert torch.equal(built(images), expected) and expected.shape == (2, 3)


def test_a_model_is_built_without_its_initial_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be gone, and `pretrained` would download some."""
    best, asked = model_of(3), []

    def made(settings: ModelConfig, channels: int, classes: int, **options: Any) -> torch.nn.Module:
        asked.append((settings.pretrained, settings.init_checkpoint))
        return make_model(settings, channels, classes, **options)

    monkeypatch.setattr(trained_model, "make_model", made)
    settings = best.config.model.model_copy(update={"pretrained": True, "init_checkpoint": tmp_path / "gone.pt"})
    load_model(best.weights, best.config.model_copy(update={"model": settings}), 1, 3, torch.device("cpu"))
    assert asked == [(False, None)]


def test_data_of_other_classes_are_refused() -> None:
    best = model_of(1)
    best.check_classes(Manifest.model_construct(classes=CLASSES), "data")
    for other in (("a", "c", "b"), ("a", "a", "c"), ("a", "b"), ("a", "b", "c", "d")):
        with pytest.raises(UserError, match=f"digits with classes {' '.join(other)}\n"):
            best.check_classes(Manifest.model_construct(classes=other), "digits")


def test_a_state_on_a_gpu_is_copied_with_one_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu() as gpu:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        state = {"model": {str(size): torch.zeros(size, device=GPU) for size in range(9)}, "steps": [torch.ones(2), 3]}
        copied = _copy(state)
    assert gpu.waits == ["Stream.synchronize waits for the GPU"]
    assert all(tensor.is_cpu for tensor in copied["model"].values())
    assert copied["steps"][1] == 3
