"""Compare the throughput of the training loop with the same loop over batches that are already on the device.

    python benchmarks/train_throughput.py [--device auto] [--shards DIR] [--resolutions 112,56] [--models A,B]
                                          [--batches 512,1024] [--precisions bf16,fp32] [--compile default,off]

The first value of each list forms the base case. Each other value is measured with the base values of the other lists,
in a fresh process. Default: packed EMNIST ByClass if present, else the digits of scikit-learn; on a CPU a small network
(about five minutes on two cores), on a GPU EfficientNet-B2 at 112x112. Output: train_throughput.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common.arguments import add_out_argument, add_shards_argument, fraction_of, parse_numbers, positive
from benchmarks.common.charts import MUTED, SERIES, Chart, set_row_labels
from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import in_process, write_results
from benchmarks.common.text import format_bytes, format_percent, format_spread, markdown_table, tabulate
from benchmarks.training.loop import LoopCase, measure
from pipeline.common.device import choose_device
from shards.cli import run_command

RUNS = 15
SECONDS = 0.5
TARGET = 0.99
LISTS = {
    "cpu": {
        "resolutions": "28,56,112",
        "models": "three_block_cnn,efficientnet_b0",
        "batches": "128,64,512",
        "precisions": "auto,fp32",
        "compile": "off,default",
    },
    "cuda": {
        "resolutions": "112,56,28",
        "models": "efficientnet_b2,efficientnet_b0,three_block_cnn",
        "batches": "512,256,1024,2048",
        "precisions": "bf16,fp32",
        "compile": "default,off,reduce-overhead",
    },
}


def make_cases(lists: dict[str, str]) -> list[LoopCase]:
    """Return the base case, and a case for each other value with the base values of the other lists."""
    numbers = {
        name: parse_numbers(f"--{name}", lists[name], int, "comma-separated numbers above 0", example)
        for name, example in (("resolutions", "28,56"), ("batches", "64,128"))
    }
    fields: dict[str, list[Any]] = {
        "resolution": numbers["resolutions"],
        "model": lists["models"].split(","),
        "batch_size": numbers["batches"],
        "precision": lists["precisions"].split(","),
        "compile": lists["compile"].split(","),
    }
    base = LoopCase(**{name: values[0] for name, values in fields.items()})
    return [base, *(replace(base, **{name: value}) for name, values in fields.items() for value in values[1:])]


def throughput_markdown(records: Sequence[dict[str, Any]]) -> str:
    """Format the table of all cases."""
    columns = {
        "complete loop images/s (range)": lambda record: format_spread(record["whole_images_per_second"]),
        "synthetic images/s (range)": lambda record: format_spread(record["synthetic_images_per_second"]),
        "complete / synthetic (range)": lambda record: format_spread(record["whole_of_synthetic"], ".1%"),
        "data wait": lambda record: format_percent(record["data_wait_share"]["median"]),
        "ms/step": lambda record: f"{record['step_milliseconds']['median']:.1f}",
        "peak memory": lambda record: format_bytes(record["peak_device_memory_bytes"] or record["peak_memory_bytes"]),
    }
    head, rows = tabulate(columns, [record for record in records if "failed" not in record])
    cells = iter(rows)
    failed = [""] * (len(head) - 1)
    rows = [
        [case_name(record), *([f"FAILED, {record['failed']}", *failed] if "failed" in record else next(cells))]
        for record in records
    ]
    return markdown_table(["case", *head], rows)


def case_name(record: dict[str, Any]) -> str:
    """Name the case of a record."""
    compiled = "" if record["compile"] == "off" else f", compiled ({record['compile']})"
    return (
        f"{record['model']}, {record['resolution']} px, batch {record['batch_size']}, {record['precision']}{compiled}"
    )


def plot_throughput(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the throughput of the complete loop as a percentage of the synthetic one, with its range."""
    ratios = [record["whole_of_synthetic"] for record in records]

    def draw(panels: Sequence[Axes]) -> None:
        axes = panels[0]
        medians = [100 * ratio["median"] for ratio in ratios]
        bars = [
            [100 * (ratio["median"] - ratio["low"]) for ratio in ratios],
            [100 * (ratio["high"] - ratio["median"]) for ratio in ratios],
        ]
        axes.barh(range(len(records)), medians, 0.62, xerr=bars, color=SERIES[0], ecolor=MUTED, capsize=2)
        for row, record in enumerate(records):
            rate = record["whole_images_per_second"]["median"]
            wait = format_percent(record["data_wait_share"]["median"])
            text = f"{rate:,.0f} images/s, data wait {wait}"
            axes.annotate(text, (1.5, row), va="center", fontsize=8, color="white")
        axes.axvline(100 * TARGET, color=SERIES[1], linewidth=1.2, linestyle="--")
        axes.annotate(f"{TARGET:.0%} ", (100 * TARGET, -0.75), ha="right", fontsize=8, color=SERIES[1])
        set_row_labels(axes, [case_name(record) for record in records])
        axes.set_ylim(len(records) - 0.5, -1.1)
        axes.set_xlim(0, max(105.0, *(100 * ratio["high"] + 2 for ratio in ratios)))
        axes.set_xlabel("complete loop, % of the throughput with batches that are already on the device")

    Chart(draw, (9, 2.0 + 0.42 * len(records)), title="Training throughput including data loading").write_png(path)


def main() -> int:
    """Run the command."""
    description = (
        "Compare the training loop with the same loop over batches that are already on the device. The base case has "
        "the first value of each list. Every other case changes one value."
    )
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the model (default: auto)")
    add_shards_argument(parser)
    for name in LISTS["cpu"]:
        defaults = f"on a CPU {LISTS['cpu'][name]}, on a GPU {LISTS['cuda'][name]}"
        add(
            f"--{name}",
            metavar="A,B",
            help=f"comma-separated values, first that of the base case (default: {defaults})",
        )
    add("--images", type=positive(int), metavar="N", help="number of training images (default: all)")
    add("--runs", type=positive(int), default=RUNS, metavar="N", help=f"runs of each loop (default: {RUNS})")
    add("--seconds", type=float, default=SECONDS, metavar="S", help=f"minimum time of a run (default: {SECONDS})")
    add_out_argument(parser)
    arguments = parser.parse_args()
    device = choose_device(arguments.device).type
    options = {name: getattr(arguments, name) for name in LISTS[device] if getattr(arguments, name)}
    cases = make_cases(LISTS[device] | options)
    shards = choose_set(arguments.shards)
    fraction = fraction_of(arguments.images, shards)
    records = []
    for case in cases:
        print(f"{case_name(vars(case))} ...", flush=True)
        result = in_process(measure, shards, case, device, fraction, arguments.runs, arguments.seconds)
        records.append({"name": "train_throughput", **vars(case), **result})
    measured = [record for record in records if "failed" not in record]
    write_png = partial(plot_throughput, measured) if measured else None
    write_results(arguments.out / "train_throughput", records, throughput_markdown(records), write_png)
    return 0


if __name__ == "__main__":
    run_command(main)
