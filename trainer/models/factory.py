"""Models by name: timm's, and those defined in `trainer.models`."""

from __future__ import annotations

import difflib
import logging
import socket
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.transforms.preprocess import Resolution, input_size
from shards.errors import NotFoundError, UserError, first_line
from trainer.config.schema import BUILTIN_MODELS, ModelConfig
from trainer.models.lenet_family import make_plain_cnn
from trainer.models.resnet_cifar import BLOCKS as RESNET_BLOCKS
from trainer.models.resnet_cifar import resnet_cifar
from trainer.models.small_cnn import small_resnet, three_block_cnn
from trainer.models.transfer import freeze
from trainer.models.weights import classifier_layer, classifier_tensors, load_weights

log = logging.getLogger(__name__)

SMALL_CNN = "three_block_cnn"
UNPUBLISHED = {*BUILTIN_MODELS} - {"squeezenet1_1"}  # networks without published weights
_CONNECT_TIMEOUT = 5.0  # seconds


def make_model(
    settings: ModelConfig,
    channels: int,
    classes: int,
    class_names: Sequence[str] = (),
    resolution: Resolution | None = None,
) -> nn.Module:
    """Build a model from images float [B, channels, H, W] to logits [B, classes].

    Args:
        settings: Name, initial weights and head of the model.
        channels: Channels of the images.
        classes: Number of classes.
        class_names: Names of the classes, by which rows of the classifier in `model.init_checkpoint` are kept.
        resolution: Side of square images in pixels, or `HEIGHTxWIDTH`, for a network that is built for one size, such
            as a Vision Transformer; None for its default.

    Raises:
        UserError: The name is unknown, or the weights are unavailable or do not fit.
    """
    settings = settings.model_copy(update={"options": timm_options(settings, resolution)})
    hidden = settings.head_hidden
    repeats = settings.gray_input == "repeated" and channels == 1
    backbone, features = _backbone(settings, 3 if repeats else channels, 0 if hidden else classes)
    if settings.stem_stride is not None:
        _set_stem_stride(backbone, settings.name)
    has_random_stem = settings.gray_input == "random" and channels == 1
    if has_random_stem:
        next(layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d)).reset_parameters()
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if repeats:
        layers["repeat"] = RepeatChannels()
    layers["backbone"] = backbone
    if hidden:
        layers["head"] = nn.Sequential(
            nn.Dropout(settings.drop_rate), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
    model = nn.Sequential(layers) if len(layers) > 1 else backbone
    if settings.head_init_std is not None:
        _init_classifier(model, settings.head_init_std, settings.name)
    if settings.init_checkpoint is not None:
        convolutions = (name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
        load_weights(model, settings.init_checkpoint, class_names, next(convolutions) if has_random_stem else None)
    return model


def apply_training_options(model: nn.Module, settings: ModelConfig, device: torch.device, ranks: int) -> nn.Module:
    """Apply `model.freeze`, `model.grad_checkpointing` and `model.sync_batchnorm`; the result has the same weights.

    Raises:
        UserError: The model or the device does not support an option.
    """
    freeze(model, settings)
    if settings.grad_checkpointing:
        try:
            backbone: Any = next(module for module in model.modules() if hasattr(module, "set_grad_checkpointing"))
            backbone.set_grad_checkpointing()
        except (AssertionError, StopIteration):
            raise UserError(
                found=f"model.grad_checkpointing=true, which {settings.name} does not support",
                expected="a timm model with gradient checkpointing, such as efficientnet_b2",
                hint="model.grad_checkpointing=false, or choose another model.name",
            ) from None
    if not settings.sync_batchnorm or ranks == 1:
        return model
    if device.type != "cuda":
        raise UserError(
            found=f"model.sync_batchnorm=true with {ranks} ranks on a {device.type}",
            expected="GPUs, as torch's SyncBatchNorm has no other implementation",
            hint="model.sync_batchnorm=false",
        )
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def has_depthwise_convolutions(settings: ModelConfig) -> bool:
    """Whether a model, such as an EfficientNet, has convolutions of single channels.

    Raises:
        UserError: The name is unknown.
    """
    network, _ = _backbone(settings.without_weights(), channels=3, classes=0)
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return any(layer.groups == layer.in_channels > 1 for layer in convolutions)


def timm_options(settings: ModelConfig, resolution: Resolution | None) -> dict[str, Any]:
    """Return `model.options`, with the size of the images for a model of timm that is built for one size."""
    if settings.name in BUILTIN_MODELS or resolution is None:
        return settings.options
    published = _published(settings.name)
    has_one_size = published is not None and published.fixed_input_size
    return {**({"img_size": input_size(resolution)} if has_one_size else {}), **settings.options}


def check_resolutions(model: nn.Module, name: str, channels: int, resolutions: Iterable[Resolution]) -> None:
    """Check that a model on the CPU takes images of each resolution, by calling it with an empty image.

    Many models pool small images to nothing, and some transformers take one size only; no attribute tells which.

    Args:
        model: The model.
        name: Its name, for the error message.
        channels: Channels of the images.
        resolutions: Sides of square images in pixels, or `HEIGHTxWIDTH`.

    Raises:
        UserError: The model does not take images of a resolution.
    """
    training = model.training
    model.eval()
    for resolution in resolutions:
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, *input_size(resolution)))
        except Exception as error:  # models raise many types of exceptions
            raise UserError(
                found=f"data.resolution={resolution} for model.name={name}, which raises: {first_line(error)}",
                expected="a resolution that the model takes",
                hint="model.options={patch_size: N} with a divisor N of data.resolution, or change data.resolution"
                if hasattr(getattr(model, "backbone", model), "patch_embed")
                else "change data.resolution, model.name or model.options",
            ) from None
    model.train(training)


def _init_classifier(model: nn.Module, std: float, name: str) -> None:
    classifier = classifier_layer(model)
    if classifier is None:
        raise UserError(
            found=f"model.head_init_std={std} for {name}, which has no linear layer",
            expected="a network with a linear classifier",
            hint="remove model.head_init_std, or choose another model.name",
        )
    layers = {classifier, *(tensor.rpartition(".")[0] for tensor in classifier_tensors(model))}
    for layer_name, layer in model.named_modules():
        if layer_name in layers and isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class RepeatChannels(nn.Module):
    """Repeats gray images for a network with RGB input."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Expand float [B, 1, H, W] to [B, 3, H, W] without a copy."""
        return images.expand(-1, 3, -1, -1)


def _backbone(settings: ModelConfig, channels: int, classes: int) -> tuple[nn.Module, int]:
    """Build a network without our head, with published weights if the settings ask for them and they are available.

    Returns:
        The network and the width of its features.
    """
    if not settings.pretrained or settings.init_checkpoint is not None:
        return _build(settings, channels, classes, pretrained=False)
    try:
        return _build(settings, channels, classes, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # hub libraries raise many types of exceptions
        reason = first_line(error)
        if settings.pretrained != "auto":
            raise NotFoundError(
                found=f"published weights of {settings.name} that are not available: {reason}",
                expected="published weights in the cache of their hub, or a network connection to download them",
                hint="model.pretrained=false, and model.init_checkpoint=FILE for weights that were downloaded elsewhere"
                + (f", as {url}" if (url := _weights_url(settings.name)) else ""),
            ) from None
        log.warning(
            "model.pretrained=auto: the published weights of %s are not available (%s); starting from random weights, "
            "which need more epochs for the same accuracy",
            settings.name,
            reason,
        )
        return _build(settings, channels, classes, pretrained=False)


def _build(settings: ModelConfig, channels: int, classes: int, pretrained: bool) -> tuple[nn.Module, int]:
    if settings.options and settings.name in {*BUILTIN_MODELS} - {"cifar_efficientnet", "small_resnet"}:
        raise UserError(
            found=f"model.options={settings.options} for {settings.name}, which is not a model of timm",
            expected="small_resnet, cifar_efficientnet or a timm model, to whose constructor the options are passed",
            hint="remove model.options, or choose another model.name",
        )
    if pretrained and settings.name in UNPUBLISHED:
        raise ValueError("there are none")
    if settings.plain_cnn:
        return make_plain_cnn(settings.plain_cnn, channels, classes, settings.drop_rate)
    if settings.name == SMALL_CNN:
        return three_block_cnn(channels, classes, settings.drop_rate)
    if settings.name in RESNET_BLOCKS:
        return resnet_cifar(RESNET_BLOCKS[settings.name], channels, classes, settings.drop_rate)
    if settings.name == "squeezenet1_1":
        from trainer.models.squeezenet import WEIGHTS_URL, squeezenet1_1

        if pretrained and not Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_URL.rpartition("/")[2]).exists():
            _check_reachable(WEIGHTS_URL)
        return squeezenet1_1(channels, classes, settings.drop_rate, pretrained)
    try:
        if settings.name == "small_resnet":
            return small_resnet(channels, classes, settings.drop_rate, **settings.options)
        if settings.name == "cifar_efficientnet":
            from trainer.models.efficientnet_cifar import efficientnet_cifar

            return efficientnet_cifar(settings, channels, classes)
        return _timm_model(settings, channels, classes, pretrained)
    except (TypeError, ValueError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError) as error:
        # Published weights that do not fit other options than the size count as not available.
        options = {"img_size"} & {*settings.options} if pretrained else settings.options
        if isinstance(error, RuntimeError) and not options:
            raise
        raise UserError(
            found=f"model.name={settings.name}, which does not take some settings: {first_line(error)}",
            expected="arguments that the constructor of the network takes"
            if settings.options
            else "a timm model with in_chans, num_classes, drop_rate and, for model.drop_path_rate, drop_path_rate",
            hint="change model.options or data.resolution"
            if settings.options
            else "model.drop_path_rate=0"
            if settings.drop_path_rate
            else "choose another model.name",
        ) from None


def _timm_model(settings: ModelConfig, channels: int, classes: int, pretrained: bool) -> tuple[nn.Module, int]:
    import timm

    if not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, [*BUILTIN_MODELS, *timm.list_models()], n=3)
        raise UserError(
            found=f"model.name={settings.name}",
            expected=f"{', '.join(BUILTIN_MODELS)} or a timm model",
            hint=f"did you mean {' or '.join(near)}?" if near else 'python -c "import timm; print(timm.list_models())"',
        )
    model: Any = timm.create_model(
        settings.name,
        pretrained=pretrained,
        pretrained_cfg_overlay=_published_weights(settings.name) if pretrained else None,
        in_chans=channels,
        num_classes=classes,
        drop_rate=0.0 if settings.head_hidden else settings.drop_rate,  # our head has its own dropout
        # timm drops options that are None; models without residual branches do not take this one.
        drop_path_rate=settings.drop_path_rate or None,
        **settings.options,
    )
    # `num_features` is the width before the layers of a head such as MobileNetV3's or VGG's.
    return model, model.head_hidden_size


def pretrained_license(name: str) -> str | None:
    """Return the license of a model's published weights according to timm; None if timm does not state one."""
    published = _published(name)
    return published.license if published is not None else None


def _published(name: str) -> Any:
    """Return timm's description of a model's published weights; None for an unknown model or one without weights."""
    import timm

    return timm.get_pretrained_cfg(name) if timm.is_model(name) else None


def _weights_url(name: str) -> str | None:
    """Return the address of a timm model's published weights; None if there are none."""
    published = _published(name)
    if published is None:
        return None
    if published.hf_hub_id:
        return f"https://huggingface.co/{published.hf_hub_id}/resolve/main/model.safetensors"
    return published.url if isinstance(published.url, str) and published.url else None


def _set_stem_stride(model: Any, name: str) -> None:
    builtin = {"first_conv": {"squeezenet1_1": "features.0", "small_resnet": "stem.0"}.get(name)}
    stem_name = getattr(model, "pretrained_cfg", builtin).get("first_conv")
    stem = model.get_submodule(stem_name) if isinstance(stem_name, str) and stem_name else None
    if not isinstance(stem, nn.Conv2d) or stem.stride != (2, 2):
        raise UserError(
            found=f"model.stem_stride=1 for {name}"
            + (f", whose first convolution has stride {stem.stride[0]}" if isinstance(stem, nn.Conv2d) else ""),
            expected="a timm model whose first layer is a convolution of stride 2, such as an EfficientNet",
            hint="remove model.stem_stride, or choose another model.name",
        )
    stem.stride = (1, 1)


def _published_weights(name: str) -> dict[str, Any] | None:
    """Return the file of a timm model's published weights in the cache of the hub; None to download them.

    Raises:
        ValueError: There are none.
        OSError: They are not in the cache, and there is no network.
    """
    import huggingface_hub

    published = _published(name)
    if published is None or not published.has_weights:
        raise ValueError("there are none")
    if published.hf_hub_id is None:
        return None
    cached = huggingface_hub.try_to_load_from_cache(published.hf_hub_id, "model.safetensors")
    if isinstance(cached, str):
        return {"file": cached}
    _check_reachable(huggingface_hub.constants.ENDPOINT)
    return None


def _check_reachable(url: str) -> None:
    """Fail at once without a network; the hub's client would retry for half a minute."""
    if not urllib.request.getproxies():
        parts = urllib.parse.urlsplit(url)
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        socket.create_connection(address, timeout=_CONNECT_TIMEOUT).close()
