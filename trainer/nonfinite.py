"""A loss or gradient that is not finite: noticed without waiting for the device, traced to its batch, kept for study.

Losses are read a few steps late, when the weights may be spoiled already. But batches are a function of (seed, epoch,
step), so the run goes back to its checkpoint and takes the steps again, looking at each of them before the update.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from pipeline.loader import Batch
from shards.errors import UserError
from trainer import checkpoint
from trainer.keeper import Keeper
from trainer.resume import restore
from trainer.run_directory import RunDirectory
from trainer.training import Training

log = logging.getLogger(__name__)

_EVERY = 32  # steps whose losses are read from a GPU together
_ROWS_SHOWN = 16


class Diverged(UserError):
    """The end of a run whose losses or gradients are not finite."""


class NonFinite(Exception):
    """A batch's loss, or a gradient, is not finite, as every rank knows.

    epoch, step: from 0. seen: whether the batch was met before the update, with everything as it came to it; then
    what: `loss` or `gradient`, rows: those of the global batch, file: the saved reproduction, None if the disk did not
    take it.
    """

    def __init__(
        self,
        epoch: int,
        step: int,
        seen: bool = False,
        what: str = "loss",
        rows: tuple[int, ...] = (),
        file: Path | None = None,
    ) -> None:
        super().__init__(f"epoch {epoch + 1} step {step + 1}")
        self.epoch = epoch
        self.step = step
        self.seen = seen
        self.what = what
        self.rows = rows
        self.file = file


class Watch:
    """Looks at the losses of an epoch, and remembers the first step whose loss is not finite.

    A GPU's losses stay there until there are some of them, and are copied without waiting; they are looked at when the
    next ones are copied.
    """

    def __init__(self, training: Training) -> None:
        device = training.world.device
        on_gpu = device.type == "cuda"
        self._training = training
        self._losses = torch.zeros(_EVERY if on_gpu else 1, device=device)
        self._noted: list[int] = []
        self._copy = torch.zeros(len(self._losses), pin_memory=on_gpu)
        self._copied: list[int] = []
        self._event = torch.cuda.Event() if on_gpu else None
        self._last: int | None = None
        self._bad: int | None = None

    def note(self, step: int, loss: torch.Tensor) -> None:
        """Look at a step's loss, soon."""
        self._losses[len(self._noted)] = loss
        self._noted.append(step)
        self._last = step
        if len(self._noted) == len(self._losses):
            self._read()
            self._take()

    @property
    def word(self) -> int:
        """For a vote: larger for an earlier bad step, 0 for none that is known."""
        return 0 if self._bad is None else self._steps - self._bad

    def heed(self, word: int) -> None:
        """Raise `NonFinite` for the largest word of all ranks, unless that is 0."""
        if word:
            raise NonFinite(self._training.epoch, self._steps - word)

    def settle(self) -> None:
        """Look at all losses so far, and at the weights, on all ranks; raises `NonFinite`. Waits for the device."""
        self._read()
        self._take()
        self._read()
        if self._bad is None and self._last is not None and not _finite(_learned(self._training)):
            self._bad = self._last
        self.heed(self._training.world.largest(self.word))

    @property
    def _steps(self) -> int:
        return self._training.data.train.steps(self._training.epoch)

    def _take(self) -> None:
        """Begin to copy what was noted."""
        self._copy.copy_(self._losses, non_blocking=True)
        self._copied, self._noted = self._noted, []
        if self._event is not None:
            self._event.record()

    def _read(self) -> None:
        """Look at what was copied."""
        if self._event is not None:
            self._event.synchronize()
        for step, loss in zip(self._copied, self._copy.tolist(), strict=False):
            if self._bad is None and not math.isfinite(loss):
                self._bad = step
        self._copied = []


def look_closely(training: Training, directory: RunDirectory, batch: Batch, loss: torch.Tensor) -> None:
    """After a batch's backward pass and before the update: raise `NonFinite` if its loss or gradient is not finite on
    any rank, with the batch and the model saved for study."""
    world = training.world
    here = 0.0
    if not bool(loss.isfinite()):
        here = 2.0
    elif not _finite(parameter.grad for parameter in training.model.parameters() if parameter.grad is not None):
        here = 1.0
    found = world.each(here)
    if not any(found):
        return
    share = {"images": batch.images.cpu(), "labels": batch.labels.cpu(), "rows": batch.source_index.cpu()}
    shares = world.gather(share)
    path = directory.path / "nonfinite" / f"epoch-{training.epoch + 1}-step-{batch.step + 1}.pt"
    outcome: tuple[Path | None, tuple[int, ...]] = (None, ())
    if world.speaks:
        rows = torch.cat([share["rows"] for share in shares]).tolist()
        outcome = (_save(path, training, batch, shares), tuple(rows))
    file, rows = world.share(outcome)
    raise NonFinite(training.epoch, batch.step, True, "loss" if 2.0 in found else "gradient", rows, file)


def go_back(training: Training, directory: RunDirectory, keeper: Keeper, found: NonFinite) -> None:
    """Put the training back to its newest checkpoint after a bad batch, to look for it or to leave it out.

    Raises `UserError` if no more updates may be left out (`trainer.max_nonfinite_steps`).
    """
    place = (found.epoch, found.step)
    limit = training.config.trainer.max_nonfinite_steps
    if not found.seen and place == training.look_until:
        raise UserError(
            found=f"{_described(found)} twice, and not when its steps were taken one by one",
            expected="finite losses, and the same ones from the same steps",
            hint="device memory or arithmetic may be at fault: go on by resume=auto, on another device if it recurs",
        )
    if found.seen and len(training.skipped) >= limit:
        raise _end(training, found)
    window = found.step - found.step % training.config.optim.grad_accumulation
    skipped = training.skipped | ({(found.epoch, window)} if found.seen else set())
    keeper.finish()
    state, _ = training.world.on_first(lambda: checkpoint.load_newest(directory.checkpoints))
    restore(training, state)
    training.skipped = skipped
    training.look_until = None if found.seen else place
    training.optimizer.zero_grad(set_to_none=True)
    action = f"the update is left out ({len(skipped)} of {limit})" if found.seen else "taking its steps one by one"
    log.warning(
        "%s; going back to epoch %d after step %d: %s", _described(found), training.epoch + 1, training.step, action
    )


def _end(training: Training, found: NonFinite) -> Diverged:
    shown = ", ".join(map(str, found.rows[:_ROWS_SHOWN]))
    more = f" and {len(found.rows) - _ROWS_SHOWN} more" if len(found.rows) > _ROWS_SHOWN else ""
    limit = training.config.trainer.max_nonfinite_steps
    study = f"python -m trainer.reproduce {found.file} shows where it arises; " if found.file else ""
    return Diverged(
        found=f"{_described(found)}, of rows {shown}{more}",
        expected="finite losses and gradients" + (f", but for {limit} updates" if limit else ""),
        hint=f"{study}a lower optim.lr or trainer.precision=fp32 may help; resume=auto trainer.max_nonfinite_steps="
        f"{limit + 1} goes on without this update",
    )


def _described(found: NonFinite) -> str:
    return f"a {found.what} that is not finite in epoch {found.epoch + 1} step {found.step + 1}"


def _save(path: Path, training: Training, batch: Batch, shares: list[dict[str, torch.Tensor]]) -> Path | None:
    """Write what `trainer.reproduce` takes; the state is that before the update."""
    state = {
        **training.identity(),
        "config": training.config.model_dump(mode="json"),
        "model": training.model.state_dict(),
        "class_weights": training.class_weights.cpu(),
        "logit_shift": training.logit_shift.cpu(),
        "channels": training.data.spec.image_shape[2],
        "mean": list(training.data.spec.mean),
        "std": list(training.data.spec.std),
        "epoch": training.epoch,
        "step": batch.step,
        "shares": shares,
    }
    try:
        path.parent.mkdir(exist_ok=True)
        checkpoint.save(path, state)
    except OSError as error:
        log.warning("the batch is not saved: %s: %s", path, error.strerror or error)
        return None
    return path


def _learned(training: Training) -> Iterator[torch.Tensor]:
    """Weights and moments: a moment that is not a number would stop its weights from learning, and no loss tells."""
    yield from training.model.parameters()
    for moments in training.optimizer.state_dict()["state"].values():
        yield from (value for value in moments.values() if isinstance(value, torch.Tensor))


def _finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
