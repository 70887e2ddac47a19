"""Grad-CAM against its formula, by hand and by finite differences, and what has no feature map."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from trainer.config.schema import ModelConfig
from trainer.models.factory import make_model
from trainer.report.grad_cam import grad_cam


def test_a_case_by_hand() -> None:
    """Two channels: A_0 is the image, A_1 = 2 x the image; the logit of class 1 is mean(3 A_0 - A_1)."""
    convolution = nn.Conv2d(1, 2, 1, bias=False)
    convolution.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    classifier = nn.Linear(2, 2, bias=False)
    classifier.weight.data = torch.tensor([[0.0, -1.0], [3.0, -1.0]])
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier).eval()
    image = torch.tensor([[1.0, -2.0], [0.5, 4.0]]).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    heat = grad_cam(model, image, torch.tensor([1, 0]))
    assert heat is not None
    # Class 1: alpha = (3, -1) / 4, so the map is ReLU((3 x - 2 x) / 4) = ReLU(x) / 4. Class 0: ReLU(-2 x / 4).
    assert heat[0].tolist() == [[0.25, 0.0], [0.125, 1.0]]
    assert heat[1].tolist() == [[0.0, 1.0], [0.0, 0.0]]


def timm_network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()


def test_a_timm_network_has_the_map_of_its_last_features() -> None:
    """The gradient by central differences of the classifier, in float64."""
    model = timm_network().double()
    image = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        label = int(model(image).argmax())
        features = model.forward_features(image)
        gradient = torch.zeros_like(features)
        for index in np.ndindex(*features.shape):
            shift = torch.zeros_like(features)
            shift[index] = 1e-4
            ends = (model.forward_head(features + sign * shift)[0, label] for sign in (1, -1))
            gradient[index] = (next(ends) - next(ends)) / 2e-4
        expected = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).clamp(min=0)[0]
    heat = grad_cam(model, image, torch.tensor([label]))
    assert heat is not None and expected.max() > 0
    enlarged = nn.functional.interpolate(expected[None, None] / expected.max(), (64, 64), mode="bilinear")[0, 0]
    assert torch.allclose(heat[0], enlarged, atol=1e-6)
    assert "forward_features" not in vars(model)


@pytest.mark.parametrize("name", ["three_block_cnn", "lenet", "squeezenet1_1", "cifar_efficientnet"])
def test_networks_of_this_project_have_maps(name: str) -> None:
    side = {"lenet": 28, "squeezenet1_1": 40}.get(name, 32)
    model = make_model(ModelConfig(name=name, head_hidden=8 if name == "cifar_efficientnet" else None), 1, 3).eval()
    heat = grad_cam(model, torch.rand(2, 1, side, side), torch.tensor([0, 2]))
    assert heat is not None and heat.shape == (2, side, side)
    assert heat.min() >= 0 and heat.max() <= 1
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_and_single_positions_have_none() -> None:
    tokens = timm.create_model("test_vit", num_classes=3, in_chans=1, img_size=32, patch_size=8).eval()
    assert grad_cam(tokens, torch.rand(1, 1, 32, 32), torch.tensor([0])) is None
    assert grad_cam(timm_network(), torch.rand(1, 1, 16, 16), torch.tensor([0])) is None
