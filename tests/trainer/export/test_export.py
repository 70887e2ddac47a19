"""A model in use elsewhere: what is exported answers as the trainer does, loads without us, and says what it is."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from support import warm_process
from torch import nn

from pipeline.transforms.export_module import TransformModule
from pipeline.transforms.preprocess import Preprocessing
from pipeline.transforms.spec import TransformSpec
from pipeline.transforms.torch_backend import TorchTransform
from shards import UserError, open_split
from trainer.checkpoint.completed_run import CompletedRun
from trainer.checkpoint.trained_model import load_trained_model
from trainer.config.schema import ModelConfig
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.evaluate.tta import VIEWS
from trainer.export import formats as export_formats
from trainer.export.export import export
from trainer.export.export import main as export_main
from trainer.export.module import InferenceModule, _AdaptiveMaxPool
from trainer.models.factory import make_model
from trainer.report.compare_page import render_page
from trainer.run import main as run_main
from trainer.runtime.seeding import seed_weights


def trained(directory: Path, shards: Path, **sections: str) -> Path:
    """A run of one epoch."""
    recipe = directory / "recipe.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(
        f"data: {{shards: '{shards}', {sections.get('data', 'resolution: 34')}}}\n"
        f"model: {{{sections.get('model', 'name: three_block_cnn')}}}\nloader: {{batch_size: 64, backend: torch}}\n"
        f"trainer: {{epochs: 1, precision: fp32, {sections.get('trainer', '')}}}\n"
        f"loss: {{{sections.get('loss', '')}}}\nposthoc: {{{sections.get('posthoc', '')}}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={directory / 'run'}"])
        assert run_main() == 0
    return directory / "run"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, synthetic_set: Path) -> Path:
    """Transposed images of 28x28, and the small network, whose pooling ONNX does not know."""
    return trained(tmp_path_factory.mktemp("export"), synthetic_set)


@pytest.fixture(scope="module")
def timm_run(tmp_path_factory: pytest.TempPathFactory, synthetic_set: Path) -> Path:
    """Prepared transposed images, a timm model with a head of its own, means over five views, class weights undone."""
    sections = {
        "data": "resolution: 20, interpolation: cubic, equalize: true, opening_radius: 1",
        "model": "name: test_efficientnet, head_hidden: 9",
        "trainer": "test_time_augmentation: shifts",
        "loss": "class_weights: inverse",
        "posthoc": "tau: 1.0",
    }
    return trained(tmp_path_factory.mktemp("export"), synthetic_set, **sections)


def code_of(card: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL))


def run_code(code: str, place: Path, without_us: bool = True) -> str:
    """Run Python in a directory, and see whether it does without our packages."""
    after = "\nimport sys\nassert not {'trainer', 'pipeline', 'shards'} & set(sys.modules)\n" if without_us else ""
    run = subprocess.run if without_us else warm_process.run
    process = run(
        [sys.executable, "-c", code + after],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def recorded(run: Path, rows: np.ndarray) -> np.ndarray:
    """The run's own test: confidence float32 [n] of the predicted class, at the temperature."""
    predictions = np.load(run / "predictions.npz")
    order = np.argsort(predictions["rows"])
    return predictions["confidence"][order[np.searchsorted(predictions["rows"][order], rows)]]


@pytest.mark.parametrize("which", ["small_run", pytest.param("timm_run", marks=pytest.mark.slow)])
def test_an_onnx_graph_answers_raw_images_as_the_run_did(which: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(which)
    target, agreement = export(run, "onnx")
    assert target == run / "export" / "onnx" / "model.onnx"
    assert agreement.same == agreement.samples and agreement.difference < 1e-5
    import onnxruntime

    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    config = load_trained_model(run).config
    store = open_split(config.data.shards, "test")
    images = store.read(np.arange(37))
    probabilities, logits = session.run(None, {"images": images})
    np.testing.assert_allclose(probabilities.max(axis=1), recorded(run, store.rows[:37]), atol=2e-5)
    assert logits.shape == probabilities.shape == (37, len(store.manifest.classes))
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == list(store.manifest.classes)
    assert json.loads(known["transposed"]) == store.manifest.transposed
    best = (run / "checkpoints" / "best.pt").read_bytes()
    assert known["checkpoint_sha256"] == hashlib.sha256(best).hexdigest()
    assert session.get_inputs()[0].shape == ["N", *store.manifest.image_shape]


@pytest.mark.parametrize("which", ["small_run", pytest.param("timm_run", marks=pytest.mark.slow)])
def test_the_cards_code_runs_as_written(which: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(which)
    config = load_trained_model(run).config
    store = open_split(config.data.shards, "test")
    images = store.read(np.arange(5))
    np.save(run / "images.npy", images)
    head = f"import os\nimport numpy as np\nraw = {str(run / 'images.npy')!r}\n"
    plain = not config.data.preprocessing().steps
    zeros = "model(__import__('torch').zeros(1, 1, 20, 20)).detach()"
    for form, ask in (
        ("torch-export", "model(torch.from_numpy(np.load(raw)))[0].detach().numpy()"),
        (
            "safetensors",
            "probabilities(np.load(raw))" if plain else zeros,
        ),
    ):
        target, _ = export(run, form)
        card = target.with_name("README.md")
        out = run / f"{form}.npy"
        code = f"{head}os.chdir({str(target.parent)!r})\n{code_of(card)}\nnp.save({str(out)!r}, {ask})"
        run_code(code, run, without_us=form == "torch-export")
        assert hashlib.sha256(target.read_bytes()).hexdigest() in card.read_text()
        views = config.trainer.test_time_augmentation
        is_stated = form == "torch-export" and views != "none"
        assert (f"{VIEWS[views]} views of each image" in card.read_text()) == is_stated
    np.testing.assert_allclose(np.load(run / "torch-export.npy").max(axis=1), recorded(run, store.rows[:5]), atol=2e-5)
    if plain:
        np.testing.assert_allclose(
            np.load(run / "safetensors.npy").max(axis=1), recorded(run, store.rows[:5]), atol=1e-4
        )


def test_the_documented_lines_load_a_timm_model(
    tmp_path: Path, synthetic_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, synthetic_set, model="name: test_efficientnet", data="resolution: 16")
    trained_model = load_trained_model(run)
    target, _ = export(run, "safetensors", tmp_path / "model")
    text = (ROOT / "docs" / "inference.md").read_text()
    lines = re.search(r"    import timm\n(?:    .*\n|\n)*?    model.eval\(\)\n", text)
    assert lines is not None
    code = re.sub("^    ", "", lines[0], flags=re.MULTILINE)
    # The snippet is for a run on photos; all else is as written there.
    for written, here in (('"efficientnet_b0"', '"test_efficientnet"'), ("in_chans=3", "in_chans=1")):
        assert written in code
        code = code.replace(written, here)
    assert code.replace("model/", "") in code_of(target.with_name("README.md"))
    monkeypatch.chdir(tmp_path)
    loaded: dict[str, nn.Module] = {}
    exec(code, loaded)
    ours = trained_model.build_model(torch.device("cpu")).state_dict()
    assert all(torch.equal(each, ours[name]) for name, each in loaded["model"].state_dict().items())


def test_the_card_says_what_is_known(small_run: Path) -> None:
    target, _ = export(small_run, "safetensors")
    card = target.with_name("README.md").read_text()
    summary = json.loads((small_run / "summary.json").read_text())
    store = open_split(load_trained_model(small_run).config.data.shards, "test")
    for words in (f"{100 * summary['accuracy']:.2f}%", store.manifest.digest(), store.manifest.raw[0].sha256):
        assert words in card
    assert "records no license" in card
    front_matter = ModelCard(card).data
    results = {result.metric_name: result.metric_value for result in front_matter.eval_results}
    assert results == {name.replace("_f1", " F1"): summary[name] for name in ("accuracy", "macro_f1", "weighted_f1")}
    assert front_matter["pipeline_tag"] == "image-classification"
    assert front_matter["library_name"] is None
    assert "{{" not in card and "{%" not in card
    from safetensors import safe_open

    with safe_open(target, "np") as file:
        assert json.loads(file.metadata()["classes"]) == list(store.manifest.classes)


def test_card_and_reports_of_a_fold_do_not_name_the_test_split(synthetic_set: Path, tmp_path: Path) -> None:
    run, other = (
        trained(tmp_path / str(fold), synthetic_set, data=f"resolution: 28, fold: {fold}/2") for fold in (1, 2)
    )
    report = (run / "report.html").read_text()
    assert report.count("old 1/2 of the train split") >= 4 and "est split" not in report
    compared = render_page([CompletedRun.open(run), CompletedRun.open(other)])
    assert "tested on different images" in compared and "data sets differ" not in compared
    target, _ = export(run, "safetensors")
    card = target.with_name("README.md").read_text()
    assert "fold 1/2 of the train split" in card and "test split" not in card and "test images" not in card
    assert re.findall(r"^\| (\w+) \| [\d,]+ \| `\w{64}` \|$", card, flags=re.MULTILINE) == ["train"]
    assert {result.dataset_split for result in ModelCard(card).data.eval_results} == {"train"}


def test_a_graph_that_says_something_else_is_not_left(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upright = TransformModule.forward

    def forgets_the_orientation(self: TransformModule, images: torch.Tensor) -> torch.Tensor:
        return upright(self, images.transpose(1, 2))

    monkeypatch.setattr(TransformModule, "forward", forgets_the_orientation)
    out = small_run / "wrong"
    with pytest.raises(UserError, match="differ from the trainer's"):
        export(small_run, "torch-export", out)
    assert not out.exists()


def test_a_missing_package_is_named(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        export_formats.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else known(name)
    )
    with pytest.raises(UserError, match="onnxscript") as caught:
        export(small_run, "onnx", small_run / "elsewhere")
    assert caught.value.hint == 'pip install -e ".[onnx]"'
    assert not (small_run / "elsewhere").exists()


def test_places_where_something_would_be_lost_are_refused(small_run: Path, digits_set: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="not the card"):
        export(small_run, "safetensors", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(UserError, match=r"a file that ends in \.onnx"):
        export(small_run, "onnx", tmp_path / "model.pt")
    for suffix in (".pt2", ".safetensors"):
        with pytest.raises(UserError, match=r"a file that ends in \.onnx") as caught:
            export(small_run, "onnx", tmp_path / f"new{suffix}")
        assert caught.value.hint == f"--out {tmp_path / 'new.onnx'}"
    with pytest.raises(UserError, match="another packed data set"):
        export(small_run, "onnx", shards=str(digits_set))
    with pytest.raises(UserError, match=r"best\.pt"):
        export(digits_set, "onnx")
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    best = (small_run / "checkpoints" / "best.pt").read_bytes()
    (unfinished / "checkpoints" / "best.pt").write_bytes(best)
    with pytest.raises(UserError, match="not complete"):
        export(unfinished, "onnx")


def test_the_command_says_what_it_found(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = str(tmp_path / "a.safetensors")
    monkeypatch.setattr(sys, "argv", ["trainer.export", str(small_run), "--format", "safetensors", "--out", out])
    assert export_main() == 0
    assert "the same class for 90 of 90" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "a.safetensors"]


@pytest.mark.parametrize("shape", [(28, 28, 1), (7, 12, 3)])
@pytest.mark.parametrize("resolution", [28, 10, 40])
@pytest.mark.parametrize("interpolation", ["linear", "cubic", "nearest"])
def test_the_module_computes_what_the_graph_computes(
    shape: tuple[int, int, int], resolution: int, interpolation: str
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    for transposed in (False, True):
        spec = TransformSpec(shape, transposed, resolution, interpolation, (0.3,) * shape[2], (0.2,) * shape[2])
        expected = TorchTransform(spec, torch.device("cpu"))(images)
        torch.testing.assert_close(TransformModule(spec)(torch.from_numpy(images)), expected, atol=1e-6, rtol=1e-5)


NETWORKS = [
    (ModelConfig(name="three_block_cnn", head_hidden=5), 9),
    (ModelConfig(name="lenet", drop_rate=0.2), 28),
    (ModelConfig(name="cifar_cnn_batchnorm", filters=(4, 6), dense=()), 32),
    (ModelConfig(name="cifar_efficientnet"), 16),
    (ModelConfig(name="squeezenet1_1", head_hidden=5), 20),
    (ModelConfig(name="test_efficientnet", gray_input="repeated"), 32),
]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "side"), NETWORKS, ids=lambda each: getattr(each, "name", None))
def test_every_kind_of_network_is_known_to_onnx(settings: ModelConfig, side: int) -> None:
    model = make_model(settings, 1, 7).eval().requires_grad_(False)
    raw = np.random.default_rng(0).integers(0, 256, (3, side, side, 1), dtype=np.uint8)
    decided = ProbabilityHead(np.zeros(7, np.float32), 1.0)
    classifier = InferenceModule(TransformSpec((side, side, 1), False, side), model, "none", decided).eval()
    expected = classifier(torch.from_numpy(raw))[0].numpy()
    found = export_formats.to_onnx(classifier, (side, side, 1), {}).predict(raw)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_done_to_raw_images_is_within_the_graph() -> None:
    """To the bit: all that is done to bytes, for images with ink, without, and of a single value."""
    shape, preparation = (
        (20, 16, 3),
        Preprocessing("auto", 1, 0.1, foreground_opening_radius=1, dilation_radius=1, equalize=True),
    )
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    images[1], images[2, 4:] = 200, 0
    spec = TransformSpec(shape, True, 20, "linear", (0.3,) * 3, (0.2,) * 3, preparation)
    seed_weights(0)
    model = nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(27, 4))
    classifier = InferenceModule(
        spec, model.requires_grad_(False), "none", ProbabilityHead(np.zeros(4, np.float32), 1.5)
    ).eval()
    expected = TorchTransform(spec, torch.device("cpu"))(images)
    torch.testing.assert_close(classifier.preprocessing(torch.from_numpy(images)), expected, atol=1e-6, rtol=1e-5)
    exported = export_formats.to_onnx(classifier, shape, {})
    found = exported.predict(images)
    np.testing.assert_allclose(found, classifier(torch.from_numpy(images))[0].numpy(), atol=1e-6)


def test_a_model_that_a_format_does_not_know_is_refused() -> None:
    class Unknown(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[: int(images.sum())]

    classifier = InferenceModule(TransformSpec((8, 8, 1), False, 8), Unknown(), "none", 1.0)
    with pytest.raises(UserError, match="cannot be written as torch-export"):
        export_formats.to_torch_export(classifier, (8, 8, 1), {})


@pytest.mark.parametrize("side", [3, 4, 5, 7, 10, 28])
def test_the_plain_maxima_are_torchs_adaptive_pooling(side: int) -> None:
    images = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(side))
    assert torch.equal(_AdaptiveMaxPool(3)(images), nn.AdaptiveMaxPool2d(3)(images))


def test_every_pooling_of_a_model_is_replaced() -> None:
    model = nn.Sequential(nn.Sequential(nn.AdaptiveMaxPool2d(3)), nn.AdaptiveMaxPool2d(3))
    spec = TransformSpec((8, 8, 1), False, 8)
    classifier = InferenceModule(spec, model, "none", 1.0)
    assert not any(isinstance(module, nn.AdaptiveMaxPool2d) for module in classifier.modules())
