"""Find a learning rate by a range test: steps with growing rates.

    python -m trainer.loop.find_lr configs/byclass_cpu.yaml [key=value ...] [--out DIR]

The command trains a recipe for some steps, in each of which the learning rate is higher than in the one before (Smith
2017, https://arxiv.org/abs/1506.01186). It suggests the rate at which the loss falls fastest, and writes `find-lr.json`
and `find-lr.svg`. No run is written.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.loader import Batch
from shards.atomic import created_directory, replace_file, write_file
from shards.cli import command_parser, run_command
from shards.errors import UserError
from trainer.config import load as config
from trainer.config.base import add_recipe_arguments
from trainer.data.training_data import open_data
from trainer.loop import engine
from trainer.loop.state import Training, make_training
from trainer.models.auto import resolve_auto
from trainer.models.transfer import set_training_mode
from trainer.runtime.distributed import init_single_process

_RESULT, _PLOT = "find-lr.json", "find-lr.svg"
_DIVERGED = 4  # times the lowest loss
_MAX_STEPS = 10_000
_SMOOTHING = 1 / 40  # std of the Gaussian, as a fraction of the steps
_RADIUS = 9  # in std; beyond it, the weights of the Gaussian are below the rounding of a float64
_CHECKS = 200  # of the divergence, because smoothing takes longer the more steps there are
# The range test replaces the schedule; an average of the weights is not evaluated.
_SETTINGS = {"schedule": {"name": "constant"}, "trainer.ema_decay": None, "trainer.minutes": None}


@dataclass(frozen=True)
class RangeTest:
    """The result of a learning-rate range test."""

    lr: list[float]
    loss: list[float]
    """Training loss of the step with each rate."""
    smoothed: list[float]
    suggestion: float
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate."""


def range_test(step: Callable[[float], float], lowest: float, highest: float, steps: int) -> RangeTest:
    """Train with rates that grow exponentially, until the loss diverges or the highest rate is reached.

    Divergence is looked for at most 200 times.

    Args:
        step: Takes a training step with a learning rate; returns the loss before it.
        lowest: First rate.
        highest: Last rate.
        steps: Number of rates.

    Raises:
        UserError: The loss does not fall.
    """
    rates = np.geomspace(lowest, highest, steps)
    losses: list[float] = []
    for rate in rates.tolist():
        losses.append(step(rate))
        if not np.isfinite(losses[-1]):
            losses.pop()
            break
        if len(losses) % -(-steps // _CHECKS) == 0:
            smoothed = smooth(np.array(losses), steps * _SMOOTHING)
            if smoothed[-1] > _DIVERGED * smoothed.min():
                break
    count = len(losses)
    smoothed = smooth(np.array(losses), steps * _SMOOTHING) if losses else np.zeros(0)
    slope = np.gradient(smoothed, np.log(rates[:count])) if count > 1 else np.zeros(1)
    steepest = int(slope[: int(smoothed.argmin()) + 1].argmin()) if count > 1 else 0
    if slope[steepest] >= 0:
        raise UserError(
            found=f"a loss that does not fall in {count} steps from a learning rate of {lowest:g} on",
            expected="a loss that falls before it diverges",
            hint="choose a smaller --lowest, or check the labels with python -m pipeline.preview",
        )
    return RangeTest(rates[:count].tolist(), losses, smoothed.tolist(), float(rates[steepest]))


def smooth(losses: NDArray[np.float64], std: float) -> NDArray[np.float64]:
    """Smooth losses [N] by a Gaussian around each, which does not shift the curve as a moving average of past ones."""
    radius = math.ceil(_RADIUS * std)
    weights = np.exp(-((np.arange(-radius, radius + 1) / std) ** 2) / 2)
    values = np.minimum(losses, 2 * _DIVERGED * losses[:1])
    sums, totals = (np.convolve(each, weights)[radius : radius + len(losses)] for each in (values, values**0))
    return sums / totals


def make_step(training: Training, batches: Iterator[Batch]) -> Callable[[float], float]:
    """Return a function that takes an optimizer step with a learning rate and returns the mean loss of its samples."""
    accumulation = training.config.optim.grad_accumulation

    def step(rate: float) -> float:
        for group in training.state.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        loss, samples = 0.0, 0
        for number in range(accumulation):
            batch = next(batches)
            loss += float(engine.train_step(training, batch, accumulation, number + 1 == accumulation))
            samples += len(batch.labels)
        return loss / samples

    return step


def endless_batches(training: Training) -> Generator[Batch, None, None]:
    """Iterate over the batches of one epoch after another."""
    while True:
        with contextlib.closing(training.data.train.batches(training.state.epoch)) as batches:
            yield from batches
        training.state.epoch += 1


def write_plot(path: Path, result: RangeTest) -> None:
    """Draw the loss over the learning rate as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="training loss", xscale="log")
    axes.plot(result.lr, result.loss, color="0.75", linewidth=1, label="loss")
    axes.plot(result.lr, result.smoothed, label="smoothed")
    axes.axvline(result.suggestion, linestyle=":", color="black", label=f"steepest descent, {result.suggestion:.2g}")
    axes.set_ylim(min(result.smoothed) * 0.9, max(result.smoothed) * 1.1)
    axes.legend()
    with replace_file(path) as file:
        figure.savefig(file, format="svg")


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.loop.find_lr", __doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--lowest", type=float, default=1e-6, metavar="LR", help="first learning rate (default: 1e-6)")
    parser.add_argument("--highest", type=float, default=10.0, metavar="LR", help="last learning rate (default: 10)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="number of rates (default: 100)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the result (default: runs/find-lr/NAME)")
    arguments = parser.parse_intermixed_args()
    if not 0 < arguments.lowest < arguments.highest < math.inf or not 2 <= arguments.steps <= _MAX_STEPS:
        raise UserError(
            found=f"--lowest {arguments.lowest:g} --highest {arguments.highest:g} --steps {arguments.steps}",
            expected=f"finite rates, 0 < lowest < highest, and 2 .. {_MAX_STEPS:,} steps",
            hint="remove the options to use their defaults",
        )
    settings = config.load(arguments.config, arguments.overrides)
    directory = arguments.out or Path("runs/find-lr") / settings.run.name
    reason = "the loss does not depend on the number of ranks"
    with created_directory(directory), init_single_process(settings.device, reason) as world:
        settings = config.replace_settings(resolve_auto(settings, world.device), _SETTINGS, "find_lr")
        training = make_training(settings, open_data(settings, world), world)
        set_training_mode(training.forward)
        with contextlib.closing(endless_batches(training)) as batches:
            step = make_step(training, batches)
            result = range_test(step, arguments.lowest, arguments.highest, arguments.steps)
        write_file(directory / _RESULT, json.dumps(asdict(result), indent=1) + "\n")
        write_plot(directory / _PLOT, result)
    print(f"{len(result.lr)} steps, learning rate {result.lr[0]:.2g} .. {result.lr[-1]:.2g}")
    head = ""
    if settings.optim.head_lr is not None:  # the test kept its ratio to optim.lr
        head = f" optim.head_lr={result.suggestion * settings.optim.head_lr / settings.optim.lr:.2g}"
    print(f"suggestion  optim.lr={result.suggestion:.2g}{head} (the loss falls fastest)")
    print(f"plot        {directory / _PLOT}")
    return 0


if __name__ == "__main__":
    run_command(main)
