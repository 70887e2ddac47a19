"""What does each further rank bring?

    python benchmarks/scaling.py [--ranks 1,2,4] [--device auto] [--batch N] [--shards DIR] [--out DIR]

The training loop on 1 .. N ranks of this machine, each rank with a batch of its own of the same size, beside the same
loop over batches that lie on the device already. On a CPU the cores are shared out evenly among the most ranks, and
fewer ranks leave the others idle. Without arguments: one rank for each GPU, or for each core; a packed EMNIST ByClass
if there is one, the digits inside scikit-learn otherwise. Writes scaling.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import DEFAULT_OUT, table, write_results
from benchmarks.train_throughput import LISTS, RUNS, SECONDS
from benchmarks.training.loop import Setting, measure
from pipeline.common.device import choose_device
from shards import Manifest
from shards.cli import run_command
from shards.cpus import available_cpus
from shards.errors import UserError

_MOST_SECONDS = 1800  # for one number of ranks


def measure_ranks(
    shards: Path, setting: Setting, ranks: int, threads: int, device: str, subset: float, runs: int, seconds: float
) -> dict[str, Any]:
    """Start the ranks by torchrun, each with so many threads, and return what their first one measured."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        work = {"shards": str(shards), "setting": vars(setting), "device": device, "subset": subset}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        process = subprocess.run(
            [*launcher, __file__, "--rank-of", json.dumps(work | {"runs": runs, "seconds": seconds, "out": str(out)})],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
        )
        if process.returncode != 0 or not out.exists():
            said = [line for line in process.stderr.splitlines() if "rror" in line]
            return {"failed": said[0] if said else f"exit status {process.returncode}"}
        return json.loads(out.read_text())


def be_a_rank(work: dict[str, Any]) -> int:
    """One of the processes that torchrun started."""
    shards, setting = Path(work["shards"]), Setting(**work["setting"])
    found = measure(shards, setting, work["device"], work["subset"], work["runs"], work["seconds"])
    if found is not None:
        Path(work["out"]).write_text(json.dumps(found))
    return 0


def markdown(records: list[dict[str, Any]]) -> str:
    rows = []
    alone = _alone(records)
    for record in records:
        if "failed" in record:
            rows.append([str(record["ranks"]), str(record["batch_size"]), record["failed"], "", "", ""])
            continue
        rate = record["whole_images_per_second"]
        efficiency = f"{rate['median'] / record['ranks'] / alone:.1%}" if alone else ""
        rows.append(
            [
                str(record["ranks"]),
                str(record["batch_size"]),
                f"{rate['median']:,.0f} ({rate['low']:,.0f} .. {rate['high']:,.0f})",
                efficiency,
                f"{record['whole_of_synthetic']['median']:.1%}",
                f"{record['data_wait_share']['median']:.2%}",
            ]
        )
    head = ["ranks", "global batch", "images/s (range)", "of as many alone", "whole of synthetic", "data wait"]
    return table(head, rows)


def _alone(records: list[dict[str, Any]]) -> float | None:
    """Images a second of one rank, if that was measured."""
    ones = [record for record in records if record["ranks"] == 1 and "failed" not in record]
    return ones[0]["whole_images_per_second"]["median"] if ones else None


def draw(records: list[dict[str, Any]], path: Path) -> None:
    measured = [record for record in records if "failed" not in record]
    ranks = [record["ranks"] for record in measured]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=160, layout="constrained")
    lines = (("synthetic", "#a8a29e", "batches on the device already"), ("whole", "#1d4ed8", "whole loop"))
    for name, colour, label in lines:
        rates = [record[f"{name}_images_per_second"] for record in measured]
        middle = [rate["median"] for rate in rates]
        ends = [[rate["median"] - rate["low"] for rate in rates], [rate["high"] - rate["median"] for rate in rates]]
        axes.errorbar(ranks, middle, yerr=ends, color=colour, marker="o", capsize=3, label=label)
    if alone := _alone(records):
        axes.plot(ranks, [alone * count for count in ranks], color="#d6d3d1", linestyle="--", label="as many alone")
    axes.set_xticks(ranks)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("ranks")
    axes.set_ylabel("images/s")
    first = measured[0]
    axes.set_title(
        f"{first['model']} at {first['resolution']}x{first['resolution']}, {first['batch_size'] // first['ranks']} "
        "images a rank",
        loc="left",
        fontsize=11,
        weight="bold",
    )
    axes.legend(fontsize=8, frameon=False)
    axes.grid(color="#e7e5e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with path.open("wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def _ranks(text: str) -> list[int]:
    try:
        ranks = [int(word) for word in text.split(",")]
        if min(ranks) < 1:
            raise ValueError
    except ValueError:
        raise UserError(found=f"--ranks {text}", expected="numbers with commas", hint="--ranks 1,2") from None
    return ranks


def main() -> int:
    parser = argparse.ArgumentParser(description="What does each further rank bring?")
    parser.add_argument("--ranks", metavar="1,2", help="numbers of processes, with commas (default: 1 .. all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    parser.add_argument("--model", help="three_block_cnn or a timm model")
    parser.add_argument("--resolution", type=int, help="side in pixels")
    parser.add_argument("--batch", type=int, help="images of a batch of each rank")
    parser.add_argument("--precision", help="fp32, bf16 or auto")
    parser.add_argument("--shards", metavar="DIR", help="packed set or its address (default: EMNIST, or digits)")
    parser.add_argument("--images", type=int, metavar="N", help="most training images (default: all)")
    parser.add_argument("--runs", type=int, default=RUNS, help="of either loop; the median counts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a run, at least")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where to write the results")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        return be_a_rank(arguments.rank_of)
    device = choose_device(arguments.device).type
    cores = available_cpus()
    places = torch.cuda.device_count() if device == "cuda" else cores
    ranks = _ranks(arguments.ranks) if arguments.ranks else list(range(1, places + 1))
    threads = max(1, cores // max(ranks))
    base = {name: text.split(",")[0] for name, text in LISTS[device].items()}
    shards = choose_set(arguments.shards)
    samples = Manifest.read(shards / "train").samples
    subset = min(1.0, arguments.images / samples) if arguments.images else 1.0
    records = []
    for count in ranks:
        setting = Setting(
            resolution=arguments.resolution or int(base["resolutions"]),
            model=arguments.model or base["models"],
            batch_size=count * (arguments.batch or int(base["batches"])),
            precision=arguments.precision or base["precisions"],
            compile=base["compile"],
        )
        print(f"{count} {'rank' if count == 1 else 'ranks'} ...", flush=True)
        found = measure_ranks(shards, setting, count, threads, device, subset, arguments.runs, arguments.seconds)
        records.append({"name": "scaling", "ranks": count, "threads": threads, **vars(setting), **found})
    measured = any("failed" not in record for record in records)
    picture = functools.partial(draw, records) if measured else None
    write_results(arguments.out / "scaling", records, markdown(records), picture)
    return 0


if __name__ == "__main__":
    run_command(main)
