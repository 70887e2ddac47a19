"""Models by name: timm's, and a small three-block network for small images on a CPU."""

from __future__ import annotations

import difflib
import logging
import socket
import urllib.parse
import urllib.request
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import nn

from shards.errors import UserError, first_line
from trainer.settings import Model

log = logging.getLogger(__name__)

SMALL_CNN = "three_block_cnn"
_SMALL_CNN_CHANNELS = (32, 64, 128)
_SMALL_CNN_FEATURES = 128
_HUB_TIMEOUT = 5.0  # seconds


def make_model(settings: Model, channels: int, classes: int) -> nn.Module:
    """A model of images float [B, channels, R, R] to logits [B, classes].

    Raises `UserError` for an unknown name and for weights that cannot be had or do not fit.
    """
    hidden = settings.head_hidden
    if settings.name == SMALL_CNN:
        if settings.stem_stride is not None:
            raise UserError(
                found=f"model.stem_stride={settings.stem_stride} for {SMALL_CNN}",
                expected="a timm model",
                hint=f"leave it out: the first convolution of {SMALL_CNN} steps by one pixel already",
            )
        backbone: nn.Module = _small_cnn(channels, 0 if hidden else classes, settings.drop_rate)
        features = _SMALL_CNN_FEATURES
    else:
        backbone = _timm_model(settings, channels, 0 if hidden else classes)
        if settings.stem_stride is not None:
            _step_by_one(backbone, settings.name)
        features = backbone.num_features
    model = backbone
    if hidden:
        head = nn.Sequential(
            nn.Dropout(settings.drop_rate), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        model = nn.Sequential(OrderedDict(backbone=backbone, head=head))
    if settings.weights is not None:
        load_weights(model, settings.weights)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a .safetensors file, a .pth file or one of our checkpoints.

    A classifier (the last linear layer) for another number of classes is left out, and the log says so; all else has to
    fit.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state)
        model.load_state_dict(_fitting(model, state, path))
    except FileNotFoundError:
        raise UserError(
            found=f"no file {path}", expected="a file of weights (model.weights)", hint="check the path"
        ) from None
    except Exception as error:  # the readers raise many kinds
        raise UserError(
            found=f"weights in {path} that do not fit: {first_line(error)}",
            expected=f"a state dict of {type(model).__name__} with this number of classes and channels",
            hint="check model.name, or that the file is whole",
        ) from None


def _fitting(model: nn.Module, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A state dict with the model's own classifier where that in it is for another number of classes."""
    own = model.state_dict()
    last = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1:]
    classifier = {f"{name}.{tensor}" for name in last for tensor in ("weight", "bias")} & own.keys() & state.keys()
    differing = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    features = {name: own[name].shape[1:] == state[name].shape[1:] for name in classifier}
    if not differing or not differing <= classifier or not all(features.values()):
        return state
    there, here = (len(tensors[min(classifier)]) for tensors in (state, own))
    log.warning(
        "model.weights=%s is for %d classes: its classifier (%s) is left out, that for %d classes begins anew",
        path,
        there,
        ", ".join(sorted(classifier)),
        here,
    )
    return state | {name: own[name] for name in classifier}


def _small_cnn(channels: int, classes: int, drop_rate: float) -> nn.Sequential:
    """Three blocks of convolution, batch norm, ReLU and pooling; a hidden layer; a classifier.

    channels of the blocks: 32, 64, 128. Images of any size from 8x8 up: the last feature map is pooled to 3x3
    (its size for 28x28 images). classes 0: no classifier, the 128 features come out.
    """
    layers: list[nn.Module] = []
    width = channels
    for number, block_width in enumerate(_SMALL_CNN_CHANNELS):
        layers += [
            nn.Conv2d(width, block_width, 3, padding=1, bias=False),
            nn.BatchNorm2d(block_width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2) if number < 2 else nn.AdaptiveMaxPool2d(3),
        ]
        width = block_width
    layers += [
        nn.Flatten(),
        nn.Linear(9 * width, _SMALL_CNN_FEATURES, bias=False),
        nn.BatchNorm1d(_SMALL_CNN_FEATURES),
        nn.ReLU(inplace=True),
    ]
    if classes:
        layers += [nn.Dropout(drop_rate), nn.Linear(_SMALL_CNN_FEATURES, classes)]
    return nn.Sequential(*layers)


def _timm_model(settings: Model, channels: int, classes: int) -> nn.Module:
    options: dict[str, Any] = {
        "in_chans": channels,
        "num_classes": classes,
        # With a head of our own the dropout stands there.
        "drop_rate": 0.0 if settings.head_hidden else settings.drop_rate,
        "drop_path_rate": settings.drop_path_rate,
    }
    if not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, [SMALL_CNN, *timm.list_models()], n=3)
        raise UserError(
            found=f"model.name={settings.name}",
            expected=f"{SMALL_CNN} or a timm model",
            hint=f"did you mean {' or '.join(near)}?" if near else 'python -c "import timm; print(timm.list_models())"',
        )
    if settings.pretrained and settings.weights is None:
        try:
            return _published(settings.name, options)
        except Exception as error:  # hub libraries raise many kinds: no network, no such weights, a full disk
            reason = first_line(error)
            if settings.pretrained != "auto":
                raise UserError(
                    found=f"no way to fetch the published weights of {settings.name}: {reason}",
                    expected="a network, or the weights in the cache of the Hugging Face hub",
                    hint="model.weights=FILE for weights that you have, or model.pretrained=false to begin without",
                ) from None
            log.warning(
                "model.pretrained=auto: the published weights of %s cannot be fetched here (%s); beginning with "
                "random ones, which needs more epochs for the same accuracy",
                settings.name,
                reason,
            )
    return timm.create_model(settings.name, pretrained=False, **options)


def _step_by_one(model: nn.Module, name: str) -> None:
    """Have a model's first convolution step by one pixel; its weights, and all that follows, stay as they are."""
    place = model.pretrained_cfg.get("first_conv")
    stem = model.get_submodule(place) if isinstance(place, str) and place else None
    if not isinstance(stem, nn.Conv2d) or stem.stride != (2, 2):
        raise UserError(
            found=f"model.stem_stride=1 for {name}"
            + (f", whose first convolution steps by {stem.stride[0]}" if isinstance(stem, nn.Conv2d) else ""),
            expected="a model that begins with a convolution of stride 2, as EfficientNets do",
            hint="leave it out, or choose another model.name",
        )
    stem.stride = (1, 1)


def _published(name: str, options: dict[str, Any]) -> nn.Module:
    """A timm model with its published weights: from the hub's cache, else from the network.

    Without a network the hub's library would try for half a minute; one look at its address says so at once.
    """
    published = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise ValueError("there are none")
    if published.hf_hub_id is None:
        return timm.create_model(name, pretrained=True, **options)
    cached = huggingface_hub.try_to_load_from_cache(published.hf_hub_id, "model.safetensors")
    if isinstance(cached, str):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": cached}, **options)
    if not urllib.request.getproxies():
        hub = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
        address = (hub.hostname, hub.port or (443 if hub.scheme == "https" else 80))
        socket.create_connection(address, timeout=_HUB_TIMEOUT).close()
    return timm.create_model(name, pretrained=True, **options)
