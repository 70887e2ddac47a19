"""What a torchrun job remembers when it starts its processes again: the run directory of the first start.

torchrun's agent keeps the store by which its processes find one another for as long as the job lasts. So a job goes on
in its own directory whatever `resume` says, and another job never goes on in it by mistake. How often processes were
started again would not tell: torchrun does not count the starts after a host has come or gone.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from trainer.meeting import agent_store
from trainer.settings import Run

_TIMEOUT = timedelta(seconds=60)


def recall_directory(run: Run) -> Path | None:
    """The directory that this job has given to a run; None for a first start, or without torchrun."""
    store = agent_store(_TIMEOUT)
    if store is None or not store.check([_key(run)]):
        return None
    return Path(store.get(_key(run)).decode())


def remember_directory(run: Run, path: Path) -> None:
    """Note the directory of a run."""
    store = agent_store(_TIMEOUT)
    if store is not None:
        store.set(_key(run), str(path.absolute()))


def _key(run: Run) -> str:
    """A job may train several runs, one after another."""
    return f"inkstream/run_directory/{run.name}/{run.dir or ''}"
