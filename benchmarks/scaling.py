"""Measure the training throughput on 1 .. N ranks of this machine, at a constant batch size per rank.

    python benchmarks/scaling.py [--ranks 1,2,4] [--device auto] [--batch N] [--shards DIR] [--out DIR]

The complete loop is measured beside the same loop over batches that are already on the device. On a CPU the cores are
divided evenly among the largest number of ranks; with fewer ranks the other cores are idle. Default: one rank per GPU,
or per core; packed EMNIST ByClass if present, else the digits of scikit-learn. Output: scaling.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from benchmarks.common.arguments import add_out_argument, add_shards_argument, fraction_of, parse_numbers, positive
from benchmarks.common.charts import MUTED, RULE, SERIES, Chart, plain_numbers, plot_spread
from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import write_results
from benchmarks.common.text import format_percent, format_spread, markdown_table
from benchmarks.train_throughput import LISTS, RUNS, SECONDS
from benchmarks.training.loop import LoopCase, measure
from pipeline.common.device import choose_device
from shards.cli import plural, run_command
from shards.limits import available_cpus

_TIMEOUT = 1800  # seconds for one number of ranks


def measure_ranks(ranks: int, threads: int, case: LoopCase, **options: Any) -> dict[str, Any]:
    """Start the ranks with torchrun, each with `threads` threads, and return the measurement of rank 0."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        work = json.dumps({**options, "case": vars(case), "out": str(out)})
        process = subprocess.run(
            [*launcher, __file__, "--worker", work],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
        if process.returncode != 0 or not out.exists():
            errors = [line for line in process.stderr.splitlines() if "rror" in line]
            return {"failed": errors[0] if errors else f"exit status {process.returncode}"}
        return json.loads(out.read_text())


def run_worker(work: dict[str, Any]) -> int:
    """Measure in a process that torchrun started."""
    shards, case = Path(work["shards"]), LoopCase(**work["case"])
    result = measure(shards, case, work["device"], work["fraction"], work["runs"], work["seconds"])
    if result is not None:
        Path(work["out"]).write_text(json.dumps(result))
    return 0


def scaling_markdown(records: Sequence[dict[str, Any]]) -> str:
    """Format the table by number of ranks."""
    rows = []
    single = _single_rank_rate(records)
    for record in records:
        row = [str(record["ranks"]), str(record["batch_size"])]
        if "failed" in record:
            rows.append([*row, f"FAILED, {record['failed']}", "", "", ""])
            continue
        rate = record["whole_images_per_second"]
        row += [format_spread(rate), format_percent(rate["median"] / record["ranks"] / single) if single else ""]
        row.append(format_percent(record["whole_of_synthetic"]["median"]))
        rows.append([*row, format_percent(record["data_wait_share"]["median"])])
    head = ["ranks", "global batch", "images/s (range)", "scaling efficiency", "complete / synthetic", "data wait"]
    return markdown_table(head, rows)


def _single_rank_rate(records: Sequence[dict[str, Any]]) -> float | None:
    """Return images/s of one rank, if measured."""
    singles = [record for record in records if record["ranks"] == 1 and "failed" not in record]
    return singles[0]["whole_images_per_second"]["median"] if singles else None


def plot_scaling(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot images/s over the number of ranks, with linear scaling as a reference."""
    measured = [record for record in records if "failed" not in record]
    ranks = [record["ranks"] for record in measured]
    first = measured[0]

    def draw(panels: Sequence[Axes]) -> None:
        axes = panels[0]
        lines = (("synthetic", MUTED, "batches already on the device"), ("whole", SERIES[0], "complete loop"))
        for name, color, label in lines:
            rates = [record[f"{name}_images_per_second"] for record in measured]
            plot_spread(axes, ranks, rates, color=color, marker="o", label=label)
        if single := _single_rank_rate(records):
            linear = [single * count for count in ranks]
            axes.plot(ranks, linear, color=RULE, linestyle="--", label="linear scaling", zorder=1)
        axes.set_xticks(ranks)
        axes.set_ylim(bottom=0)
        plain_numbers(axes.yaxis)
        axes.set_xlabel("ranks")
        axes.set_ylabel("images/s")
        batch = plural(first["batch_size"] // first["ranks"], "image")
        axes.set_title(f"{first['model']} at {first['resolution']}x{first['resolution']}, {batch} per rank")
        axes.legend()

    Chart(draw, (6.4, 4.2)).write_png(path)


def main() -> int:
    """Run the command."""
    description = "Measure the training throughput on 1 .. N ranks, at a constant batch size per rank."
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--ranks", metavar="1,2", help="comma-separated numbers of ranks (default: 1 .. all)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the model (default: auto)")
    cpu, gpu = ({name: text.split(",")[0] for name, text in LISTS[kind].items()} for kind in ("cpu", "cuda"))

    def default(name: str) -> str:
        return f"(default: on a CPU {cpu[name]}, on a GPU {gpu[name]})"

    add("--model", metavar="NAME", help=f"three_block_cnn or a timm model {default('models')}")
    add("--resolution", type=positive(int), metavar="PX", help=f"image side in pixels {default('resolutions')}")
    add("--batch", type=positive(int), metavar="N", help=f"batch size per rank {default('batches')}")
    add("--precision", metavar="P", help=f"fp32, bf16 or auto {default('precisions')}")
    add_shards_argument(parser)
    add("--images", type=positive(int), metavar="N", help="number of training images (default: all)")
    add("--runs", type=positive(int), default=RUNS, metavar="N", help=f"runs of each loop (default: {RUNS})")
    add("--seconds", type=float, default=SECONDS, metavar="S", help=f"minimum time of a run (default: {SECONDS})")
    add_out_argument(parser)
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return run_worker(arguments.worker)
    device = choose_device(arguments.device).type
    cores = available_cpus()
    devices = torch.cuda.device_count() if device == "cuda" else cores
    counts = list(range(1, devices + 1))
    if arguments.ranks:
        counts = parse_numbers("--ranks", arguments.ranks, int, "comma-separated numbers above 0", "1,2")
    threads = max(1, cores // max(counts))
    base = gpu if device == "cuda" else cpu
    shards = choose_set(arguments.shards)
    options = {"shards": str(shards), "device": device, "fraction": fraction_of(arguments.images, shards)}
    records = []
    for ranks in counts:
        case = LoopCase(
            resolution=arguments.resolution or int(base["resolutions"]),
            model=arguments.model or base["models"],
            batch_size=ranks * (arguments.batch or int(base["batches"])),
            precision=arguments.precision or base["precisions"],
            compile=base["compile"],
        )
        print(f"{plural(ranks, 'rank')} ...", flush=True)
        result = measure_ranks(ranks, threads, case, runs=arguments.runs, seconds=arguments.seconds, **options)
        records.append({"name": "scaling", "ranks": ranks, "threads": threads, **vars(case), **result})
    has_results = any("failed" not in record for record in records)
    write_png = partial(plot_scaling, records) if has_results else None
    write_results(arguments.out / "scaling", records, scaling_markdown(records), write_png)
    return 0


if __name__ == "__main__":
    run_command(main)
