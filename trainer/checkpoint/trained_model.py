"""A trained model for inference: the contents of `best.pt`, and the network built from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shards import Manifest, UserError
from shards.errors import CorruptError, errors_as_corrupt, printable, quote
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint import run_files
from trainer.checkpoint.compat import list_classes
from trainer.config.load import validate
from trainer.config.schema import Config
from trainer.models.ensemble import Ensemble
from trainer.models.factory import check_resolutions, make_model
from trainer.models.precision import memory_format


@dataclass(frozen=True)
class TrainedModel:
    """Weights of the best epoch, and the settings and statistics that inference needs."""

    weights: dict[str, torch.Tensor]
    """State dict of the network; the moving average of the weights if the run had one. Empty for an ensemble."""
    config: Config
    classes: tuple[str, ...]
    data_identity: str
    """The concatenated `Manifest.identity()` of the splits of the run's data set."""
    image_shape: tuple[int | None, int | None, int]
    """Height, width and channels of a raw image; None for image files of any size."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Input statistics [channels], of pixels scaled to 0 .. 1."""
    adapter_state: dict[str, Any]
    """State of the adapter that converts other pictures to the format of the data set."""
    epoch: int
    """The epoch of the weights, from 1."""
    tau: float
    offsets: NDArray[np.float32]
    """float32 [C], subtracted from the logits."""
    temperature: float = 1.0
    """Divides the logits before the softmax."""
    logit_bias: NDArray[np.float32] | None = None
    """float32 [C], log of the weights that sampling and loss give the classes; None in a file of an earlier version."""
    members: tuple[TrainedModel, ...] = ()
    """The models of an ensemble, which have the same input and classes."""

    @classmethod
    def load(cls, path: Path) -> TrainedModel:
        """Read a `best.pt`.

        Raises:
            UserError: The file is missing, damaged or not such a checkpoint.
        """
        state = checkpoint.load(path, needed=("config", "input_adapter"))
        trained = cls._of(state, path)
        return replace(trained, members=tuple(cls._of(member, path) for member in state.get("members", [])))

    @classmethod
    def _of(cls, state: Any, path: Path) -> TrainedModel:
        """Return the model that `state_dict` describes, without members. `path` is the file, for messages."""
        with errors_as_corrupt(path, checkpoint.HINT):
            run_files.check(run_files.BestCheckpoint, state)
            channels, classes = state["image_shape"][2], len(state["classes"])
            logit_bias = state.get("logit_bias")
            by_class = [state["offsets"]] if logit_bias is None else [state["offsets"], logit_bias]
            if not channels == len(state["mean"]) == len(state["std"]) or {classes} != set(map(len, by_class)):
                raise ValueError("statistics or offsets of another number of channels or classes")
        return cls(
            weights=state["model"],
            config=validate(state["config"], str(path)),
            classes=tuple(map(printable, state["classes"])),
            data_identity=state["data"],
            image_shape=tuple(state["image_shape"]),
            mean=tuple(state["mean"]),
            std=tuple(state["std"]),
            adapter_state=state["input_adapter"],
            epoch=state["epoch"],
            tau=state["tau"],
            offsets=np.array(state["offsets"], np.float32),
            temperature=state["temperature"],
            logit_bias=None if logit_bias is None else np.array(logit_bias, np.float32),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, as `best.pt` holds them."""
        return {
            "model": self.weights,
            "config": self.config.model_dump(mode="json"),
            "recipe": self.config.recipe(),
            "classes": list(self.classes),
            "data": self.data_identity,
            "image_shape": list(self.image_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "input_adapter": self.adapter_state,
            "epoch": self.epoch,
            "tau": self.tau,
            "offsets": self.offsets.tolist(),
            "temperature": self.temperature,
            "logit_bias": None if self.logit_bias is None else self.logit_bias.tolist(),
            **({"members": [member.state_dict() for member in self.members]} if self.members else {}),
        }

    @property
    def channels(self) -> int:
        return self.image_shape[2]

    def posthoc_kwargs(self) -> dict[str, Any]:
        """Return offsets (float32 [C]) and temperature, the keyword arguments of `evaluate` and `ProbabilityHead`."""
        return {"offsets": self.offsets, "temperature": self.temperature}

    def check_classes(self, manifest: Manifest, name: str) -> None:
        """Raise `UserError` if a data set, called `name` in the message, has other classes."""
        if manifest.classes != self.classes:
            raise UserError(
                found=f"{name} with classes {list_classes(manifest.classes, self.classes)}",
                expected=f"the classes of the run: {list_classes(self.classes, manifest.classes)}",
                hint="name a packed data set with the same classes",
            )

    def build_model(self, device: torch.device) -> nn.Module:
        """Return the network with these weights, on a device."""
        if self.members:
            networks = [member.build_model(device) for member in self.members]
            offsets, temperatures = zip(*((each.offsets, each.temperature) for each in self.members), strict=True)
            return Ensemble(networks, offsets, temperatures).to(device)
        return load_model(self.weights, self.config, self.channels, len(self.classes), device)


def load_model(
    weights: dict[str, torch.Tensor], config: Config, channels: int, classes: int, device: torch.device
) -> nn.Module:
    """Build the network of a run and load its weights.

    Args:
        weights: State dict.
        config: Settings of the run. Its pretrained or initial weights are not loaded.
        channels: Channels of the model input.
        classes: Number of classes.
        device: Device of the network.

    Raises:
        UserError: The weights are those of another network, or it does not take images of the final resolution.
    """
    settings = config.model.without_weights()
    model = make_model(settings, channels, classes, resolution=config.data.final_resolution)
    try:
        model.load_state_dict(weights)
    except Exception as error:  # RuntimeError for shapes, others for values that are no weights
        raise CorruptError(
            found=f"weights that do not fit model.name={settings.name}: {' '.join(str(error).split())}",
            expected="the weights of that network, with these classes and channels",
            hint=checkpoint.HINT,
        ) from None
    check_resolutions(model, settings.name, channels, [config.data.final_resolution])
    return model.to(device).to(memory_format=memory_format(config.trainer))


def check_run_is_first(run_dir: Path, others: Sequence[str]) -> None:
    """Raise `UserError` if the arguments of a command are swapped: another one is the run directory."""
    if not (run_dir / "checkpoints").is_dir():
        for other in others:
            if (Path(other) / "checkpoints" / checkpoint.BEST).is_file():
                raise UserError(
                    found=f"{run_dir}, which is no run directory, before {other}, which is one",
                    expected="the run directory first",
                    hint=f"exchange them: {quote(other)} {quote(run_dir)}",
                )


def load_trained_model(run_dir: Path) -> TrainedModel:
    """Load the best epoch of a run directory.

    Raises:
        UserError: The directory holds no best checkpoint.
    """
    return TrainedModel.load(run_dir / "checkpoints" / checkpoint.BEST)
