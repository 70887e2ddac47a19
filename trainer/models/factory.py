"""Models by name: timm's, and those defined in `trainer.models`."""

from __future__ import annotations

import difflib
import logging
import socket
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from shards.errors import UserError, first_line
from trainer.config.schema import BUILTIN_MODELS, ModelConfig
from trainer.models.lenet_family import make_plain_cnn
from trainer.models.small_cnn import three_block_cnn

T = TypeVar("T")
log = logging.getLogger(__name__)

SMALL_CNN = "three_block_cnn"
_HUB_TIMEOUT = 5.0  # seconds


def make_model(settings: ModelConfig, channels: int, classes: int, names: Sequence[str] = ()) -> nn.Module:
    """A model of images float [B, channels, R, R] to logits [B, classes].

    names: of the classes, by which those that `model.init_checkpoint` knows keep their part of its classifier.
    Raises `UserError` for an unknown name and for weights that cannot be had or do not fit.
    """
    hidden = settings.head_hidden
    repeats = settings.gray_input == "repeated" and channels == 1
    backbone, features = _backbone(settings, 3 if repeats else channels, 0 if hidden else classes)
    if settings.stem_stride is not None:
        _step_by_one(backbone, settings.name)
    if settings.gray_input == "random" and channels == 1:
        _first_convolution(backbone).reset_parameters()
    layers = OrderedDict(backbone=backbone)
    if repeats:
        layers = OrderedDict(repeat=RepeatChannels(3), **layers)
    if hidden:
        layers["head"] = nn.Sequential(
            nn.Dropout(settings.drop_rate), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
    model = nn.Sequential(layers) if len(layers) > 1 else backbone
    if settings.head_init_std is not None:
        _draw_classifier(model, settings.head_init_std, settings.name)
    if settings.init_checkpoint is not None:
        load_weights(model, settings.init_checkpoint, names)
    return model


def has_depthwise_convolutions(settings: ModelConfig) -> bool:
    """Whether a network has convolutions of single channels (depthwise ones), as EfficientNets have.

    Makes the network, with random weights, to look. Raises `UserError` for an unknown name.
    """
    network, _ = _backbone(settings.model_copy(update={"pretrained": False}), channels=3, classes=0)
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return any(layer.groups == layer.in_channels > 1 for layer in convolutions)


def check_sides(model: nn.Module, name: str, channels: int, sides: Iterable[int]) -> None:
    """Raise `UserError` for a side of its input, in pixels, that a model (on the CPU) does not take.

    Many pool until nothing is left of a small image, and some transformers take one size only. What a model takes is
    written down nowhere, so each side is tried with an empty image.
    """
    training = model.training
    model.eval()
    for side in sides:
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, side, side))
        except Exception as error:  # assertions, shapes that do not fit, sizes of 0
            raise UserError(
                found=f"data.resolution={side} for model.name={name}, which says: {first_line(error)}",
                expected="images of a size that the model takes",
                hint="another data.resolution, or another model.name",
            ) from None
    model.train(training)


def load_weights(model: nn.Module, path: Path, names: Sequence[str] = ()) -> None:
    """Load a state dict from a .safetensors file, a .pth file or one of our checkpoints.

    Of a classifier (the last linear layer) for other classes, those rows are kept that a checkpoint of ours has for
    classes of the same name, and the others begin anew; so do all where the classes have no names but another number.
    The log says so; all else has to fit. names: of the model's classes, empty for none.
    """
    known: Sequence[str] = ()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            state = content.get("model", content)
            known = content.get("classes", ()) if "model" in content else ()
        model.load_state_dict(_fitting(model, state, path, names, known))
    except FileNotFoundError:
        raise UserError(
            found=f"no such file: {path}", expected="a file of weights (model.init_checkpoint)", hint="check the path"
        ) from None
    except Exception as error:  # the readers raise many kinds
        raise UserError(
            found=f"weights in {path} that do not fit: {first_line(error)}",
            expected=f"a state dict of {type(model).__name__} with this number of classes and channels",
            hint="check model.name, or that the file is whole",
        ) from None


def _fitting(
    model: nn.Module, state: dict[str, Any], path: Path, names: Sequence[str], known: Sequence[str]
) -> dict[str, Any]:
    """A state dict for a model with classes of these names, from one for the known ones."""
    own = model.state_dict()
    last = _classifier(model)
    classifier = {f"{last}.{tensor}" for tensor in ("weight", "bias")} & own.keys() & state.keys()
    differing = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    features = {name: own[name].shape[1:] == state[name].shape[1:] for name in classifier}
    named = bool(names and known)
    same = list(names) == list(known) if named else not differing
    if same or not classifier or not differing <= classifier or not all(features.values()):
        return state
    shared = [name for name in names if name in known] if named else []
    here, there = ([of.index(name) for name in shared] for of in (list(names), list(known)))
    fitted = {name: own[name].clone() for name in classifier}
    for name, tensor in fitted.items():
        tensor[here] = state[name][there].to(tensor)
    fresh = len(own[min(classifier)]) - len(shared)
    log.warning(
        "model.init_checkpoint=%s is for %d classes: its classifier (%s) keeps %d of them%s",
        path,
        len(state[min(classifier)]),
        ", ".join(sorted(classifier)),
        len(shared),
        f", and begins anew for {fresh} that it does not know" if fresh else "",
    )
    return state | fitted


def _classifier(model: nn.Module) -> str | None:
    """The name of the last linear layer; None for networks that end in a convolution."""
    return next((name for name, layer in reversed([*model.named_modules()]) if isinstance(layer, nn.Linear)), None)


def _draw_classifier(model: nn.Module, std: float, name: str) -> None:
    """Have a model's classifier begin with normal weights of this deviation, and no bias."""
    classifier = _classifier(model)
    if classifier is None:
        raise UserError(
            found=f"model.head_init_std={std} for {name}, which ends in no linear layer",
            expected="a network with a linear classifier",
            hint="leave it out, or choose another model.name",
        )
    layer = model.get_submodule(classifier)
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class RepeatChannels(nn.Module):
    """Gray images as several equal channels, for a network of RGB."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [B, 1, H, W] to [B, channels, H, W], without a copy."""
        return images.expand(-1, self.channels, -1, -1)


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def _backbone(settings: ModelConfig, channels: int, classes: int) -> tuple[nn.Module, int]:
    """A network, and the width of its features, which come out where classes is 0."""
    if settings.name not in BUILTIN_MODELS:
        model = _timm_model(settings, channels, classes)
        return model, model.num_features
    if settings.plain_cnn:
        return make_plain_cnn(settings.plain_cnn, channels, classes, settings.drop_rate)
    if settings.name == SMALL_CNN:
        return three_block_cnn(channels, classes, settings.drop_rate)
    if settings.name == "cifar_efficientnet":
        from trainer.models.efficientnet_cifar import efficientnet_cifar

        return efficientnet_cifar(
            channels,
            classes,
            settings.drop_rate,
            settings.drop_path_rate,
            settings.channel_multiplier,
            settings.depth_multiplier,
        )
    from trainer.models.squeezenet import squeezenet1_1

    return _begin(
        settings,
        published=lambda: _published_squeezenet(channels, classes, settings.drop_rate),
        random=lambda: squeezenet1_1(channels, classes, settings.drop_rate),
    )


def _timm_model(settings: ModelConfig, channels: int, classes: int) -> nn.Module:
    import timm

    options: dict[str, Any] = {
        "in_chans": channels,
        "num_classes": classes,
        # With a head of our own the dropout stands there.
        "drop_rate": 0.0 if settings.head_hidden else settings.drop_rate,
        # timm leaves out what is None; models without shortcuts do not know this one.
        "drop_path_rate": settings.drop_path_rate or None,
    }
    if not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, [*BUILTIN_MODELS, *timm.list_models()], n=3)
        raise UserError(
            found=f"model.name={settings.name}",
            expected=f"{', '.join(BUILTIN_MODELS)} or a timm model",
            hint=f"did you mean {' or '.join(near)}?" if near else 'python -c "import timm; print(timm.list_models())"',
        )
    try:
        return _begin(
            settings,
            published=lambda: _published(settings.name, options),
            random=lambda: timm.create_model(settings.name, pretrained=False, **options),
        )
    except TypeError as error:
        raise UserError(
            found=f"model.name={settings.name}, which does not take some of our settings: {first_line(error)}",
            expected="a timm model with in_chans, num_classes, drop_rate and, for model.drop_path_rate, shortcuts",
            hint="model.drop_path_rate=0" if settings.drop_path_rate else "choose another model.name",
        ) from None


def _begin(settings: ModelConfig, published: Callable[[], T], random: Callable[[], T]) -> T:
    """A network with published weights, where the settings ask for them and they can be had, or with random ones."""
    if not settings.pretrained or settings.init_checkpoint is not None:
        return random()
    try:
        return published()
    except Exception as error:  # hub libraries raise many kinds: no network, no such weights, a full disk
        reason = first_line(error)
        if settings.pretrained != "auto":
            raise UserError(
                found=f"no way to fetch the published weights of {settings.name}: {reason}",
                expected="a network, or the weights in the cache of the hub that they are published on",
                hint="model.init_checkpoint=FILE for weights that you have, or model.pretrained=false to begin without",
            ) from None
        log.warning(
            "model.pretrained=auto: the published weights of %s cannot be fetched here (%s); beginning with "
            "random ones, which needs more epochs for the same accuracy",
            settings.name,
            reason,
        )
    return random()


def pretrained_license(name: str) -> str | None:
    """What timm notes as the licence of a model's published weights; None if it notes none."""
    import timm

    published = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return published.license if published is not None else None


def _step_by_one(model: nn.Module, name: str) -> None:
    """Have a model's first convolution step by one pixel; its weights, and all that follows, stay as they are."""
    place = model.pretrained_cfg.get("first_conv") if name not in BUILTIN_MODELS else None
    stem = model.get_submodule(place) if isinstance(place, str) and place else None
    if not isinstance(stem, nn.Conv2d) or stem.stride != (2, 2):
        raise UserError(
            found=f"model.stem_stride=1 for {name}"
            + (f", whose first convolution steps by {stem.stride[0]}" if isinstance(stem, nn.Conv2d) else ""),
            expected="a timm model that begins with a convolution of stride 2, as EfficientNets do",
            hint="leave it out, or choose another model.name",
        )
    stem.stride = (1, 1)


def _published(name: str, options: dict[str, Any]) -> nn.Module:
    """A timm model with its published weights: from the hub's cache, else from the network.

    Without a network the hub's library would try for half a minute; one look at its address says so at once.
    """
    import huggingface_hub
    import timm

    published = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise ValueError("there are none")
    if published.hf_hub_id is None:
        return timm.create_model(name, pretrained=True, **options)
    cached = huggingface_hub.try_to_load_from_cache(published.hf_hub_id, "model.safetensors")
    if isinstance(cached, str):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": cached}, **options)
    _check_reachable(huggingface_hub.constants.ENDPOINT)
    return timm.create_model(name, pretrained=True, **options)


def _published_squeezenet(channels: int, classes: int, drop_rate: float) -> tuple[nn.Module, int]:
    """SqueezeNet with its published weights: from the cache of torch's hub, else from the network."""
    from trainer.models.squeezenet import PUBLISHED, squeezenet1_1

    if not Path(torch.hub.get_dir(), "checkpoints", PUBLISHED.rpartition("/")[2]).exists():
        _check_reachable(PUBLISHED)
    return squeezenet1_1(channels, classes, drop_rate, published=True)


def _check_reachable(address: str) -> None:
    if not urllib.request.getproxies():
        host = urllib.parse.urlsplit(address)
        place = (host.hostname, host.port or (443 if host.scheme == "https" else 80))
        socket.create_connection(place, timeout=_HUB_TIMEOUT).close()
