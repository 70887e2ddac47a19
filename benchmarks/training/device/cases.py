"""The cases of the device check, the most valuable first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

Settings = dict[str, Any]
"""Values by the dotted name of a setting."""

RAW_SIDE = 28
"""Side of the synthetic images."""
IMAGE_CHANNELS = "image_channels"
"""A key of settings that is not one of the trainer's: resize with `ImageChannelsTransform`."""
VARIANTS: Mapping[str, Settings] = {
    "dali": {"loader.backend": "dali", "loader.device_cache": 0.0},
    "torch": {"loader.backend": "torch", "loader.device_cache": 0.0},
    "torch, resident": {"loader.backend": "torch", "loader.device_cache": 0.5},
    "dali, resident": {"loader.backend": "dali", "loader.device_cache": 0.5},
    "dali, image channels": {"loader.backend": "dali", "loader.device_cache": 0.0, IMAGE_CHANNELS: True},
}
"""Ways to load batches: backends, with raw images copied per batch or resident in the memory of the GPU."""
AUGMENTED: Settings = {
    "augment.rotation": 15,
    "augment.translation": 0.1,
    "augment.elastic": 0.05,
    "augment.brightness": 0.2,
    "augment.stroke": 1.0,
    "augment.erase": 0.5,
}
_LOOP: Settings = {
    "optim.name": "lion",
    "optim.lr": 1e-4,
    "optim.max_grad_norm": 1.0,
    "mixup.prob": 0.8,
    "mixup.mixup_alpha": 0.2,
    "mixup.cutmix_alpha": 0.6,
    "trainer.ema_decay": 0.999,
}


@dataclass(frozen=True)
class Section:
    """Cases of one kind.

    Attributes:
        name: Method of `DeviceWorker`.
        until: Fraction of the total time at which the section ends, so that it inherits what earlier ones leave.
        cases: Arguments of the method, by the name of the case.
    """

    name: str
    until: float
    cases: Mapping[str, Settings]


@dataclass(frozen=True)
class Scale:
    """Size of the check.

    Attributes:
        images: Images of the synthetic training split.
        variants: Names in `VARIANTS`.
        resolutions: Sides of the model input.
        batches: Batch sizes; the first is that of the step, the loop and the run.
        models: Networks; the first is that of the loop and the run.
        modes: Values of `trainer.compile`, which all networks are measured with.
        seconds: Least time of a measured run.
        runs: Runs of each measurement.
        epochs: Epochs of the short training run.
    """

    images: int
    variants: tuple[str, ...]
    resolutions: tuple[int, ...]
    batches: tuple[int, ...]
    models: tuple[str, ...]
    modes: tuple[str, ...]
    seconds: float
    runs: int
    epochs: int


GPU = Scale(
    images=409_600,  # a multiple of the batch size, as is the half of 95% that is trained on: one size is compiled
    variants=tuple(VARIANTS),
    resolutions=(112, 28),
    batches=(1024, 4096, 512, 2048),
    models=("efficientnet_b2", "efficientnet_b0", "efficientnet_b3"),
    modes=("default", "off", "reduce-overhead"),
    seconds=0.5,
    runs=3,
    epochs=2,
)
TINY = Scale(
    images=320,
    variants=("dali", "torch", "dali, image channels"),
    resolutions=(32,),
    batches=(33,),
    models=("three_block_cnn",),
    modes=("off",),
    seconds=0.02,
    runs=1,
    epochs=1,
)


def make_sections(scale: Scale) -> list[Section]:
    """Return the sections in the order of their worth."""
    size, side, base = scale.batches[0], scale.resolutions[0], scale.models[0]
    variants = [
        (f"{name}, {resolution} px", VARIANTS[name] | {"data.resolution": resolution})
        for resolution, name in product(scale.resolutions, scale.variants)
        if resolution != RAW_SIDE or IMAGE_CHANNELS not in VARIANTS[name]  # nothing is resized
    ]
    loading = {
        f"{name}, batch {batch}": settings | {"loader.batch_size": batch}
        for batch, (name, settings) in product(scale.batches, variants)
    }

    def exact(batch: int) -> dict[str, Settings]:
        return {f"{name}, batch {batch}": settings | {"loader.batch_size": batch} for name, settings in variants}

    usual = min(size, 512)
    augmented = {
        f"{name}, augmented": settings | AUGMENTED | {"loader.batch_size": usual}
        for name, settings in variants
        if IMAGE_CHANNELS not in settings
    }
    # The small batch fills no pack of the DALI backend.
    correctness = exact(usual) | augmented | exact(33)

    def step(model: str, mode: str, batch: int, **more: Any) -> tuple[str, Settings]:
        settings = _LOOP | {"data.resolution": side, "model.name": model, "trainer.compile": mode}
        name = ", ".join(
            [model, f"compile={mode}", f"batch {batch}", *(f"{key}={value}" for key, value in more.items())]
        )
        return name, {**settings, "loader.batch_size": batch, **more}

    steps = dict(
        [
            *(step(base, mode, size) for mode in scale.modes),
            *(step(model, mode, size) for model in scale.models[1:] for mode in scale.modes[:2]),
            *(step(base, "off", batch) for batch in scale.batches[1:]),
            step(base, "off", size, **{"trainer.channels_last": False}),
            *(step(base, scale.modes[0], batch) for batch in scale.batches[1:]),
        ]
    )
    short = {"trainer.epochs": scale.epochs, "data.train_fraction": 0.5, "data.val_fraction": 0.05}
    loops = dict(step(base, mode, size) for mode in scale.modes if mode != "off" or scale.modes == ("off",))
    return [
        Section("device", 0.08, {"bandwidth": {}}),
        Section("correctness", 0.2, correctness),
        Section("loader", 0.4, loading),
        Section("step", 0.75, steps),
        Section("loop", 0.87, dict(list(loops.items())[:1])),
        Section("run", 1.0, {name: case | short for name, case in loops.items()}),
    ]
