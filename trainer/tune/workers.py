"""Worker processes of one machine that train the trials of a study."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from pipeline.common.process_pool import default_workers
from shards import credentials
from shards.cli import run_command
from trainer.config import load as config
from trainer.config.schema import Config
from trainer.runtime.distributed import init_distributed
from trainer.runtime.memory import memory_limit
from trainer.runtime.signals import Interrupted
from trainer.tune import study_page
from trainer.tune.search_space import SearchConfig
from trainer.tune.study import SharedStudy
from trainer.tune.trial import TrialPaused, train_trial

_PAGE_SECONDS = 60.0  # between two versions of the page, whose plots take seconds
_MAX_DEATHS = 3  # for each worker, before the search fails
_STOP_SECONDS = 10.0  # for workers to exit after SIGTERM, beyond checkpoint.grace_seconds


def work(search: SearchConfig, base: Config, deadline: float, workers: int = 1) -> int:
    """Train trials until none is left or the time budget is exhausted.

    Args:
        search: The search.
        base: The recipe with the settings of all trials.
        deadline: End of the time budget, seconds since 1970.
        workers: Number of workers on this machine, which share its memory.

    Returns:
        The exit status.
    """
    parent = multiprocessing.parent_process()

    def is_over() -> bool:
        return time.time() >= deadline or (parent is not None and not parent.is_alive())

    study = SharedStudy(search, base)
    trained = base  # best.yaml keeps the recipe's own loader.cache_gb and data.verify
    if base.loader.cache_gb == "auto" and workers > 1:
        per_worker = memory_limit() / 2 / 1e9 / workers
        trained = config.replace_settings(base, {"loader.cache_gb": per_worker}, "the memory per worker")
    with init_distributed(base.device) as world:
        while not is_over():
            with study.next_trial() as trial:
                if trial is None:
                    break
                print(f"trial {trial.number} started: {study_page.format_values(trial.values)}", flush=True)
                try:
                    train_trial(study, trial, search, trained, world, is_over)
                except TrialPaused:
                    print(f"trial {trial.number} paused: time budget exhausted", flush=True)
                    break
                except Interrupted as stop:
                    print(f"trial {trial.number} stopped; the same command resumes it", flush=True)
                    return 128 + stop.signum
            result = next(result for result in study.results() if result.number == trial.number)
            print(study_page.format_result(result), flush=True)
            study_page.write(study, search, base, min_age=_PAGE_SECONDS)
            if trained.data.verify == "start":  # the first trial verified the data
                trained = config.replace_settings(trained, {"data.verify": "lazy"}, "the search")
    study_page.write(study, search, base)
    return 0


def supervise(search: SearchConfig, base: Config, deadline: float, workers: int) -> int:
    """Run some worker processes; a killed one is replaced, and its trial resumed. Returns the exit status."""
    gpus = [] if base.device == "cpu" else _visible_gpus()
    context = multiprocessing.get_context("spawn")

    def start(index: int) -> BaseProcess:
        gpu = gpus[index % len(gpus)] if len(gpus) > 1 else None
        arguments = (credentials.known_addresses(), search, base, deadline, workers, gpu)
        process = context.Process(target=_worker, args=arguments, name=f"worker {index + 1}")
        process.start()
        return process

    running = {index: start(index) for index in range(workers)}
    deaths, status = 0, 0
    try:
        while running:
            wait([process.sentinel for process in running.values()])
            for index, process in list(running.items()):
                if process.is_alive():
                    continue
                del running[index]
                code = process.exitcode or 0
                if code < 0 and deaths < _MAX_DEATHS * workers:
                    deaths += 1
                    print(f"warning: {process.name} was killed by signal {-code}; restarting it", file=sys.stderr)
                    running[index] = start(index)
                elif code != 0:
                    status = status or (code if code > 0 else 1)
                    _stop(list(running.values()), base)  # the others would fail in the same way
    except BaseException:
        _stop(list(running.values()), base)
        raise
    return status


def _worker(
    addresses: dict[str, str], search: SearchConfig, base: Config, deadline: float, workers: int, gpu: str | None
) -> None:
    credentials.restore_addresses(addresses)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA is not initialized yet
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, default_workers() // workers))
    run_command(lambda: work(search, base, deadline, workers))


def _stop(processes: list[BaseProcess], base: Config) -> None:
    """Send SIGTERM to the workers, and wait for their checkpoints."""

    def join() -> None:
        for process in processes:
            process.join(base.checkpoint.grace_seconds + _STOP_SECONDS)

    if os.name == "nt":  # Ctrl-C has reached the workers, and `terminate` kills them
        join()
    for process in processes:
        process.terminate()
    join()


def _visible_gpus() -> list[str]:
    """GPUs that the workers share, as CUDA_VISIBLE_DEVICES names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(number) for number in range(torch.cuda.device_count())]
