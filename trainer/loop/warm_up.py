"""Warm-up before the first epoch: compilation, CUDA graphs and the choice of kernels, on synthetic batches."""

from __future__ import annotations

import time

import torch

from pipeline.loader import Batch
from pipeline.sampler import equal_batch_size
from trainer.loop.engine import forward_backward
from trainer.loop.state import Training
from trainer.models.compile import compile_mode
from trainer.models.transfer import set_training_mode
from trainer.runtime.profiler import Profile

_STEPS = 3  # CUDA graphs run the first call as it is, record the second and replay from the third on


def warm_up(training: Training) -> float:
    """Run forward and backward passes at each resolution that follows, on a GPU or if the model is compiled.

    Weights, buffers, optimizer and random numbers are afterwards as before. With several ranks, gradients are reduced.

    Returns:
        The seconds that it took; 0 if there was nothing to do.
    """
    state, world, data = training.state, training.world, training.data
    if world.device.type != "cuda" and compile_mode(training.config.trainer, world.device) == "off":
        return 0.0
    start = time.perf_counter()
    profile, training.profile = training.profile, Profile()
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    current = data.train.stage_at(state.epoch)
    set_training_mode(training.forward)
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        for stage in (stage for stage in data.train.stages if stage.first >= current.first):
            size = equal_batch_size(len(data.train.samples), stage.batch_size)
            count = size * (world.rank + 1) // world.size - size * world.rank // world.size
            shape = (count, data.spec.image_shape[2], *stage.input_size)
            labels = torch.zeros(count, dtype=torch.int64, device=world.device)
            batch = Batch(torch.rand(shape, device=world.device), labels, labels, step=0, global_size=size)
            for _ in range(_STEPS):
                forward_backward(training, batch, 1, is_last_microbatch=True)
                state.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    training.profile = profile
    training.profile.mark("warm-up")
    return time.perf_counter() - start
