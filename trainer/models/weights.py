"""Load the weights of a run, of timm, of DistributedDataParallel, torch.compile or Lightning into a model."""

from __future__ import annotations

import logging
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.readers.naming import some_of
from shards.atomic import check_zip
from shards.errors import CorruptError, NotFoundError, UserError, errors_as_corrupt, first_line, quote

log = logging.getLogger(__name__)

# Keys under which training scripts store a state dict; the first one counts, averaged weights before others.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module", "net", "weights")
_WRAPPERS = {"module", "_orig_mod"}  # of DistributedDataParallel and torch.compile
_BEST = "checkpoints/best.pt"  # in a run directory

StateDict = dict[str, torch.Tensor]


def load_weights(model: nn.Module, path: Path, class_names: Sequence[str] = (), random_stem: str | None = None) -> None:
    """Load a state dict.

    Prefixes of wrappers are removed. The first convolution is adapted to the channels of the images, and position
    embeddings to the number of patches. If the classes differ, the classifier keeps the rows of classes with the same
    name, and other rows keep their random weights.

    Args:
        model: The model.
        path: A .safetensors file, a file of `torch.save`, or a checkpoint of a run. Only a checkpoint has class names.
        class_names: Names of the model's classes; empty if unknown.
        random_stem: Name of a convolution that keeps its random weights if the file has those of RGB images; None to
            adapt them.

    Raises:
        UserError: The file cannot be read, or tensors other than the classifier do not fit.
    """
    with errors_as_corrupt(path, "choose another file for model.init_checkpoint"):
        _load(model, path, class_names, random_stem)


def _load(model: nn.Module, path: Path, class_names: Sequence[str], random_stem: str | None) -> None:
    state, checkpoint_names = _read(path)
    own: StateDict = model.state_dict()
    state = _rename(state, own, path)
    stem = state.get(f"{random_stem}.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[1] == 3:
        state |= {name: tensor for name, tensor in own.items() if name.startswith(f"{random_stem}.")}
        log.warning("model.init_checkpoint=%s: %s starts from random weights (model.gray_input)", path, random_stem)
    state = _adapt_channels(state, own, path)
    classifier = classifier_tensors(model)
    if any(name not in classifier for name in _misfits(state, own)):
        state = _apply_timm_filter(model, state, own)
    state = _map_classifier(own, state, classifier, path, class_names, checkpoint_names)
    missing = [name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked")]
    faults = {
        "missing": missing,
        "unexpected": state.keys() - own.keys(),
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ],
    }
    if any(faults.values()):
        raise CorruptError(
            found=f"weights in {path} that do not fit: "
            + "; ".join(f"{len(names)} {fault} ({some_of(sorted(names))})" for fault, names in faults.items() if names),
            expected=f"the {len(own)} tensors of this {type(model).__name__}",
            hint="set model.name to the network of the file",
        )
    model.load_state_dict(state, strict=False)


class _Ignored:
    """Takes the place of an object in a checkpoint that is neither a tensor nor a plain value. It runs no code."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read(path: Path) -> tuple[StateDict, Sequence[str]]:
    """Read a file; returns its state dict and, of a checkpoint of a run, the class names."""
    if (best := path / _BEST).is_file():
        raise UserError(
            found=f"model.init_checkpoint={path}, a run directory",
            expected="a file of weights",
            hint=quote(f"model.init_checkpoint={best}"),
        )
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        if zipfile.is_zipfile(path):
            check_zip(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), ()
        content = _load_without_code(path)
    except FileNotFoundError:
        raise NotFoundError(
            found=f"no such file: {path}", expected="a file of weights (model.init_checkpoint)", hint="check the path"
        ) from None
    except Exception as error:  # the readers raise many types of exceptions
        raise UserError(
            found=f"weights in {path} that cannot be read: {first_line(error)}",
            expected="a .safetensors file, or a file that torch.save wrote",
            hint="save the weights again: torch.save(model.state_dict(), FILE)",
        ) from None
    is_checkpoint = isinstance(content, dict) and {"model", "classes"} <= content.keys()
    if is_checkpoint and content.get("members"):
        raise UserError(
            found=f"{path}, an ensemble of {len(content['members'])} networks",
            expected="the weights of one network (model.init_checkpoint)",
            hint=f"name best.pt of one of its runs, or set {quote(f'distillation.teacher={path}')}",
        )
    state: Any = content
    if is_checkpoint:
        # Before the first validation, the average of a schedule-free optimizer holds the initial weights.
        averaged = content.get("ema") if content.get("epoch") else None
        state = averaged or content["model"]
    while isinstance(state, dict) and not _is_state_dict(state):
        state = next((state[name] for name in _CONTAINERS if isinstance(state.get(name), dict)), None)
    if state is None or not isinstance(state, dict):
        raise UserError(
            found=f"no weights in {path}"
            + (", which holds a pickled model, whose code is not run" if isinstance(content, _Ignored) else ""),
            expected=f"a state dict, or a dictionary with one under {', '.join(_CONTAINERS)}",
            hint="save the weights: torch.save(model.state_dict(), FILE)",
        )
    return dict(state), content["classes"] if is_checkpoint else ()


def _load_without_code(path: Path) -> Any:
    """Load a file of `torch.save`; objects of other classes than tensors and plain values become `_Ignored`."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before torch 1.6
        unknown = ["argparse.Namespace"]
    allowed: list[Any] = [(OrderedDict if name.endswith("Dict") else _Ignored, name) for name in unknown]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_state_dict(values: dict[Any, Any]) -> bool:
    return bool(values) and all(isinstance(value, torch.Tensor) for value in values.values())


def _rename(state: StateDict, own: StateDict, path: Path) -> StateDict:
    """Remove the prefixes of wrappers, as in `module._orig_mod.conv.weight`, and of a module that holds the model."""
    if not any(_WRAPPERS & set(name.split(".")) for name in own):
        state = {".".join(part for part in name.split(".") if part not in _WRAPPERS): state[name] for name in state}
    prefixes: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        prefixes.update(".".join(parts[:start]) for start in range(len(parts)) if ".".join(parts[start:]) in own)
    inside = sum(f"backbone.{name}" in own for name in state)  # of a network that gets a head of ours
    prefix, count = max(prefixes.items(), key=lambda item: item[1], default=("", 0))
    if inside > count:
        return {f"backbone.{name}": tensor for name, tensor in state.items()}
    if not prefix:
        return state
    renamed = {name[len(prefix) + 1 :]: tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}
    others = [name for name in state if not name.startswith(f"{prefix}.")]
    if others:
        log.warning(
            "model.init_checkpoint=%s: not used, as they are outside of %s: %s", path, prefix, some_of(sorted(others))
        )
    return renamed


def _adapt_channels(state: StateDict, own: StateDict, path: Path) -> StateDict:
    """Adapt convolutions of RGB images to gray images or more channels, and those of gray images to RGB."""
    from timm.models import adapt_input_conv

    adapted = {}
    for name in own.keys() & state.keys():
        weight, shape = state[name], own[name].shape
        if weight.shape != shape and weight.ndim == len(shape) == 4 and weight.shape[1] in (1, 3):
            channels = shape[1]
            if weight.shape[1] == 1:
                weight = weight.repeat(1, channels, 1, 1) / channels
            weight = adapt_input_conv(channels, weight) if weight.shape[1] == 3 else weight
            if weight.shape == shape:
                adapted[name] = weight
                log.warning(
                    "model.init_checkpoint=%s: %s is adapted from %d to %d channels",
                    path,
                    name,
                    state[name].shape[1],
                    channels,
                )
    return state | adapted


def _apply_timm_filter(model: nn.Module, state: StateDict, own: StateDict) -> StateDict:
    """Convert weights as timm does for this network: names of the authors, position embeddings of another size."""
    backbone = model.get_submodule("backbone") if "backbone" in dict(model.named_children()) else model
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    prefix = "" if backbone is model else "backbone."
    try:
        inner = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        converted = {f"{prefix}{name}": tensor for name, tensor in convert(inner, backbone).items()}
    except Exception:  # weights of another network
        return state
    return converted if len(_misfits(converted, own)) < len(_misfits(state, own)) else state


def _misfits(state: StateDict, own: StateDict) -> list[str]:
    """Names of the model's tensors that a state dict lacks or has in another shape."""
    return [name for name in own if name not in state or state[name].shape != own[name].shape]


def classifier_layer(model: nn.Module) -> str | None:
    """Return the name of the last linear layer; None if there is none."""
    return next((name for name, layer in reversed([*model.named_modules()]) if isinstance(layer, nn.Linear)), None)


def classifier_name(model: nn.Module) -> str:
    """Return the name of the classifier: the last linear layer, or the last convolution of a network without any."""
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return classifier_layer(model) or (convolutions[-1] if convolutions else "")


def classifier_tensors(model: nn.Module) -> set[str]:
    """Return the names of weight and bias of the classifier, a convolution in some networks; timm may have several."""
    layers = [classifier_name(model)]
    for prefix, network in (("", model), ("backbone.", getattr(model, "backbone", None))):
        published = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
        layers += [f"{prefix}{layer}" for layer in ([published] if isinstance(published, str) else published)]
    return {f"{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias")}


def _map_classifier(
    own: StateDict,
    state: StateDict,
    classifier: set[str],
    path: Path,
    names: Sequence[str],
    checkpoint_names: Sequence[str],
) -> StateDict:
    """Map the classifier of a state dict to the model's classes, if they differ and all else fits."""
    wanted = classifier & own.keys()
    wanted |= {name for name in own if name.startswith("head.") and "backbone" in next(iter(own))}
    has_names = bool(names and checkpoint_names)
    if wanted and not wanted & state.keys() and set(_misfits(state, own)) == wanted:
        log.warning("model.init_checkpoint=%s has no classifier (%s): it starts random", path, some_of(sorted(wanted)))
        kept = {name: tensor for name, tensor in state.items() if name in own or name not in classifier}
        return kept | {name: own[name] for name in wanted}
    wanted &= classifier
    present = wanted & state.keys()
    mismatched = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    same_width = all(own[name].shape[1:] == state[name].shape[1:] for name in present)
    same_classes = list(names) == list(checkpoint_names) if has_names else not mismatched
    if same_classes or not present or not mismatched <= present or not same_width:
        return state
    shared = [name for name in names if name in checkpoint_names] if has_names else []
    rows = [list(names).index(name) for name in shared]
    checkpoint_rows = [list(checkpoint_names).index(name) for name in shared]
    mapped = {name: own[name].clone() for name in present}
    for name, tensor in mapped.items():
        tensor[rows] = state[name][checkpoint_rows].to(tensor)
    log.warning(
        "model.init_checkpoint=%s is for %d classes: the classifier (%s) keeps the rows of %d classes, and %d rows "
        "start from random weights",
        path,
        len(state[min(present)]),
        ", ".join(sorted(present)),
        len(shared),
        len(own[min(present)]) - len(shared),
    )
    return state | mapped
