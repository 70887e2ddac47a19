"""Processes of one machine that train the trials of a study."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from pipeline.common.process_pool import default_workers
from shards.cli import run_command
from trainer import config
from trainer.distributed import init_distributed
from trainer.engine import Stopped
from trainer.memory import granted
from trainer.settings import Config
from trainer.tune.search_space import Search

_MOST_DEATHS = 3  # for each worker, before the search is given up
_PATIENCE = 10.0  # seconds for workers that were told to stop, beyond checkpoint.grace_seconds


def work(wanted: Search, base: Config, deadline: float, workers: int = 1) -> int:
    """Train trials until none is left or the time is up, as one of some workers of this machine.

    deadline: seconds since 1970. Returns the exit status.
    """
    from trainer.tune import study_page as search_report
    from trainer.tune.study import Study
    from trainer.tune.trial import OutOfTime, train_trial

    parent = multiprocessing.parent_process()

    def is_over() -> bool:
        return time.time() >= deadline or (parent is not None and not parent.is_alive())

    study = Study(wanted, base)
    trained = base  # how trials are trained; the best recipe has the memory to itself, and compares hashes
    if base.loader.cache_gb == "auto" and workers > 1:
        share = granted() / 2 / 1e9 / workers
        trained = config.changed(base, {"loader.cache_gb": share}, "a share of the memory")
    with init_distributed(base.device) as world:
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


def supervise(wanted: Search, base: Config, deadline: float, workers: int) -> int:
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
