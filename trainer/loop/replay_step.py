"""Replay a saved training step whose loss or gradient is not finite.

    python -m trainer.loop.replay_step runs/NAME/DATE/nonfinite/epoch-2-step-17.pt

The command lists the layers where the value arises. The file holds the inputs of the step. `shares` has the batch of
each rank: images (float32 [n, C, H, W], the model input before mixup), labels and rows (int64 [n]). `model` holds the
weights, and `weights` describes them. Further keys are `config`, `class_weights`, `logit_shift`, `logit_bias`, `epoch`
and `step` (from 0). `torch.load(FILE, weights_only=True)` reads it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.common.device import choose_device
from shards.cli import command_parser, run_command
from shards.errors import errors_as_corrupt
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.trained_model import load_model
from trainer.config.load import validate
from trainer.loop.engine import compute_loss, mix_batch
from trainer.models.precision import autocast
from trainer.models.transfer import freeze, set_training_mode
from trainer.optim.distillation import DistillationTeacher


def replay_step(state: dict[str, Any], rank: int, device: torch.device) -> tuple[float, list[str]]:
    """Replay one rank's part of a saved step, up to the gradients.

    Args:
        state: Contents of the file.
        rank: The rank.
        device: Device of the model.

    Returns:
        The loss, summed over the samples, and the names of non-finite values: outputs of layers in the order of
        computation, then gradients of parameters.
    """
    config, classes = validate(state["config"], "the saved step"), state["classes"]
    model = load_model(state["model"], config, state["channels"], len(classes), device)
    freeze(model, config.model)
    set_training_mode(model)
    batch = {name: tensor.to(device) for name, tensor in state["shares"][rank].items()}
    nonfinite: list[str] = []

    def check(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            nonfinite.append(name)

    def check_output(name: str, module: nn.Module, inputs: object, output: object) -> None:
        check(f"output of {name} ({type(module).__name__})", output)

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(functools.partial(check_output, name))
    images, targets, _ = mix_batch(
        config, state["epoch"], state["step"], rank, batch["images"], batch["labels"], len(classes)
    )
    check("images", images)
    with autocast(config.trainer, device):
        logits = model(images)
    shift, weights = state["logit_shift"].to(device), state["class_weights"].to(device)
    teacher = None
    if config.distillation.teacher:
        height, width = images.shape[2:]
        statistics = {(height, width): (state["mean"], state["std"])}
        logit_bias = np.array(state["logit_bias"], np.float32)
        teacher = DistillationTeacher(config, tuple(classes), statistics, logit_bias, device)
    loss = compute_loss(logits, targets, images, shift, weights, teacher, config.loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        check(f"gradient of {name}", parameter.grad)
    return float(loss.detach()), nonfinite


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.loop.replay_step", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="file that the run saved under nonfinite/")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the model")
    arguments = parser.parse_args()
    state = checkpoint.load(arguments.file, needed=("config", "weights", "shares"))
    device = choose_device(arguments.device, 0, 1)
    with errors_as_corrupt(arguments.file, checkpoint.HINT):
        print(f"epoch {state['epoch'] + 1} step {state['step'] + 1}, weights {state['weights']}, on {device}")
        for rank, batch in enumerate(state["shares"]):
            loss, nonfinite = replay_step(state, rank, device)
            print(f"rank {rank}: rows {', '.join(map(str, batch['rows'].tolist()))}")
            print(
                f"  loss {loss / len(batch['rows']):.6g}; " + ("not finite:" if nonfinite else "all values are finite")
            )
            for name in nonfinite:
                print(f"    {name}")
    return 0


if __name__ == "__main__":
    run_command(main)
