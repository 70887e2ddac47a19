"""Detection of losses and gradients that are not finite, without a device synchronization.

A GPU's losses and gradient norms are copied asynchronously and read some steps later. Batches are a function of (seed,
epoch, step), so the batch of a bad step can be loaded again. It is saved for `trainer.loop.replay_step`, and the run
stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.nn.utils import get_total_norm

from shards.errors import UserError, quote
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.run_dir import RunDirectory
from trainer.loop.state import Training

_READ_EVERY = 32  # steps of a GPU
_ROWS_SHOWN = 16


class NonFiniteLossError(UserError):
    """A loss or gradient is not finite; the run cannot continue."""


class NonFiniteStep(Exception):
    """A step of the current epoch has a loss or gradient that is not finite; raised on every rank.

    Args:
        step: Step in the epoch, from 0.
        what: `loss` or `gradient`.
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"{what} of step {step + 1}")
        self.step = step
        self.what = what


class NonFiniteMonitor:
    """Checks the losses of an epoch's steps and the gradients of its updates.

    On a CPU an update is checked before it is applied. On a GPU the values of 32 steps are copied together, without
    waiting, and read when the next 32 are copied. All ranks have the same gradients, so all detect the same update.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        device = training.world.device
        self._on_gpu = device.type == "cuda"
        # Loss, gradient norm, and in fp16 the scale of the loss.
        self._values = torch.zeros(_READ_EVERY if self._on_gpu else 1, 3, device=device)
        self._recorded: list[int] = []
        self._host_values = torch.zeros(self._values.shape, pin_memory=self._on_gpu)
        self._copied: list[int] = []
        self._event = torch.cuda.Event() if self._on_gpu else None
        self._bad_loss: int | None = None
        self._last: int | None = None
        self.last_loss = math.nan
        """The newest loss that has been read, summed over this rank's samples."""
        self.on_read: Callable[[int, float, float], None] = lambda step, loss, gradient_norm: None
        """Called for each step whose values have been read: step in the epoch, loss, gradient norm before clipping."""

    def check_batch(self, step: int, loss: torch.Tensor, is_last_microbatch: bool) -> None:
        """Record a step after its backward pass, before the update.

        Args:
            step: Step in the epoch.
            loss: Scalar on the device.
            is_last_microbatch: Whether the gradients are complete and averaged over the ranks.

        Raises:
            NonFiniteStep: A recorded step is not finite.
        """
        row = self._values[len(self._recorded)]
        row[0] = loss.detach()
        if is_last_microbatch:
            row[1] = self._gradient_norm()
        else:
            row[1].zero_()  # before torch 2.15, `row[1] = 0.0` copies from the CPU and waits
        scaler = self._training.state.scaler
        if scaler.is_enabled():
            row[2] = scaler.scale(torch.ones_like(row[1]))
        self._recorded.append(step)
        self._last = step
        if len(self._recorded) == len(self._values):
            self._copy()
            if not self._on_gpu:
                self._read()

    def finish(self) -> None:
        """Check all recorded steps and the weights, on all ranks. Synchronizes with the device.

        Raises:
            NonFiniteStep: As in `check_batch`.
        """
        self._copy()
        self._read()
        if self._last is not None and not all_finite(self._training.state.model.parameters()):
            self._stop(self._last)

    def _gradient_norm(self) -> torch.Tensor:
        """Return the L2 norm; infinite also above 1.8e19, whose square overflows float32."""
        gradients = [each.grad for each in self._training.state.model.parameters() if each.grad is not None]
        return get_total_norm(gradients)

    def _copy(self) -> None:
        """Check the values that were copied last, and start to copy those recorded since."""
        self._read()
        self._host_values.copy_(self._values, non_blocking=True)
        self._copied, self._recorded = self._recorded, []
        if self._event is not None:
            self._event.record()

    def _read(self) -> None:
        """Check the copied values. On a GPU the copy was started 32 steps ago, so it is complete."""
        if self._event is not None:
            self._event.synchronize()
        copied, self._copied = self._copied, []
        for step, (loss, gradient, scale) in zip(copied, self._host_values.tolist(), strict=False):
            self.last_loss = loss
            self.on_read(step, loss, gradient)
            if self._bad_loss is None and not math.isfinite(loss):
                self._bad_loss = step
            if 0 < gradient < math.inf:  # an update, so an overflow before it was skipped and is not the cause
                self._bad_loss = None
            # An overflow skips the update and halves the scale; below 1 the scale is not the cause.
            if not math.isfinite(gradient) and scale < 1:
                self._stop(step)

    def _stop(self, update: int) -> None:
        """Raise for the first bad loss of all ranks up to an update, else for the gradient of the update."""
        here = math.inf if self._bad_loss is None else self._bad_loss
        first = min(self._training.world.all_gather(lambda: here))
        raise NonFiniteStep(int(first), "loss") if first <= update else NonFiniteStep(update, "gradient")


def save_batch(training: Training, run_dir: RunDirectory, bad: NonFiniteStep) -> NonFiniteLossError:
    """Load the batch of a bad step again and save it.

    Returns:
        The error that ends the run, on every rank.
    """
    batch = next(iter(training.data.train.batches(training.state.epoch, bad.step)))
    rank_batches = training.world.gather(
        {"images": batch.images.cpu(), "labels": batch.labels.cpu(), "rows": batch.source_index.cpu()}
    )
    return training.world.run_on_main(lambda: _save(training, run_dir, bad, rank_batches))


def _save(
    training: Training, run_dir: RunDirectory, bad: NonFiniteStep, rank_batches: list[dict[str, torch.Tensor]]
) -> NonFiniteLossError:
    """Write the input of `trainer.loop.replay_step`; returns the error that ends the run.

    The weights are those before the step. If they are not finite, they are those of the newest checkpoint.
    """
    weights, origin = training.state.model.state_dict(), "before the step"
    mean, std = training.data.statistics[training.data.train.stage_at(training.state.epoch).input_size]
    if not all_finite(training.state.model.parameters()):
        newest, source = checkpoint.load_newest(run_dir.checkpoints)
        weights = newest["model"]
        origin = f"of {source.name}, epoch {newest['epoch'] + 1} after step {newest['step']}"
    content = {
        **training.compatibility_fields(),
        "config": training.config.model_dump(mode="json"),
        "model": weights,
        "weights": origin,
        "class_weights": training.class_weights.cpu(),
        "logit_shift": training.logit_adjustment.cpu(),
        "logit_bias": training.logit_bias.tolist(),
        "channels": training.data.spec.image_shape[2],
        "mean": list(mean),
        "std": list(std),
        "epoch": training.state.epoch,
        "step": bad.step,
        "shares": rank_batches,
    }
    path = run_dir.path / "nonfinite" / f"epoch-{training.state.epoch + 1}-step-{bad.step + 1}.pt"
    hint = f"python -m trainer.loop.replay_step {quote(path)} shows the layer where it arises"
    try:
        path.parent.mkdir(exist_ok=True)
        checkpoint.save(path, content)
    except OSError as error:
        hint = f"the batch was not saved to {quote(path)}: {error.strerror or error}"
    rows = torch.cat([each["rows"] for each in rank_batches]).tolist()
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN])) + (", ..." if len(rows) > _ROWS_SHOWN else "")
    place = f"epoch {training.state.epoch + 1} step {bad.step + 1}"
    return NonFiniteLossError(
        found=f"a {bad.what} that is not finite in {place}, of {len(rows)} rows {shown}",
        expected="finite losses and gradients",
        hint=f"{hint}; a lower optim.lr or trainer.precision=fp32 may help (checkpoint.resume_allow_changes)",
    )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all values are finite; one synchronization with the device."""
    return bool(torch.stack(torch._foreach_norm(list(tensors), math.inf)).isfinite().all())
