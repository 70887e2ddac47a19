"""Search for better settings of a recipe, by trials that are judged on the validation part.

python -m trainer.tune configs/search/optimizers_cpu.yaml [key=value ...] [--workers N]
python -m trainer.tune configs/search/optimizers.yaml --wandb-sweep sweep.yaml
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from pipeline.common.process_pool import default_workers
from shards import open_split
from shards.cli import Terminated, run_command
from shards.errors import UserError
from shards.manifest import VALIDATION, has_part
from shards.remote.sets import resolve_dataset
from trainer import config, search, sweep
from trainer.distributed import join
from trainer.engine import Stopped
from trainer.memory import granted
from trainer.progress import duration
from trainer.search import Search
from trainer.section import listing
from trainer.settings import Config

_MOST_DEATHS = 3  # for each worker, before the search is given up
_PATIENCE = 10.0  # seconds for workers that were told to stop, beyond checkpoint.grace_seconds


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
    parser.add_argument(
        "--wandb-sweep", type=Path, metavar="FILE.yaml", help="write the space as a W&B sweep instead of searching"
    )
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    wanted, base = search.load(arguments.search, arguments.overrides)
    if arguments.wandb_sweep is not None:
        for path in sweep.write(arguments.wandb_sweep, wanted, base):
            print(f"wandb sweep {path}")
        return 0
    if arguments.workers < 1:
        raise UserError(found=f"--workers {arguments.workers}", expected="at least one", hint="--workers 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            found="a search started by torchrun",
            expected="processes that each train trials of their own",
            hint="python -m trainer.tune ... --workers N, and the same command on further machines",
        )
    from trainer.study import Study  # with Optuna, which only a search needs

    _check_set(base)
    study = Study(wanted, base)
    minutes = wanted.budget.minutes
    deadline = time.time() + 60 * minutes if minutes is not None else float("inf")
    print(f"{study.directory}: {_told(wanted)}", flush=True)
    try:
        if arguments.workers == 1:
            status = work(wanted, base, deadline)
        else:
            status = _supervise(wanted, base, deadline, arguments.workers)
    except (KeyboardInterrupt, Terminated):
        print("stopped; the same command goes on", flush=True)
        raise
    if status == 0:
        from trainer import search_report

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
    if base.data.validation == 0 and not has_part(directory, VALIDATION):
        raise UserError(
            found=f"data.validation=0, and no val part in {base.data.shards}",
            expected="a validation part, by which trials are judged",
            hint="settings: {data.validation: 0.1}",
        )


def work(wanted: Search, base: Config, deadline: float, workers: int = 1) -> int:
    """Train trials until none is left or the time is up, as one of some workers of this machine.

    deadline: seconds since 1970. Returns the exit status.
    """
    from trainer import search_report
    from trainer.study import Study
    from trainer.trial import OutOfTime, train_trial

    parent = multiprocessing.parent_process()

    def is_over() -> bool:
        return time.time() >= deadline or (parent is not None and not parent.is_alive())

    study = Study(wanted, base)
    trained = base  # how trials are trained; the best recipe has the memory to itself, and compares hashes
    if base.loader.memory == "auto" and workers > 1:
        share = granted() / 2 / 1e9 / workers
        trained = config.changed(base, {"loader.memory": share}, "a share of the memory")
    with join(base.device) as world:
        while not is_over():
            with study.next_trial() as trial:
                if trial is None:
                    break
                print(f"trial {trial.number} begins: {search_report.said(trial.values)}", flush=True)
                try:
                    train_trial(study, trial, wanted, trained, world, is_over)
                except OutOfTime:
                    print(f"trial {trial.number} is left for later: the time is up", flush=True)
                    break
                except Stopped as stop:
                    print(f"trial {trial.number} stopped; the same command goes on with it", flush=True)
                    return 128 + stop.signum
            results = study.results()
            print(search_report.line(next(result for result in results if result.number == trial.number)), flush=True)
            with study.alone():
                search_report.write(study, wanted, base)
            trained = config.changed(trained, {"data.verify": False}, "the search")  # once is enough
    return 0


def _supervise(wanted: Search, base: Config, deadline: float, workers: int) -> int:
    """Keep some processes at work; one that is killed is replaced, and its trial gone on with."""
    gpus = _gpus(base.device)
    cores = str(max(1, default_workers() // workers))
    context = multiprocessing.get_context("spawn")

    def start(index: int) -> BaseProcess:
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores)}
        if len(gpus) > 1:
            own["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        process = context.Process(target=_worker, args=(wanted, base, deadline, workers), name=f"worker {index + 1}")
        process.start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        return process

    at_work = {index: start(index) for index in range(workers)}
    deaths, status = 0, 0
    try:
        while at_work:
            wait([process.sentinel for process in at_work.values()])
            for index, process in list(at_work.items()):
                if process.is_alive():
                    continue
                process.join()
                del at_work[index]
                code = process.exitcode or 0
                if code < 0 and deaths < _MOST_DEATHS * workers:
                    deaths += 1
                    print(f"warning: {process.name} was killed by signal {-code}; another one begins", file=sys.stderr)
                    at_work[index] = start(index)
                elif code != 0:
                    status = status or (code if code > 0 else 1)
                    _stop(list(at_work.values()), base)  # what one met, the others would meet
    except BaseException:
        _stop(list(at_work.values()), base)
        raise
    return status


def _worker(wanted: Search, base: Config, deadline: float, workers: int) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run_command(lambda: work(wanted, base, deadline, workers))


def _stop(processes: list[BaseProcess], base: Config) -> None:
    """Tell workers to stop with a checkpoint, and wait for that."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join(base.checkpoint.grace_seconds + _PATIENCE)


def _gpus(device: str) -> list[str]:
    """The GPUs that workers share out, as CUDA_VISIBLE_DEVICES names them."""
    if device == "cpu":
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(number) for number in range(torch.cuda.device_count())]


def _told(wanted: Search) -> str:
    budget = wanted.budget
    trials = f"up to {budget.trials} trials" if budget.trials is not None else "trials"
    minutes = f" within {duration(60 * budget.minutes)}" if budget.minutes is not None else ""
    repeats = f" of {wanted.repeats} trainings each" if wanted.repeats > 1 else ""
    part = f" on {100 * wanted.fraction:.4g} % of the train part" if wanted.fraction < 1 else ""
    return f"{trials}{minutes}{repeats}{part}, over {', '.join(wanted.space)}"


if __name__ == "__main__":
    run_command(main)
