"""Ensembles and soups: the means that they are said to be, in every command that takes a run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from conftest import pack_splits, synthetic_splits
from numpy.typing import NDArray
from support.training_runs import train_here

import trainer.evaluate.__main__ as evaluate_command
import trainer.report.__main__ as report_command
from pipeline.transforms.spec import TransformSpec
from shards import UserError, open_split
from trainer.checkpoint.trained_model import TrainedModel, load_trained_model
from trainer.config.load import load
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.export import ensemble
from trainer.export.export import export
from trainer.export.module import InferenceModule
from trainer.optim.distillation import DistillationTeacher
from trainer.predict.predictor import Predictor, upright_images

CPU = torch.device("cpu")
SETTINGS = {
    "data": {"resolution": 12, "val_fraction": 0.2},
    "loader": {"batch_size": 16},
    "model": {"name": "three_block_cnn"},
    "loss": {"class_weights": "inverse"},
    "posthoc": {"tau": 0.5},
    "trainer": {"epochs": 1, "precision": "fp32"},
}


@pytest.fixture(scope="module")
def runs(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs with the same initial weights and different learning rates."""
    directory = tmp_path_factory.mktemp("members")
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SETTINGS | {"data": SETTINGS["data"] | {"shards": str(small_set)}}))
    paths = [directory / name for name in ("slow", "medium", "fast")]
    with pytest.MonkeyPatch.context() as patch:
        for path, rate in zip(paths, ("1e-4", "1e-3", "3e-3"), strict=True):
            assert train_here(patch, recipe, path, f"optim.lr={rate}") == 0
    return paths


def command(module: ModuleType, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        assert module.main() == 0


@pytest.fixture(scope="module")
def combined(runs: list[Path]) -> Path:
    out = runs[0].parent / "ensemble"
    command(ensemble, *runs, "--out", out)
    return out


def softmax(logits: NDArray) -> NDArray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def mean_probability(models: list[TrainedModel], inputs: torch.Tensor) -> NDArray:
    """Network by network, with its own offsets and temperature, in float64."""
    each = []
    for model in models:
        with torch.inference_mode():
            logits = model.build_model(CPU).eval()(inputs).double().numpy()
        each.append(softmax((logits - model.offsets.astype(np.float64)) / model.temperature))
    return np.mean(each, axis=0)


def test_an_ensemble_predicts_the_mean_probability(runs: list[Path], combined: Path, small_set: Path) -> None:
    models = [load_trained_model(run) for run in runs]
    assert len({model.temperature for model in models}) > 1 and all(model.offsets.any() for model in models)
    inputs = torch.randn(9, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    expected = mean_probability(models, inputs)
    trained = load_trained_model(combined)
    with torch.inference_mode():
        actual = softmax(trained.build_model(CPU).eval()(inputs).numpy())
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert not trained.offsets.any() and trained.temperature == 1
    nested = ensemble.make_ensemble([trained, models[0]])
    assert len(nested.members) == 4
    # As a teacher, without the class weights of its networks.
    student = load(runs[0].parent / "recipe.yaml", [f"distillation.teacher={combined}", "distillation.temperature=1"])
    none = np.zeros(len(trained.classes), np.float32)
    teacher = DistillationTeacher(student, trained.classes, {(12, 12): (trained.mean, trained.std)}, none, CPU)
    unweighted = mean_probability([replace(model, offsets=model.logit_bias) for model in models], inputs)
    np.testing.assert_allclose(teacher.probabilities(inputs).numpy(), unweighted, atol=1e-6)


def test_every_command_takes_an_ensemble_for_a_run(
    runs: list[Path], combined: Path, small_set: Path, tmp_path: Path
) -> None:
    test = open_split(small_set, "test")
    samples = np.arange(len(test))
    each = [Predictor(run).predict(upright_images(test, samples[:16])).probabilities for run in runs]
    together = Predictor(combined).predict(upright_images(test, samples[:16])).probabilities
    np.testing.assert_allclose(together, np.mean(each, axis=0), atol=1e-6)

    summary = json.loads((combined / "summary.json").read_text())
    command(evaluate_command, combined, small_set, "--json", tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: metrics[name] for name in ("accuracy", "macro_f1", "loss")} == {
        name: summary[name] for name in ("accuracy", "macro_f1", "loss")
    }
    assert summary["parameters"] == 3 * json.loads((runs[0] / "summary.json").read_text())["parameters"]
    command(report_command, combined)
    assert "Confusion matrix" in (combined / "report.html").read_text()

    # What export writes, as one module from raw images to probabilities.
    trained = load_trained_model(combined)
    spec = TransformSpec.of(test.manifest, 12).with_normalization(trained.mean, trained.std)
    head = ProbabilityHead(**trained.posthoc_kwargs())
    with torch.inference_mode():
        module = InferenceModule(spec, trained.build_model(CPU), "none", head).eval()
        probabilities, _ = module(torch.from_numpy(np.asarray(test.read(samples[:16]))))
    np.testing.assert_allclose(probabilities.numpy(), together, atol=1e-5)
    with pytest.raises(UserError) as caught:
        export(combined, "safetensors", tmp_path / "weights")
    assert caught.value.hint == "--format onnx"


@pytest.mark.slow
def test_a_file_holds_the_whole_ensemble(combined: Path, small_set: Path, tmp_path: Path) -> None:
    _, agreement = export(combined, "torch-export", tmp_path / "program")  # compared with the trainer
    assert agreement.same == agreement.samples
    card = (tmp_path / "program" / "README.md").read_text()
    assert "an ensemble of 3 runs of `three_block_cnn`" in card and "| checkpoint | of 3 runs, sha256" in card
    assert "the mean of those of the runs `slow`, `medium`, `fast`, each with" in card
    assert "There was no validation split" not in card
    file, _ = export(combined, "onnx", tmp_path / "onnx")
    test = open_split(small_set, "test")
    samples = np.arange(16)
    probabilities, _ = onnxruntime.InferenceSession(file).run(None, {"images": np.asarray(test.read(samples))})
    expected = Predictor(combined).predict(upright_images(test, samples)).probabilities
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "greedy"])
def test_a_soup_is_a_network_of_mean_weights(
    runs: list[Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "soup"
    command(ensemble, *runs, "--out", out, "--soup", kind)
    output = capsys.readouterr().out
    chosen = [run for run in runs if kind == "uniform" or str(run) in output.splitlines()[0]]
    models, soup = [load_trained_model(run) for run in chosen], load_trained_model(out)
    assert soup.members == () and len(models) >= 1
    for name, tensor in soup.weights.items():
        tensors = [model.weights[name].numpy() for model in models]
        if tensor.is_floating_point():
            np.testing.assert_allclose(tensor.numpy(), np.mean(tensors, axis=0), rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(tensor.numpy(), tensors[0])
    np.testing.assert_allclose(soup.offsets, np.mean([model.offsets for model in models], axis=0), rtol=1e-6)
    if kind == "uniform":
        export(out, "safetensors", tmp_path / "weights")
        card = (tmp_path / "weights" / "README.md").read_text()
        assert "a soup of 3 runs of `three_block_cnn`" in card and "| checkpoint | of 3 runs, sha256" in card
        assert "temperature are the means of those of the runs `slow`, `medium`, `fast`." in card
    members = json.loads((out / "summary.json").read_text())["members"]
    assert members == list(map(str, chosen))


def test_a_greedy_soup_adds_what_does_not_harm(runs: list[Path]) -> None:
    """The metric of weight w is -(w - 2)^2: 1.5 is best, 3 improves the mean to 2.25, 0 and 10 would worsen it."""
    model = load_trained_model(runs[0])
    models = [replace(model, weights={"w": torch.tensor([value])}) for value in (3.0, 0.0, 10.0, 1.5)]
    chosen = ensemble.choose_greedily(models, lambda each: -((float(each.weights["w"]) - 2) ** 2))
    assert [float(each.weights["w"]) for each in chosen] == [1.5, 3.0]


def test_runs_with_a_val_split_may_have_other_seeds_in_a_greedy_soup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The validation images do not depend on the seed then."""
    train, test = synthetic_splits(train=144, test=30, classes=3, shape=(12, 12, 1), transposed=False)
    shards = pack_splits((train.select(np.arange(24, 144)), test, train.select(np.arange(24), "val")), tmp_path / "set")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SETTINGS | {"data": SETTINGS["data"] | {"shards": str(shards)}}))
    paths = [tmp_path / "one", tmp_path / "two"]
    with pytest.MonkeyPatch.context() as patch:
        for seed, path in enumerate(paths):
            assert train_here(patch, recipe, path, f"seed={seed}") == 0
    command(ensemble, *paths, "--out", tmp_path / "soup", "--soup", "greedy")
    assert "of 2 runs" in capsys.readouterr().out


def test_runs_that_do_not_fit_together_are_refused(runs: list[Path], combined: Path, tmp_path: Path) -> None:
    recipe = runs[0].parent / "recipe.yaml"
    with pytest.MonkeyPatch.context() as patch:
        assert train_here(patch, recipe, tmp_path / "larger", "data.resolution=16") == 0
        assert train_here(patch, recipe, tmp_path / "seed", "seed=1", "model.drop_rate=0.1") == 0
        assert train_here(patch, recipe, tmp_path / "fold", "data.fold=1/2") == 0
        # Weights of the same shapes in other networks.
        for name, act in (("relu", "relu"), ("silu", "silu")):
            options = f"model.options={{act_layer: {act}}}"
            assert train_here(patch, recipe, tmp_path / name, "model.name=test_efficientnet", options) == 0

    def refusal(*arguments: object) -> UserError:
        with pytest.raises(UserError) as caught:
            command(ensemble, *arguments, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return caught.value

    larger = refusal(runs[0], tmp_path / "larger")
    assert "which differ in data.resolution (16 and " in larger.found and larger.hint == "name runs that agree in it"
    assert "seed with seed=1" in refusal(runs[0], tmp_path / "seed", "--soup", "greedy").found
    assert "fold with data.fold=1/2" in refusal(tmp_path / "fold", tmp_path / "fold", "--soup", "greedy").found
    other = refusal(tmp_path / "relu", tmp_path / "silu", "--soup", "uniform")
    assert "which differ in model.options" in other.found and other.hint == "omit --soup"
    assert "ensemble of 3 networks" in refusal(runs[0], combined, "--soup", "uniform").found
    assert "ensemble of 3 networks" in refusal(combined, combined, "--soup", "greedy").found
    assert refusal(runs[0]).expected == "two or more runs"
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError) as caught:
        command(ensemble, *runs, "--out", tmp_path / "taken")
    assert "which exists" in caught.value.found
    with pytest.MonkeyPatch.context() as patch:
        measure = ensemble.evaluate
        patch.setattr(
            ensemble, "evaluate", lambda *args, **named: (tmp_path / "late").mkdir() or measure(*args, **named)
        )
        with pytest.raises(UserError, match="late, which exists"):
            command(ensemble, *runs, "--out", tmp_path / "late")
