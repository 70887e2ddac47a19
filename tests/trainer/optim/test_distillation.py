"""A run that teaches another: what it says of a student's images, how that enters the loss, and who may teach whom."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import free_port, run_module
from support.run_outcome import weights
from support.training_runs import train_here

from pipeline.loader import Batch
from shards import UserError, open_split
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel, load_trained_model
from trainer.config.load import load
from trainer.config.schema import LossConfig
from trainer.data.training_data import open_data
from trainer.evaluate.logit_adjustment import training_logit_bias
from trainer.export.ensemble import make_ensemble
from trainer.loop import engine, nan_guard
from trainer.loop.replay_step import replay_step
from trainer.loop.state import Training, make_training
from trainer.optim.distillation import DistillationTeacher
from trainer.optim.losses import class_weights, log_priors, weighted_kl
from trainer.runtime.distributed import World

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
NONE = np.zeros(10, np.float32)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, digits_set: Path) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "few.yaml"
    content = {
        "data": {"shards": str(digits_set), "resolution": 12, "val_fraction": 0.1, "train_fraction": 0.5},
        "loader": {"batch_size": 64},
        "model": {"name": "three_block_cnn"},
        "loss": {"class_weights": "inverse", "logit_adjustment": 0.5},
        "posthoc": {"tau": 1.0},
        "mixup": {"prob": 1.0, "off_last_epochs": 1},
        "optim": {"lr": 2e-3},
        "trainer": {"epochs": 2, "precision": "fp32"},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def teacher(recipe: Path) -> Path:
    """A run directory; it learned digits at 12x12."""
    directory = recipe.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert train_here(patch, recipe, directory, "mixup.prob=0") == 0
    return directory


def student_of(recipe: Path, teacher: Path, *overrides: str) -> Training:
    config = load(recipe, [f"distillation.teacher={teacher}", *overrides])
    return make_training(config, open_data(config, ALONE), ALONE)


def first_batch(training: Training, epoch: int = 0) -> Batch:
    return next(iter(training.data.train.batches(epoch)))


def test_it_sees_the_images_as_it_was_trained_on_them(recipe: Path, teacher: Path) -> None:
    trained = load_trained_model(teacher)
    pixels = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    student = load(recipe, [f"distillation.teacher={teacher}", "distillation.temperature=3"])
    mean, std = (0.7,), (0.2,)
    one = DistillationTeacher(student, trained.classes, {(side, side): (mean, std) for side in (12, 30)}, NONE, CPU)
    found = one.probabilities((pixels - mean[0]) / std[0])
    model = trained.build_model(CPU).eval()
    assert trained.logit_bias is not None and trained.offsets.tolist() == trained.logit_bias.tolist(), "tau is 1"
    with torch.no_grad():
        logits = model((pixels - trained.mean[0]) / trained.std[0]) - torch.from_numpy(trained.logit_bias)
    torch.testing.assert_close(found, (logits / 3).softmax(dim=1), rtol=1e-4, atol=1e-5)
    constant = one.probabilities(torch.full((1, 1, 30, 30), 0.4))
    torch.testing.assert_close(constant, one.probabilities(torch.full((1, 1, 12, 12), 0.4)))
    assert not constant.requires_grad


def test_it_sees_the_same_images_at_each_resolution_of_the_student(recipe: Path, teacher: Path) -> None:
    """Mean and std of the student's input differ between the resolutions."""
    training = student_of(recipe, teacher, "data.resolution=[[1, 4], [2, 12]]")
    saved = load_trained_model(teacher)
    assert training.teacher is not None
    for epoch, side in enumerate((4, 12)):
        own = training.logit_bias
        spec = open_data(load(recipe, [f"data.resolution={side}"]), ALONE).spec
        assert training.data.statistics[side, side] == (spec.mean, spec.std)
        alone = DistillationTeacher(training.config, saved.classes, {(side, side): (spec.mean, spec.std)}, own, CPU)
        images = first_batch(training, epoch).images
        assert torch.equal(training.teacher.probabilities(images), alone.probabilities(images))
    assert len({*training.data.statistics.values()}) == 2


def test_the_loss_is_a_share_of_both(recipe: Path, teacher: Path) -> None:
    training = student_of(recipe, teacher, "distillation.weight=0.3", "distillation.temperature=4")
    images = first_batch(training).images
    logits = torch.randn(len(images), 10, generator=torch.Generator().manual_seed(1))
    assert training.teacher is not None
    taught = training.teacher.probabilities(images)
    expected = 0.7 * 5 + 0.3 * 16 * float(weighted_kl(logits / 4, taught, torch.ones(10)))
    assert float(training.teacher.distillation_loss(torch.tensor(5.0), logits, images)) == pytest.approx(expected)
    same = training.teacher.distillation_loss(torch.tensor(0.0), 4 * taught.log(), images)
    assert float(same) == pytest.approx(0, abs=1e-3), "nothing to learn for who says the same"


POSTERIOR = torch.tensor([[0.62, 0.35, 0.03]])
COUNTS = np.array([400, 100, 20])
STATISTICS = {(12, 12): ((0.5,), (0.5,))}
NONE_OF_THREE = np.zeros(3, np.float32)


def teaching(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_teacher: LossConfig,
    of_student: LossConfig,
    *overrides: str,
    **fields: Any,
) -> DistillationTeacher:
    """A teacher that has learned `POSTERIOR` perfectly with its loss."""
    student = load(recipe, ["distillation.teacher=best.pt", *overrides]).model_copy(update={"loss": of_student})
    learned = training_logit_bias(COUNTS, of_teacher)
    trained = TrainedModel(
        weights={},
        config=student.model_copy(update={"loss": of_teacher}),
        classes=("a", "b", "c"),
        data_identity="",
        image_shape=(12, 12, 1),
        mean=(0.5,),
        std=(0.5,),
        adapter_state={},
        epoch=1,
        **{"tau": 0.0, "offsets": NONE_OF_THREE, "logit_bias": learned, **fields},
    )

    class Learned(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return POSTERIOR.log() + torch.from_numpy(learned)

    built = TrainedModel.build_model
    monkeypatch.setattr(TrainedModel, "load", lambda path: trained)
    monkeypatch.setattr(TrainedModel, "build_model", lambda self, _: built(self, CPU) if self.members else Learned())
    return DistillationTeacher(student, trained.classes, STATISTICS, training_logit_bias(COUNTS, of_student), CPU)


def optimum(teacher: DistillationTeacher, loss: LossConfig) -> tuple[torch.Tensor, float]:
    """The softmax of the logits at the minimum of the training loss on `POSTERIOR`, and that loss."""
    logits = torch.zeros(1, 3, requires_grad=True)
    shift, weights = loss.logit_adjustment * log_priors(COUNTS), class_weights(COUNTS, loss)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def value() -> torch.Tensor:
        optimizer.zero_grad()
        images = torch.zeros(1, 1, 12, 12)
        result = engine.compute_loss(logits, POSTERIOR, images, shift, weights, teacher, loss)
        result.backward()
        return result

    for _ in range(4):
        optimizer.step(value)
    return logits.detach().softmax(dim=1), float(value().detach())


LOSSES = [
    LossConfig(),
    LossConfig(class_weights="inverse"),
    LossConfig(class_weights="minmax", logit_adjustment=0.5),
    LossConfig(logit_adjustment=1),
]


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize("weight", [0.5, 1])
@pytest.mark.parametrize("of_teacher", LOSSES)
@pytest.mark.parametrize("of_student", LOSSES)
def test_the_optimum_is_that_of_the_loss_on_the_labels(
    recipe: Path,
    of_teacher: LossConfig,
    of_student: LossConfig,
    weight: float,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = f"distillation.weight={weight}", f"distillation.temperature={temperature}"
    found, loss = optimum(teaching(recipe, monkeypatch, of_teacher, of_student, *settings), of_student)
    expected = (POSTERIOR.log() + torch.from_numpy(training_logit_bias(COUNTS, of_student))).softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    if weight == 1:
        assert loss == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_the_class_weights_of_a_teacher_of_an_earlier_version_are_derived(
    recipe: Path, loss: LossConfig, tau: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From its tau or, if its settings are those of the student, from the student."""
    offsets = np.float32(tau) * training_logit_bias(COUNTS, loss)
    teacher = teaching(recipe, monkeypatch, loss, loss, tau=tau, offsets=offsets, logit_bias=None)
    expected = (POSTERIOR.log() + torch.from_numpy(training_logit_bias(COUNTS, loss))).softmax(dim=1)
    torch.testing.assert_close(optimum(teacher, loss)[0], expected, rtol=0, atol=2e-3)
    assert not caplog.records
    teaching(recipe, monkeypatch, loss, LossConfig(), tau=tau, offsets=offsets, logit_bias=None)
    assert ("its best.pt does not state them" in caplog.text) == (tau == 0)


def test_the_class_weights_of_the_networks_of_an_ensemble_are_removed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = LOSSES[1]
    teaching(recipe, monkeypatch, loss, LossConfig())
    ensemble = make_ensemble([TrainedModel.load(Path("best.pt"))] * 2)
    monkeypatch.setattr(TrainedModel, "load", lambda path: ensemble)
    student = load(recipe, ["distillation.teacher=best.pt", "distillation.temperature=1", "loss.class_weights=none"])
    teacher = DistillationTeacher(student, ensemble.classes, STATISTICS, NONE_OF_THREE, CPU)
    torch.testing.assert_close(teacher.probabilities(torch.zeros(1, 1, 12, 12)), POSTERIOR)


@pytest.mark.parametrize("temperature", [1, 2, 4])
def test_a_teacher_without_class_weights_keeps_its_offsets(
    recipe: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit."""
    offsets = np.array([0.3, -0.1, 0.7], np.float32)
    settings = f"distillation.temperature={temperature}"
    teacher = teaching(recipe, monkeypatch, LossConfig(), LossConfig(), settings, tau=1.0, offsets=offsets)
    expected = ((POSTERIOR.log() - torch.from_numpy(offsets)) / temperature).softmax(dim=1)
    assert torch.equal(teacher.probabilities(torch.zeros(1, 1, 12, 12)), expected)


def test_it_alone_is_learned_from_on_the_mixed_images(
    recipe: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of the weight, labels do not matter; the images are those that the student sees."""
    losses = []
    for turned in (0, 3):
        training = student_of(recipe, teacher, "distillation.weight=1", "seed=5")
        seen: list[torch.Tensor] = []
        assert training.teacher is not None
        look = training.teacher.probabilities
        monkeypatch.setattr(
            training.teacher, "probabilities", lambda images, seen=seen, look=look: seen.append(images) or look(images)
        )
        forward = training.forward
        given: list[torch.Tensor] = []
        forward.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
        batch = first_batch(training)
        raw = batch.images.clone()
        batch = replace(batch, labels=(batch.labels + turned) % 10)
        losses.append(float(engine.train_step(training, batch, 1, True)))
        assert torch.equal(seen[0], given[0]) and not torch.equal(seen[0], raw)
        training.state.epoch = 1  # the last one, in which nothing is mixed
        batch = first_batch(training, 1)
        raw = batch.images.clone()
        engine.train_step(training, batch, 1, True)
        assert torch.equal(seen[1], raw)
    assert losses[0] == losses[1]


def test_a_student_learns_what_its_teacher_says(
    recipe: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"distillation.teacher={teacher}", "distillation.weight=1", "mixup.prob=0", "seed=1"]
    overrides += ["trainer.epochs=6", "data.train_fraction=0.5", "loss.class_weights=none", "posthoc.tau=0"]
    assert train_here(monkeypatch, recipe, tmp_path / "run", *overrides) == 0
    said, by_teacher = (np.load(run / "predictions.npz")["predicted"] for run in (tmp_path / "run", teacher))
    assert (said == by_teacher).mean() > 0.6


def test_two_ranks_are_taught_and_decide_as_one(
    recipe: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model whose arithmetic does not depend on how a batch is shared out, but for rounding."""
    overrides = [f"distillation.teacher={teacher}", "model.name=lenet", "data.resolution=28", "posthoc.tau=auto"]
    overrides += ["mixup.prob=0", "trainer.monitor=macro_f1", "trainer.epochs=1"]
    assert train_here(monkeypatch, recipe, tmp_path / "one", *overrides) == 0
    launcher = ("torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m", "trainer.run")
    process = run_module(*launcher, recipe, f"run.dir={tmp_path / 'two'}", *overrides)
    assert process.returncode == 0, process.stderr
    one, two = (weights(tmp_path / name, "best.pt") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert two["decision"] == one["decision"] and one["decision"]["tau"] != 0
    assert two["accuracy"] == one["accuracy"]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_step_with_a_teacher_can_be_taken_again(recipe: Path, teacher: Path, tmp_path: Path, epoch: int) -> None:
    training = student_of(recipe, teacher, "data.resolution=[[1, 4], [2, 12]]")
    training.state.epoch = epoch
    batch = first_batch(training, epoch)
    share = {"images": batch.images.clone(), "labels": batch.labels, "rows": batch.source_index}
    nan_guard._save(training, RunDirectory(tmp_path), nan_guard.NonFiniteStep(batch.step, "loss"), [share])
    loss = float(engine.train_step(training, batch, 1, True))
    again, found = replay_step(checkpoint.load(tmp_path / "nonfinite" / f"epoch-{epoch + 1}-step-1.pt"), 0, CPU)
    assert again == pytest.approx(loss, rel=1e-6) and found == []


def test_who_may_not_teach(recipe: Path, teacher: Path, synthetic_set: Path, tmp_path: Path) -> None:
    student = load(recipe, [f"distillation.teacher={teacher}"])
    names = open_split(synthetic_set, "train").manifest.classes
    with pytest.raises(UserError, match=r"distillation\.teacher=.* with classes 0 1 2"):
        DistillationTeacher(student, names, {(12, 12): ((0.0,), (1.0,))}, NONE, CPU)
    with pytest.raises(UserError, match="with channels 1"):
        DistillationTeacher(student, tuple("0123456789"), {(12, 12): ((0.0,) * 3, (1.0,) * 3)}, NONE, CPU)
    with pytest.raises(UserError, match=r"best\.pt"):
        student_of(recipe, tmp_path)
