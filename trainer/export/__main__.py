"""`python -m trainer.export`: export a run."""

from __future__ import annotations

from shards.cli import run_command
from trainer.export.export import main

if __name__ == "__main__":
    run_command(main)
