"""Search for better settings of a recipe, by trials that are judged on the validation part.

python -m trainer.tune configs/search/optimizers_cpu.yaml [key=value ...] [--workers N]
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

from shards import open_split
from shards.cli import Terminated, run_command
from shards.errors import UserError
from shards.manifest import VALIDATION, has_split
from shards.remote.sets import resolve_dataset
from trainer.runtime.progress import duration
from trainer.section import listing
from trainer.settings import Config
from trainer.tune import search_space as search
from trainer.tune.search_space import Search
from trainer.tune.workers import supervise, work


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.tune",
        description="Search for better settings of a recipe, by trials that are judged on the validation part.",
        epilog=f"keys (in the file, or key=value):\n{listing(search.describe())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("search", type=Path, metavar="SEARCH", help="YAML file, for instance configs/search/...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace the file's")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes of this machine that train trials at the same time, each with a GPU if there are several; "
        "other machines join by the same command",
    )
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    wanted, base = search.load(arguments.search, arguments.overrides)
    if arguments.workers < 1:
        raise UserError(found=f"--workers {arguments.workers}", expected="at least one", hint="--workers 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            found="a search started by torchrun",
            expected="processes that each train trials of their own",
            hint="python -m trainer.tune ... --workers N, and the same command on further machines",
        )
    from trainer.tune.study import Study  # with Optuna, which only a search needs

    _check_set(base)
    study = Study(wanted, base)
    minutes = wanted.budget.minutes
    deadline = time.time() + 60 * minutes if minutes is not None else float("inf")
    print(f"{study.directory}: {_told(wanted)}", flush=True)
    try:
        if arguments.workers == 1:
            status = work(wanted, base, deadline)
        else:
            status = supervise(wanted, base, deadline, arguments.workers)
    except (KeyboardInterrupt, Terminated):
        print("stopped; the same command goes on", flush=True)
        raise
    if status == 0:
        from trainer.tune import study_page as search_report

        with study.alone():
            search_report.write(study, wanted, base)
        print(search_report.table(study.results()))
        print(f"page        {study.directory / search_report.PAGE}")
        if (study.directory / search_report.BEST).exists():
            print(f"best        python -m trainer.run {study.directory / search_report.BEST}")
        left = study.unfinished()
        if left:
            print(f"unfinished  {', '.join(map(str, left))}; the same command goes on with them")
    return status


def _check_set(base: Config) -> None:
    """Refuse data that no trial could learn from, before there is a study; a remote set is fetched once, by this."""
    directory = resolve_dataset(base.data.shards)
    open_split(directory, "train")
    if base.data.val_fraction == 0 and not has_split(directory, VALIDATION):
        raise UserError(
            found=f"data.val_fraction=0, and no val part in {base.data.shards}",
            expected="a validation part, by which trials are judged",
            hint="settings: {data.val_fraction: 0.1}",
        )


def _told(wanted: Search) -> str:
    budget = wanted.budget
    trials = f"up to {budget.trials} trials" if budget.trials is not None else "trials"
    minutes = f" within {duration(60 * budget.minutes)}" if budget.minutes is not None else ""
    repeats = f" of {wanted.repeats} trainings each" if wanted.repeats > 1 else ""
    part = f" on {100 * wanted.fraction:.4g} % of the train part" if wanted.fraction < 1 else ""
    return f"{trials}{minutes}{repeats}{part}, over {', '.join(wanted.space)}"


if __name__ == "__main__":
    run_command(main)
