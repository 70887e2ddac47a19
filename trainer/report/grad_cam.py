"""Grad-CAM: the parts of an image that raise the logit of a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from shards.stores.base import Store
from trainer.checkpoint.trained_model import TrainedModel
from trainer.evaluate.evaluator import loader_for, to_pixels
from trainer.models.precision import to_memory_format
from trainer.runtime.distributed import World

_SIDE = 64  # of a picture, in pixels
_COLOURS = 64  # of a picture, which keeps the page small
_HEAT = torch.tensor([255.0, 110.0, 0.0])
_OPACITY = 0.75


def grad_cam(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor | None:
    """Compute class activation maps of the last feature map A [n, K, h, w].

    ReLU(sum_k alpha_k A_k), where alpha_k is the mean over positions of the gradient of the class's logit with respect
    to A_k; Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2.

    Args:
        model: In evaluation mode. A is the output of `forward_features` in timm's networks; in others, that of the last
            layer with such an output, without pooling. Of an ensemble, A is a feature map of one member: of the first
            timm network, otherwise of the last member.
        images: float32 [n, C, H, W].
        classes: int64 [n], the class of each image.

    Returns:
        float32 [n, H, W], 0 .. 1 with the maximum of each image scaled to 1, interpolated bilinearly; None if the
        network has no feature map of more than one position.
    """
    maps: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            maps[:] = [output]

    timm_networks = [module for module in model.modules() if hasattr(module, "forward_features")]
    leaves = [each for each in model.modules() if not any(each.children()) and "Pool" not in type(each).__name__]
    hooks = []
    if timm_networks:
        network: Any = timm_networks[0]
        compute = network.forward_features

        def forward_features(*args: Any, **kwargs: Any) -> Any:
            features = compute(*args, **kwargs)
            keep(network, args, features)
            return features

        network.forward_features = forward_features
    else:
        hooks = [leaf.register_forward_hook(keep) for leaf in leaves]
    try:
        with torch.enable_grad():
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
        if timm_networks:
            del network.forward_features
    if not maps:
        return None
    (features,) = maps
    (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    if timm_networks and getattr(network, "output_fmt", "NCHW") == "NHWC":
        features, gradients = (each.permute(0, 3, 1, 2) for each in (features, gradients))
    if features.shape[2] * features.shape[3] == 1:
        return None
    heat = (gradients.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1, keepdim=True).relu().detach()
    heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    return F.interpolate(heat, images.shape[2:], mode="bilinear")[:, 0]


def grad_cam_pictures(
    store: Store, trained: TrainedModel, samples: NDArray[np.int64], predicted: NDArray[np.int64]
) -> list[Image.Image] | None:
    """Draw the map of the predicted class in orange over the model input, computed on the CPU in fp32.

    Args:
        store: A split.
        trained: The model.
        samples: int64 [n], positions in the store.
        predicted: int64 [n], predicted classes.

    Returns:
        n pictures; None if the network has no spatial feature map.
    """
    world = World()
    model = trained.build_model(world.device).eval()
    pictures: list[Image.Image] = []
    for batch in loader_for(store, trained, world, samples).batches():
        images = to_memory_format(batch.images, trained.config.trainer)
        classes = torch.from_numpy(predicted[len(pictures) : len(pictures) + len(images)])
        heat = grad_cam(model, images, classes)
        if heat is None:
            return None
        opacity = _OPACITY * heat[..., None]
        pixels = to_pixels(batch.images, trained).float() * (1 - opacity) + _HEAT * opacity
        for picture in pixels.byte().numpy():
            drawn = Image.fromarray(picture)
            drawn.thumbnail((_SIDE, _SIDE))
            pictures.append(drawn.quantize(_COLOURS))
    return pictures
