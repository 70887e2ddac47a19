"""Replay the training step that ended a run with a loss or gradient that is not finite, and list where it arises.

    python -m trainer.loop.replay_step runs/NAME/DATE/nonfinite/epoch-2-step-17.pt

The file holds the inputs of the step: under `shares` each rank's images (float32 [n, C, R, R], the model input before
mixup), labels and rows (int64 [n]); under `model` the weights, which `weights` describes; and `config`,
`class_weights`, `logit_shift`, `epoch` and `step` (from 0). `torch.load(FILE, weights_only=True)` reads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.common.device import choose_device
from shards.cli import program_name, run_command
from trainer.checkpoint import io as checkpoint
from trainer.config.load import validate
from trainer.config.schema import Config
from trainer.models.factory import make_model
from trainer.models.precision import autocast, memory_format, to_memory_format
from trainer.optim.distillation import load_teacher
from trainer.optim.losses import weighted_kl
from trainer.optim.mixup import apply_mixup_cutmix, soft_targets
from trainer.runtime.seeding import seed_step

_NEEDED = (
    *("config", "model", "weights", "class_weights", "logit_shift", "channels", "mean", "std"),
    *("classes", "epoch", "step", "shares"),
)


def replay_step(state: dict[str, Any], rank: int, device: torch.device) -> tuple[float, list[str]]:
    """Replay one rank's share of a saved step, up to the gradients.

    Returns:
        The loss, summed over the samples; and what is not finite: outputs of layers in the order of computation, then
        gradients of parameters.
    """
    config = validate(state["config"], "the saved step")
    model = _model(state, config, device)
    share = {name: tensor.to(device) for name, tensor in state["shares"][rank].items()}
    found: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(_output_hook(f"output of {name} ({type(module).__name__})", found))
    draws = seed_step(config.seed, state["epoch"], state["step"], rank)
    targets = soft_targets(share["labels"], len(state["classes"]), config.loss.label_smoothing)
    images, targets = apply_mixup_cutmix(
        share["images"], targets, config.mixup.at(state["epoch"], config.trainer.epochs), draws
    )
    if not images.isfinite().all():
        found.append("images")
    with autocast(config.trainer, device):
        logits = model(to_memory_format(images, config.trainer))
    logits = logits + state["logit_shift"].to(device)
    weights = state["class_weights"].to(device)
    loss = weighted_kl(logits, targets, weights)
    teacher = load_teacher(config, tuple(state["classes"]), state["mean"], state["std"], device)
    if teacher is not None:
        loss = teacher.distillation_loss(loss, logits, images, weights)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"gradient of {name}")
    return float(loss.detach()), found


def _model(state: dict[str, Any], config: Config, device: torch.device) -> nn.Module:
    settings = config.model.model_copy(update={"pretrained": False, "init_checkpoint": None})
    model = make_model(settings, state["channels"], len(state["classes"]))
    model.load_state_dict(state["model"])
    return model.to(device, memory_format=memory_format(config.trainer)).train()


def _output_hook(what: str, found: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.append(what)

    return hook


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("trainer.loop.replay_step"),
        description="Replay a saved training step whose loss or gradient was not finite.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what the run saved under nonfinite/")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    arguments = parser.parse_args()
    state = checkpoint.load(arguments.file, needed=_NEEDED)
    device = choose_device(arguments.device, 0, 1)
    print(f"epoch {state['epoch'] + 1} step {state['step'] + 1}, weights {state['weights']}, on {device}")
    for rank, share in enumerate(state["shares"]):
        loss, found = replay_step(state, rank, device)
        print(f"rank {rank}: rows {', '.join(map(str, share['rows'].tolist()))}")
        print(f"  loss {loss / len(share['rows']):.6g}; " + ("all is finite here" if not found else "not finite:"))
        for what in found:
            print(f"    {what}")
    return 0


if __name__ == "__main__":
    run_command(main)
