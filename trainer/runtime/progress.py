"""Progress of a training: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

_LINE_EVERY = 10.0  # seconds
_BAR_EVERY = 0.5


class Progress:
    """Progress of one epoch."""

    def __init__(
        self,
        epoch: int,
        epochs: int | None,
        steps: int,
        first_step: int,
        steps_ahead: float,
        seconds_left: float | None = None,
    ) -> None:
        """Start the display of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            epochs: Number of epochs; None if the clock ends the training.
            steps: Steps of this epoch.
            first_step: Step at which a resumed epoch continues.
            steps_ahead: Steps of later epochs, weighted by their duration, for the remaining time.
            seconds_left: Remaining time if the clock ends the training.
        """
        self._head = epoch_name(epoch + 1, epochs)
        self._seconds_left = seconds_left
        self._steps = steps
        self._first = first_step
        self._ahead = steps_ahead
        self._start = self._shown = time.perf_counter()
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc=self._head,
            leave=False,
            disable=not self._on_terminal,
            bar_format="{desc} {bar:20} {n_fmt}/{total_fmt}{postfix}",
        )

    def step(self, done: int, loss: float, rate: float, images: int, wait: float) -> None:
        """Show a step if the last display is old enough.

        Args:
            done: Completed steps of the epoch.
            loss: Mean loss of a recent step; NaN if none is known yet.
            rate: Learning rate.
            images: Images of all ranks since the start of this display.
            wait: Seconds of data wait since then.
        """
        now = time.perf_counter()
        if now - self._shown < (_BAR_EVERY if self._on_terminal else _LINE_EVERY):
            return
        self._shown = now
        seconds = now - self._start
        left = seconds / (done - self._first) * (self._steps - done + self._ahead)
        if self._seconds_left is not None:
            left = max(0.0, self._seconds_left - seconds)
        text = (
            f"loss {'-' if math.isnan(loss) else f'{loss:.4f}'}  lr {rate:.2e}  {images / seconds:,.0f} images/s  "
            f"data wait {wait / seconds:.1%}  {duration(left)} left"
        )
        if self._on_terminal:
            self._bar.n = done
            self._bar.set_postfix_str(text)
        else:
            print(f"{self._head}  step {done}/{self._steps}  {text}", flush=True)

    def close(self) -> None:
        self._bar.close()


def epoch_name(epoch: int, epochs: int | None) -> str:
    """Return `epoch 3/15`, or `epoch 3` if the number of epochs is unknown."""
    return f"epoch {epoch}" if epochs is None else f"epoch {epoch}/{epochs}"


def duration(seconds: float) -> str:
    """Format seconds as 1:02 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
