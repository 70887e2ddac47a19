"""Hyperparameter search over the settings of a recipe, with the validation split as the objective.

python -m trainer.tune configs/search/optimizers_cpu.yaml [key=value ...] [--workers N]
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from pipeline.common.process_group import world_size
from shards import open_split
from shards.cli import Terminated, command_parser, run_command
from shards.errors import UserError, quote
from shards.manifest import VALIDATION, has_split
from shards.remote.datasets import resolve_dataset
from trainer.config.base import settings_help
from trainer.config.schema import Config
from trainer.tune import search_space

_MAX_WORKERS = 1024


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "trainer.tune",
        __doc__,
        epilog=f"keys (in the file, or key=value):\n{settings_help(search_space.SearchConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("search", type=Path, metavar="SEARCH", help="YAML file, for instance configs/search/...")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="keys that replace the file's")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="worker processes of this machine, each with its own GPU if there are several (default 1); "
        "the same command on other machines adds workers",
    )
    return parser.parse_intermixed_args()


def main() -> int:
    """Run the command; returns the exit status."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    search, base = search_space.load(arguments.search, arguments.overrides)
    if not 1 <= arguments.workers <= _MAX_WORKERS:
        raise UserError(
            found=f"--workers {arguments.workers}", expected=f"a number 1 .. {_MAX_WORKERS}", hint="--workers 1"
        )
    if world_size() > 1:
        raise UserError(
            found="a search started by torchrun",
            expected="workers that train trials independently",
            hint="python -m trainer.tune ... --workers N, and the same command on further machines",
        )
    from trainer.tune import study_page, workers  # these import Optuna, an optional dependency
    from trainer.tune.study import SharedStudy

    _check_data(base)
    study = SharedStudy(search, base)
    minutes = search.budget.minutes
    deadline = time.time() + 60 * minutes if minutes is not None else float("inf")
    budget = study_page.format_values(search.budget.model_dump(exclude_none=True))
    print(f"{study.directory}: search over {', '.join(search.space)} with budget {budget}", flush=True)
    try:
        if arguments.workers == 1:
            status = workers.work(search, base, deadline)
        else:
            status = workers.supervise(search, base, deadline, arguments.workers)
    except (KeyboardInterrupt, Terminated):
        print("stopped; the same command resumes the search", flush=True)
        raise
    if status == 0:
        print(study_page.format_table(study.results()))
        print(f"page        {study.directory / study_page.PAGE}")
        if (study.directory / study_page.BEST).exists():
            print(f"best        python -m trainer.run {quote(study.directory / study_page.BEST)}")
        if unfinished := study.unfinished():
            print(f"unfinished  {', '.join(map(str, unfinished))}; the same command resumes them")
    return status


def _check_data(base: Config) -> None:
    """Check the data before there is a study. A remote set is downloaded here, once."""
    directory = resolve_dataset(base.data.shards)
    open_split(directory, "train")
    if base.data.val_fraction == 0 and not has_split(directory, VALIDATION):
        raise UserError(
            found=f"data.val_fraction=0, and no val split in {base.data.shards}",
            expected="a validation split, the objective of the search",
            hint="settings: {data.val_fraction: 0.1}",
        )


if __name__ == "__main__":
    run_command(main)
