"""The networks that are written down here are those of their sources, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from shards import UserError
from trainer.config.architectures import MIN_RESOLUTION, PLAIN_CNNS
from trainer.config.schema import BUILTIN_MODELS, ModelConfig
from trainer.models import efficientnet_cifar, resnet_cifar, small_cnn, squeezenet
from trainer.models import factory as model_module
from trainer.models import lenet_family as plain
from trainer.models.factory import make_model

CLASSES = 10


def made(name: str, channels: int = 3, classes: int = CLASSES, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return make_model(ModelConfig(name=name, **settings), channels, classes).eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def described(model: nn.Module) -> list[str]:
    """Convolutions, dense layers, dropouts and norms of a network, as the systems' tables name them."""
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            padding = f" pad {layer.padding[0]}" if layer.padding[0] else ""
            found.append(f"Conv {layer.out_channels} ({layer.kernel_size[0]}x{layer.kernel_size[1]}){padding}")
        elif isinstance(layer, nn.Linear):
            found.append(f"Linear {layer.in_features}-{layer.out_features}")
        elif isinstance(layer, nn.MaxPool2d):
            found.append(f"pool {layer.kernel_size}")
        elif isinstance(layer, nn.Dropout):
            found.append(f"dropout {layer.p}")
        elif isinstance(layer, nn.BatchNorm2d | nn.ReLU):
            found.append({nn.BatchNorm2d: "norm", nn.ReLU: "ReLU"}[type(layer)])
    return found


def block(convolution: str, *norm: str) -> list[str]:
    return [convolution, "ReLU", *norm, "pool 2"]


CNN = [*block("Conv 32 (3x3) pad 1"), *block("Conv 64 (3x3) pad 1"), "Linear 4096-128", "ReLU", "Linear 128-10"]
THREE = [piece for width in (16, 32, 32) for piece in block(f"Conv {width} (3x3) pad 1")]
LAYERS = {
    "cifar_cnn": CNN,
    "cifar_cnn_batchnorm": [
        *block("Conv 32 (3x3) pad 1", "norm"),
        *block("Conv 64 (3x3) pad 1", "norm"),
        *("dropout 0.5", "Linear 4096-256", "ReLU", "dropout 0.5", "Linear 256-10"),
    ],
    "lenet": [
        *block("Conv 6 (5x5)"),
        *block("Conv 16 (5x5)"),
        *("Linear 256-120", "ReLU", "Linear 120-84", "ReLU", "Linear 84-10"),
    ],
    "numtadb_model1": [*THREE, "Linear 2048-1024", "ReLU", "Linear 1024-512", "ReLU", "Linear 512-10"],
    "numtadb_model2": [
        *block("Conv 6 (5x5)"),
        *block("Conv 16 (5x5)"),
        *block("Conv 32 (3x3) pad 1"),
        *("Linear 512-120", "ReLU", "Linear 120-84", "ReLU", "Linear 84-10"),
    ],
    "numtadb_model3": [*THREE, "Linear 1152-1024", "ReLU", "Linear 1024-512", "ReLU", "Linear 512-10"],
}


@pytest.mark.parametrize("name", PLAIN_CNNS)
def test_a_plain_network_has_the_layers_of_the_earlier_system(name: str) -> None:
    model = made(name, drop_rate=0.5 if "batchnorm" in name else 0.0)
    assert described(model) == LAYERS[name]
    side = PLAIN_CNNS[name].side
    assert model(torch.rand(2, 3, side, side)).shape == (2, CLASSES)


def test_filters_kernels_and_dense_layers_are_settings() -> None:
    model = made("cifar_cnn", filters=[48, 40], kernel=5, dense=[200, 50], drop_rate=0.25)
    assert described(model) == [
        *block("Conv 48 (5x5) pad 2"),
        *block("Conv 40 (5x5) pad 2"),
        *("dropout 0.25", "Linear 2560-200", "ReLU", "dropout 0.25", "Linear 200-50", "ReLU"),
        *("dropout 0.25", "Linear 50-10"),
    ]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, CLASSES)
    assert described(made("cifar_cnn", kernel=[5, 3]))[::3][:2] == ["Conv 32 (5x5) pad 2", "Conv 64 (3x3) pad 1"]
    unpadded = made("lenet", channels=1, kernel=3, dense=[])
    assert described(unpadded)[-1] == "Linear 400-10"
    assert unpadded(torch.rand(2, 1, 28, 28)).shape == (2, CLASSES)


@pytest.mark.parametrize("name", MIN_RESOLUTION)
def test_the_smallest_side_is_the_smallest(name: str) -> None:
    model, side = made(name), MIN_RESOLUTION[name]
    assert model(torch.rand(2, 3, side, side)).shape == (2, CLASSES)
    if side > 1:
        with pytest.raises(RuntimeError):
            model(torch.rand(2, 3, side - 1, side - 1))


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_features_come_out_below_a_head(name: str) -> None:
    model = made(name, channels=1, head_hidden=11)
    side = PLAIN_CNNS[name].side if name in PLAIN_CNNS else 32
    assert model(torch.rand(2, 1, side, side)).shape == (2, CLASSES)
    assert model.backbone(torch.rand(2, 1, side, side)).shape == (2, model.head[1].in_features)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (plain, [*PLAIN_CNNS]),
        (efficientnet_cifar, ["cifar_efficientnet"]),
        (resnet_cifar, ["cifar_resnet20", "cifar_resnet32"]),
        (squeezenet, ["squeezenet1_1"]),
    ],
    ids=["plain", "efficientnet", "resnet", "squeezenet"],
)
def test_the_documentation_counts_the_parameters(module: object, names: list[str]) -> None:
    text = Path(module.__file__).read_text()
    for name in names:
        row = next((line for line in text.splitlines() if line.startswith(f"| {name} |")), text)
        assert f"{parameters(made(name)):,}" in row, name
    for name in ("three_block_cnn", "small_resnet"):
        assert f"{parameters(made(name, channels=1)):,}" in getattr(small_cnn, name).__doc__


# Width and depth multipliers of timm's EfficientNets.
VARIANTS = {"b0": (1.0, 1.0), "b2": (1.1, 1.2)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_multipliers_make_every_efficientnet(variant: str) -> None:
    """At the published strides the outputs are those of timm's model with the same weights."""
    width, depth = VARIANTS[variant]
    torch.manual_seed(0)
    theirs = timm.create_model(f"efficientnet_{variant}", num_classes=CLASSES).eval().double()
    ours = made("cifar_efficientnet", channel_multiplier=width, depth_multiplier=depth).double()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    assert not torch.allclose(ours(images), theirs(images))
    ours.conv_stem.stride = ours.blocks[1][0].conv_dw.stride = (2, 2)
    assert torch.equal(ours(images), theirs(images))


def test_the_stem_for_small_images_leaves_something_to_see() -> None:
    images = torch.rand(2, 3, 32, 32)
    assert made("cifar_efficientnet").forward_features(images).shape[2:] == (4, 4)
    assert timm.create_model("efficientnet_b0").eval().forward_features(images).shape[2:] == (1, 1)


def test_options_are_arguments_of_the_network() -> None:
    assert made("cifar_efficientnet", options={"stem_size": 16}).conv_stem.out_channels == 16
    with pytest.raises(UserError, match="unexpected keyword argument 'colour'") as caught:
        made("cifar_efficientnet", options={"colour": 1})
    assert "model.options" in caught.value.hint


def test_dropout_and_stochastic_depth_reach_the_blocks() -> None:
    model = made("cifar_efficientnet", drop_rate=0.3, drop_path_rate=0.2)
    rates = [getattr(module.drop_path, "drop_prob", 0.0) for stage in model.blocks for module in stage]
    assert rates == pytest.approx([0.2 * depth / 16 for depth in range(16)])
    assert model.drop_rate == 0.3


@pytest.mark.parametrize(("name", "blocks"), [("cifar_resnet20", 3), ("cifar_resnet32", 5)])
def test_a_resnet_for_cifar_is_the_published_one(name: str, blocks: int) -> None:
    """Table 6 of He et al. 2016: maps of 32, 16 and 8 pixels, 6n + 2 layers; the output of a block by the formula."""
    model, images = made(name).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in model.modules()) == 6 * blocks + 2
    features = F.relu(model[1](model[0](images)))
    for number, block in enumerate(list(model)[3:-4]):
        stride = 2 if number in (blocks, 2 * blocks) else 1
        inner = F.conv2d(features, block.conv1.weight, stride=stride, padding=1)
        inner = F.conv2d(F.relu(block.norm1(inner)), block.conv2.weight, padding=1)
        shortcut = torch.zeros_like(inner)
        shortcut[:, : features.shape[1]] = features[:, :, ::stride, ::stride]
        features = F.relu(block.norm2(inner) + shortcut)
        assert features.shape[1:] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)][number // blocks]
    torch.testing.assert_close(model(images), model[-1](features.mean(dim=(2, 3))))


def test_a_small_resnet_pools_widens_and_adds() -> None:
    """Each stage as in its docstring, written with functions and the weights in their order."""
    options = {"widths": [16, 24, 40], "depths": [0, 2, 1]}
    model = made("small_resnet", channels=1, options=options).double()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.running_mean)
    layers = iter([module for module in model.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)])

    def convolve(images: torch.Tensor, **stride: int) -> torch.Tensor:
        weight = next(layers).weight
        return next(layers)(F.conv2d(images, weight, padding=0 if stride else 1, **stride))

    images = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    features = F.relu(convolve(images, stride=2))
    for width, depth in zip(options["widths"], options["depths"], strict=True):
        if width != 16:
            features = F.relu(convolve(F.max_pool2d(features, 2)))
        for _ in range(depth):
            features = F.relu(features + convolve(F.relu(convolve(features))))
        assert features.shape[1] == width
    torch.testing.assert_close(model(images), model[-1](features.mean(dim=(2, 3))))
    assert next(layers, None) is None
    finer = made("small_resnet", channels=1, stem_stride=1)
    assert finer.stem[0].stride == (1, 1)
    for wrong in ([16, 24], [], [0], [-8], 3, ["x"], [1 << 24]):  # and a size that no memory holds
        with pytest.raises(UserError, match=r"model\.name=small_resnet") as caught:
            made("small_resnet", options={"widths": wrong, "depths": [1]})
        assert "model.options" in caught.value.hint


def test_a_finer_stem_leaves_squeezenet_more_to_see_at_32_pixels() -> None:
    images = torch.rand(2, 3, 32, 32)
    assert made("squeezenet1_1").features(images).shape[2:] == (1, 1)
    assert made("squeezenet1_1", stem_stride=1).features(images).shape[2:] == (3, 3)


def test_squeezenet_has_a_new_head() -> None:
    model = made("squeezenet1_1", classes=7, drop_rate=0.5)
    dropout, classifier, *_ = model.classifier
    assert (dropout.p, classifier.out_channels) == (0.5, 7)


def test_squeezenet_begins_with_published_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All but the classifier is theirs; one channel takes the sum over three."""
    published = squeezenet.torchvision_squeezenet()
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / squeezenet.WEIGHTS_URL.rpartition("/")[2]).write_bytes(b"there")
    monkeypatch.setattr(model_module.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(model_module.socket, "create_connection", None)
    monkeypatch.setattr(squeezenet, "torchvision_squeezenet", lambda weights: weights and published)
    stem = published.features[0].weight.sum(dim=1, keepdim=True)
    model = made("squeezenet1_1", channels=1, pretrained=True)
    torch.testing.assert_close(model.features[0].weight, stem)
    assert model.features[3] is published.features[3]
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, CLASSES)


def test_squeezenet_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(model_module.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(model_module.urllib.request, "getproxies", dict)
    monkeypatch.setattr(model_module.socket, "create_connection", refuse)
    with pytest.raises(UserError, match="no network here"):
        made("squeezenet1_1", pretrained=True)
    assert parameters(made("squeezenet1_1", pretrained="auto")) == parameters(made("squeezenet1_1"))


@pytest.mark.parametrize("name", ["test_efficientnet", "squeezenet1_1"])
def test_gray_images_enter_a_network_of_rgb_in_three_ways(name: str) -> None:
    gray = torch.rand(2, 1, 32, 32)
    summed, random = made(name, channels=1), made(name, channels=1, gray_input="random")
    first = [next(module for module in model.modules() if isinstance(module, nn.Conv2d)) for model in (summed, random)]
    assert first[0].weight.shape == first[1].weight.shape
    assert not torch.equal(first[0].weight, first[1].weight)
    repeated = made(name, channels=1, gray_input="repeated")
    rgb = made(name, channels=3)
    rgb.load_state_dict(repeated.backbone.state_dict())
    torch.testing.assert_close(repeated(gray), rgb(gray.expand(-1, 3, -1, -1)))
    assert torch.equal(
        made(name, channels=3, gray_input="repeated")(gray.expand(-1, 3, -1, -1)),
        made(name)(gray.expand(-1, 3, -1, -1)),
    )
