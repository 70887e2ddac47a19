"""Models by name, with the channels, classes, head and first weights that the settings ask for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from shards import UserError
from trainer.config.schema import Config, ModelConfig
from trainer.models import factory as model_module
from trainer.models.auto import resolve_auto
from trainer.models.factory import SMALL_CNN, apply_training_options, check_resolutions, make_model
from trainer.models.precision import describe_precision, resolve_precision
from trainer.models.weights import load_weights
from trainer.optim.ema import ModelEma

TINY = "test_efficientnet"  # 0.4 M parameters
CLASSES = 7


def output(model: nn.Module, channels: int, size: int) -> torch.Tensor:
    return model.eval()(torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0)))


def dropouts(model: nn.Module) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published weights cannot be fetched, whether there is a network here or not; all else is timm's."""
    create = timm.create_model

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("We couldn't connect to the hub\nmore about that")

    def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        return refuse() if pretrained else create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(model_module.socket, "create_connection", refuse)


@pytest.mark.parametrize("hidden", [None, 11])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 20, 28, 56])
def test_the_small_network_takes_images_of_any_size(size: int, channels: int, hidden: int | None) -> None:
    model = make_model(ModelConfig(name=SMALL_CNN, head_hidden=hidden), channels, CLASSES)
    assert output(model, channels, size).shape == (3, CLASSES)


def test_the_small_network_is_the_one_described() -> None:
    model = make_model(ModelConfig(name=SMALL_CNN, drop_rate=0.4), 1, 10)
    assert [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)] == [32, 64, 128]
    assert [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)] == [128, 10]
    assert dropouts(model) == [0.4]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_timm_model_by_name(channels: int) -> None:
    model = make_model(ModelConfig(name=TINY, drop_rate=0.25, drop_path_rate=0.5), channels, CLASSES)
    assert output(model, channels, 32).shape == (3, CLASSES)
    assert model.drop_rate == 0.25
    assert max(getattr(module, "drop_prob", 0) or 0 for module in model.modules()) > 0


# In MobileNetV3, the layer before the classifier is wider than the feature maps.
@pytest.mark.parametrize("name", [SMALL_CNN, TINY, "mobilenetv3_small_050"])
def test_a_hidden_layer_stands_between_features_and_classes(name: str) -> None:
    model = make_model(ModelConfig(name=name, head_hidden=11, drop_rate=0.25), 1, CLASSES)
    assert output(model, 1, 32).shape == (3, CLASSES)
    dropout, hidden, activation, classifier = model.head
    assert (hidden.in_features, hidden.out_features) == (output(model.backbone, 1, 32).shape[1], 11)
    assert isinstance(activation, nn.ReLU)
    assert (classifier.in_features, classifier.out_features) == (11, CLASSES)
    assert dropout.p == 0.25
    assert getattr(model.backbone, "drop_rate", 0.0) == 0.0, "dropout stands in one place"


def test_an_unknown_name_suggests_one() -> None:
    for name, meant in (("efficientnet_b22", "efficientnet_b2"), ("three_block_cn", SMALL_CNN)):
        with pytest.raises(UserError) as caught:
            make_model(ModelConfig(name=name), 1, CLASSES)
        assert caught.value.found == f"model.name={name}"
        assert meant in caught.value.hint
    with pytest.raises(UserError, match="list_models"):
        make_model(ModelConfig(name="???"), 1, CLASSES)


def test_a_model_without_shortcuts_takes_no_stochastic_depth() -> None:
    assert output(make_model(ModelConfig(name="densenet121"), 1, CLASSES), 1, 32).shape == (3, CLASSES)
    with pytest.raises(UserError) as caught:
        make_model(ModelConfig(name="densenet121", drop_path_rate=0.1), 1, CLASSES)
    assert caught.value.hint == "model.drop_path_rate=0"


@pytest.mark.parametrize(("name", "sides", "refused"), [("test_vit", (160, 28), 28), ("densenet121", (64, 16), 16)])
def test_sides_that_a_model_does_not_take_are_refused(name: str, sides: tuple[int, ...], refused: int) -> None:
    model = make_model(ModelConfig(name=name), 1, CLASSES)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    check_resolutions(model, name, 1, sides[:1])
    assert model.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), "only tried"
    with pytest.raises(UserError, match=f"data.resolution={refused} for model.name={name}"):
        check_resolutions(model, name, 1, sides)


def test_a_network_of_one_size_is_built_for_the_resolution() -> None:
    model = make_model(ModelConfig(name="vit_tiny_patch16_224"), 1, CLASSES, resolution="32x64")
    assert model(torch.zeros(2, 1, 32, 64)).shape == (2, CLASSES)
    check_resolutions(model, "vit_tiny_patch16_224", 1, ["32x64"])
    with pytest.raises(UserError, match=r"data\.resolution=64x32"):
        check_resolutions(model, "vit_tiny_patch16_224", 1, ["64x32"])


def test_published_weights_that_must_be_had_and_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(monkeypatch)
    with pytest.raises(UserError) as caught:
        make_model(ModelConfig(name=TINY, pretrained=True), 1, CLASSES)
    assert "We couldn't connect to the hub" in caught.value.found
    assert "more about that" not in caught.value.found
    assert "model.init_checkpoint=FILE" in caught.value.hint


def test_published_weights_that_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_network(monkeypatch)
    with caplog.at_level(logging.WARNING):
        model = make_model(ModelConfig(name=TINY, pretrained="auto"), 1, CLASSES)
    assert output(model, 1, 32).shape == (3, CLASSES)
    assert "starting from random weights" in caplog.text
    assert TINY in caplog.text


def test_published_weights_are_asked_for_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    without_network(monkeypatch)
    path = tmp_path / "weights.pth"
    torch.save(make_model(ModelConfig(name=TINY), 1, CLASSES).state_dict(), path)
    make_model(ModelConfig(name=TINY, pretrained="auto", init_checkpoint=path), 1, CLASSES)
    assert caplog.text == ""


def test_published_weights_in_the_cache_are_taken_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stem for gray images is the sum of the published one over its three channels."""
    published = timm.create_model(TINY)
    path = tmp_path / "model.safetensors"
    save_file(published.state_dict(), path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: str(path))
    monkeypatch.setattr(model_module.socket, "create_connection", None)
    model = make_model(ModelConfig(name=TINY, pretrained=True), 1, CLASSES)
    assert torch.allclose(model.conv_stem.weight, published.conv_stem.weight.sum(dim=1, keepdim=True), atol=1e-6)
    assert torch.equal(model.conv_head.weight, published.conv_head.weight)
    assert output(model, 1, 32).shape == (3, CLASSES)


def test_a_model_that_was_never_published_has_no_weights_to_begin_with() -> None:
    with pytest.raises(UserError, match="there are none"):
        make_model(ModelConfig(name="efficientnet_b6", pretrained=True), 1, CLASSES)


@pytest.mark.parametrize("name", ["three_block_cnn", "small_resnet", "cifar_resnet20", "lenet", "cifar_efficientnet"])
def test_a_network_of_ours_has_no_weights_to_begin_with(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        UserError, match=f"published weights of {name} that are not available: there are none"
    ) as caught:
        make_model(ModelConfig(name=name, pretrained=True), 1, CLASSES)
    assert "model.pretrained=false" in caught.value.hint
    with caplog.at_level(logging.WARNING):
        make_model(ModelConfig(name=name, pretrained="auto"), 1, CLASSES)
    assert f"the published weights of {name} are not available (there are none)" in caplog.text


@pytest.mark.parametrize("name", ["auto", "three_block_cnn", "cifar_resnet20"])
def test_resolved_settings_name_no_weights_of_a_network_that_has_none(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(data={"shards": "set", "resolution": 32}, model={"name": name, "pretrained": "auto"})
    with caplog.at_level(logging.WARNING):
        assert resolve_auto(config, torch.device("cpu")).model.pretrained is False
    assert "model.pretrained=auto becomes false" in caplog.text


def test_resolved_settings_keep_published_weights_that_there_may_be() -> None:
    for name in ("squeezenet1_1", TINY):
        config = Config(data={"shards": "set"}, model={"name": name, "pretrained": "auto"})
        assert resolve_auto(config, torch.device("cpu")).model.pretrained == "auto"


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "best.pt"])
def test_begins_with_the_weights_of_a_file(tmp_path: Path, name: str) -> None:
    trained = make_model(ModelConfig(name=SMALL_CNN), 1, CLASSES)
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save({"model": trained.state_dict(), "epoch": 3} if path.suffix == ".pt" else trained.state_dict(), path)
    begun = make_model(ModelConfig(name=SMALL_CNN, init_checkpoint=path), 1, CLASSES)
    assert torch.equal(output(begun, 1, 28), output(trained, 1, 28))
    assert not torch.equal(output(make_model(ModelConfig(name=SMALL_CNN), 1, CLASSES), 1, 28), output(trained, 1, 28))


@pytest.mark.parametrize(("name", "hidden"), [(SMALL_CNN, None), (SMALL_CNN, 5), (TINY, None)])
def test_a_classifier_of_another_size_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, hidden: int | None
) -> None:
    path = tmp_path / "best.pt"
    trained = make_model(ModelConfig(name=name, head_hidden=hidden), 1, CLASSES + 3)
    torch.save({"model": trained.state_dict(), "epoch": 3}, path)
    begun = make_model(ModelConfig(name=name, head_hidden=hidden, init_checkpoint=path), 1, CLASSES)
    differing = [
        key
        for key, tensor in begun.state_dict().items()
        if tensor.shape != trained.state_dict()[key].shape or not torch.equal(tensor, trained.state_dict()[key])
    ]
    assert len(differing) == 2 and output(begun, 1, 32).shape == (3, CLASSES)
    (line,) = caplog.messages
    assert f"is for {CLASSES + 3} classes" in line and all(key in line for key in differing)


def test_classes_of_the_same_name_keep_their_part_of_a_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "best.pt"
    known, names = list("abcdef"), list("fxbay")
    trained = make_model(ModelConfig(name=TINY), 1, len(known), known)
    torch.save({"model": trained.state_dict(), "classes": known}, path)
    trained.eval()
    begun = make_model(ModelConfig(name=TINY, init_checkpoint=path), 1, len(names), names).eval()
    images = torch.rand(4, 1, 32, 32)
    with torch.no_grad():
        before, after = trained(images), begun(images)
    torch.testing.assert_close(after[:, [0, 2, 3]], before[:, [5, 1, 0]])
    assert "keeps the rows of 3 classes, and 2 rows start from random weights" in caplog.messages[0]
    moved = make_model(ModelConfig(name=TINY, init_checkpoint=path), 1, len(known), known[::-1]).eval()
    with torch.no_grad():
        torch.testing.assert_close(moved(images), before.flip(1), msg="as many classes, in another order")
    caplog.clear()
    make_model(ModelConfig(name=TINY, init_checkpoint=path), 1, len(known), known)
    assert not caplog.messages, "the same classes"


def test_a_smaller_step_of_the_stem_doubles_the_features() -> None:
    plain, fine = (make_model(ModelConfig(name=TINY, stem_stride=stride), 1, CLASSES).eval() for stride in (None, 1))
    fine.load_state_dict(plain.state_dict())
    images = torch.rand(1, 1, 32, 32)
    assert [2 * side for side in plain.forward_features(images).shape[2:]] == list(
        fine.forward_features(images).shape[2:]
    )
    assert output(fine, 1, 32).shape == (3, CLASSES)
    for name in (SMALL_CNN, "convnext_atto", "vit_tiny_patch16_224"):
        with pytest.raises(UserError, match="stem_stride=1"):
            make_model(ModelConfig(name=name, stem_stride=1), 1, CLASSES)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(make_model(ModelConfig(name=SMALL_CNN), 3, CLASSES + 1).state_dict(), path)
    with pytest.raises(UserError, match="do not fit") as caught:
        make_model(ModelConfig(name=TINY, init_checkpoint=path), 1, CLASSES)
    assert str(path) in caught.value.found
    assert "\n" not in caught.value.found


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut"], ids=["empty", "text", "cut"])
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_weights(nn.Linear(1, 1), path)
    assert str(path) in caught.value.found


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_file_of_weights_is_said_to_be_missing(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_weights(nn.Linear(1, 1), tmp_path / f"none{suffix}")


def test_weights_are_read_without_running_code(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": Trap(tmp_path / "trapped")}, path)
    with pytest.raises(UserError):
        load_weights(nn.Linear(1, 1), path)
    assert not (tmp_path / "trapped").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_the_average_follows_fast_at_first_and_slowly_later() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = ModelEma(model, decay=0.99)
    nn.init.ones_(model.weight)
    kept = []
    for update in range(1, 2001):
        nn.init.zeros_(average.module.weight)
        average.update(update)
        kept.append(1 - float(average.module.weight.detach()))
    assert kept[0] == 0, "the first update takes the model's weights whole"
    assert kept[5] < 0.8
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(0.99)


@pytest.mark.parametrize("capability", [None, "amx_bf16", "avx512_bf16"])
@pytest.mark.parametrize(
    ("name", "by_channel"),
    [
        (SMALL_CNN, False),
        ("resnet18", False),
        ("squeezenet1_1", False),
        ("vit_tiny_patch16_224", False),
        ("regnety_002", False),  # groups of eight channels
        ("cifar_efficientnet", True),
        ("efficientnet_b2", True),
        ("mobilenetv2_100", True),
    ],
)
def test_a_processor_multiplies_in_bf16_what_has_matrices(
    name: str, by_channel: bool, capability: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, capability: True}, raising=False)
    asked = Config(model=ModelConfig(name=name), data={"shards": "set"})
    decided = resolve_precision(asked, torch.device("cpu"))
    assert decided.trainer.precision == ("bf16" if capability and not by_channel else "fp32")
    for precision in ("fp32", "bf16", "fp16"):
        said = asked.model_copy(update={"trainer": asked.trainer.model_copy(update={"precision": precision})})
        assert resolve_precision(said, torch.device("cpu")) == said


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((9, 0), "bf16"), ((8, 6), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")],
)
def test_a_gpu_chooses_by_its_compute_capability(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    decided = resolve_precision(Config(data={"shards": "set"}), gpu).trainer
    assert decided.precision == precision
    reason = "compute capability {}.{}".format(*capability)
    assert describe_precision(decided, gpu) == f"{precision} ({reason})"
    other = decided.model_copy(update={"precision": "fp32" if precision != "fp32" else "bf16"})
    assert describe_precision(other, gpu) == f"{other.precision} (set by trainer.precision)"
    assert describe_precision(decided, torch.device("cpu")) == precision


@pytest.mark.parametrize("hidden", [None, 256])
@pytest.mark.parametrize("name", [TINY, SMALL_CNN, "cifar_efficientnet", "vit_tiny_patch16_224"])
def test_the_classifier_begins_as_small_as_asked(name: str, hidden: int | None) -> None:
    model = make_model(ModelConfig(name=name, head_hidden=hidden, head_init_std=0.01), 3, CLASSES)
    *_, classifier = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    assert classifier.out_features == CLASSES
    assert float(classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert float(classifier.weight.detach().mean()) == pytest.approx(0, abs=0.002)
    assert not classifier.bias.any()


def test_all_classifiers_begin_as_small_as_asked() -> None:
    """CrossViT has one for each of its branches."""
    model = make_model(ModelConfig(name="crossvit_9_240", head_init_std=0.001), 3, CLASSES)
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == CLASSES]
    assert len(heads) == 2
    for head in heads:
        assert float(head.weight.detach().std()) == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("name", [TINY, "mobilenetv2_100", "cifar_efficientnet"])
def test_without_asking_it_is_the_networks_own(name: str) -> None:
    *_, classifier = (
        layer for layer in make_model(ModelConfig(name=name), 3, 10).modules() if isinstance(layer, nn.Linear)
    )
    assert float(classifier.weight.detach().std()) == pytest.approx((1 / 3 / 10) ** 0.5, rel=0.05)


def test_weights_that_are_given_stand_before_a_deviation(tmp_path: Path) -> None:
    path = tmp_path / "trained.pth"
    trained = make_model(ModelConfig(name=SMALL_CNN), 1, CLASSES)
    torch.save(trained.state_dict(), path)
    begun = make_model(ModelConfig(name=SMALL_CNN, init_checkpoint=path, head_init_std=0.01), 1, CLASSES)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(begun.parameters(), trained.parameters(), strict=True))


def test_a_classifier_that_is_a_convolution_has_a_deviation_of_its_own() -> None:
    with pytest.raises(UserError, match=r"head_init_std=0\.01 for squeezenet1_1"):
        make_model(ModelConfig(name="squeezenet1_1", head_init_std=0.01), 3, CLASSES)


def test_the_automatic_model_suits_the_device(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(data={"shards": "set"}, trainer={"precision": "fp32"})
    for device, name in (("cpu", SMALL_CNN), ("cuda", "efficientnet_b2")):
        caplog.clear()
        resolved = resolve_auto(config, torch.device(device))
        assert (resolved.model.name, resolved.data.resolution) == (name, 28 if device == "cpu" else 112)
        assert f"model.name=auto: {name}" in caplog.text
    larger = Config(data={"shards": "set", "resolution": 40}, trainer={"precision": "fp32"})
    assert resolve_auto(larger, torch.device("cpu")).data.resolution == 40
    stated = config.model_copy(update={"model": ModelConfig(name=TINY)})
    assert resolve_auto(stated, torch.device("cpu")) == stated


def test_gradient_checkpointing_computes_the_same_gradients() -> None:
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        settings = ModelConfig(name=TINY, pretrained=False, drop_rate=0, grad_checkpointing=grad_checkpointing)
        model = make_model(settings, 1, CLASSES)
        trained = apply_training_options(model, settings, torch.device("cpu"), ranks=1).train()
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trained(images).square().mean()
        loss.backward()
        losses.append((loss.item(), kept))
        gradients.append([weight.grad for weight in model.parameters()])
    assert losses[0][0] == losses[1][0]
    assert losses[1][1] < losses[0][1] / 2, "elements kept for the backward pass"
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradient_checkpointing_that_a_model_lacks_is_refused() -> None:
    settings = ModelConfig(name=SMALL_CNN, grad_checkpointing=True)
    with pytest.raises(UserError, match="does not support"):
        apply_training_options(make_model(settings, 1, CLASSES), settings, torch.device("cpu"), ranks=1)


def test_batch_norm_is_synchronized_between_gpus_with_the_same_weights() -> None:
    settings = ModelConfig(name=TINY, pretrained=False, sync_batchnorm=True)
    model = make_model(settings, 1, CLASSES)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert apply_training_options(model, settings, torch.device("cuda", 0), ranks=1) is model
    converted = apply_training_options(model, settings, torch.device("cuda", 0), ranks=2)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == norms > 0
    torch.testing.assert_close(dict(converted.state_dict()), before, rtol=0, atol=0)


def test_batch_norm_cannot_be_synchronized_on_cpus() -> None:
    settings = ModelConfig(name=TINY, pretrained=False, sync_batchnorm=True)
    with pytest.raises(UserError, match="2 ranks on a cpu"):
        apply_training_options(make_model(settings, 1, CLASSES), settings, torch.device("cpu"), ranks=2)
