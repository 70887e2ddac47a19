"""How close does the whole training loop come to one whose batches lie on the device already?

    python benchmarks/train_throughput.py [--device auto] [--shards DIR] [--resolutions 112,56] [--models A,B]
                                          [--batches 512,1024] [--precisions bf16,fp32] [--compile default,off]

The first value of each list makes the base; every other value is measured with the base of the others, each in a fresh
process. Without arguments: a packed EMNIST ByClass if there is one, the digits inside scikit-learn otherwise; a small
network on a CPU (about five minutes on two cores), EfficientNet-B2 at 112x112 on a GPU. Writes
train_throughput.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import DEFAULT_OUT, in_process, size, table, write_results
from benchmarks.training.loop import Setting, measure
from pipeline.common.device import choose_device
from shards import Manifest
from shards.cli import run_command
from shards.errors import UserError

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


def settings_of(lists: dict[str, str]) -> list[Setting]:
    """The base, and each other value with the base of the others."""
    columns = [_numbers(lists["resolutions"]), lists["models"].split(","), _numbers(lists["batches"])]
    columns += [lists["precisions"].split(","), lists["compile"].split(",")]
    base = [column[0] for column in columns]
    found = [Setting(*base)]
    for place, column in enumerate(columns):
        found += [Setting(*base[:place], value, *base[place + 1 :]) for value in column[1:]]
    return found


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
        if min(numbers) < 1:
            raise ValueError
    except ValueError:
        raise UserError(found=text, expected="numbers above 0 with commas", hint="for instance 28,56") from None
    return numbers


def markdown(records: list[dict[str, Any]]) -> str:
    head = ["setting", "whole loop images/s (range)"]
    head += ["synthetic images/s (range)", "whole of synthetic (range)", "data wait", "ms a step", "memory"]
    rows = []
    for record in records:
        if "failed" in record:
            rows.append([name_of(record), record["failed"], "", "", "", "", ""])
            continue
        share = record["whole_of_synthetic"]
        rows.append(
            [
                name_of(record),
                _range(record["whole_images_per_second"]),
                _range(record["synthetic_images_per_second"]),
                f"{share['median']:.1%} ({share['low']:.1%} .. {share['high']:.1%})",
                f"{record['data_wait_share']['median']:.2%}",
                f"{record['step_milliseconds']['median']:.1f}",
                size(record["peak_device_memory_bytes"] or record["peak_memory_bytes"]),
            ]
        )
    return table(head, rows)


def name_of(record: dict[str, Any]) -> str:
    compiled = "" if record["compile"] == "off" else f", compiled ({record['compile']})"
    return (
        f"{record['model']}, {record['resolution']} px, batch {record['batch_size']}, {record['precision']}{compiled}"
    )


def _range(measured: dict[str, float]) -> str:
    return f"{measured['median']:,.0f} ({measured['low']:,.0f} .. {measured['high']:,.0f})"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """For each setting the share of the synthetic loop's throughput that the whole loop reaches, with its range."""
    shares = [record["whole_of_synthetic"] for record in records]
    middle = [100 * share["median"] for share in shares]
    below = [100 * (share["median"] - share["low"]) for share in shares]
    above = [100 * (share["high"] - share["median"]) for share in shares]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.42 * len(records)), dpi=160, layout="constrained")
    places = range(len(records))
    axes.barh(places, middle, 0.62, xerr=[below, above], color="#1d4ed8", ecolor="#a8a29e", capsize=2)
    for place, record in zip(places, records, strict=True):
        rate, wait = record["whole_images_per_second"]["median"], record["data_wait_share"]["median"]
        words = f"{rate:,.0f} images/s, data wait {wait:.2%}"
        axes.annotate(words, (1.5, place), va="center", fontsize=8, color="white")
    axes.axvline(100 * TARGET, color="#b45309", linewidth=1.2, linestyle="--")
    axes.annotate(f"{TARGET:.0%} ", (100 * TARGET, -0.75), ha="right", fontsize=8, color="#b45309")
    axes.set_yticks(places, [name_of(record) for record in records], fontsize=8)
    axes.set_ylim(len(records) - 0.5, -1.1)
    axes.set_xlim(0, max(105.0, *(100 * share["high"] + 2 for share in shares)))
    axes.set_xlabel("whole loop, % of the throughput with batches that lie on the device already")
    axes.set_title("What loading leaves of the training throughput", loc="left", fontsize=12, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    with path.open("wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="How close does the training loop come to one that never waits?")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    parser.add_argument("--shards", metavar="DIR", help="packed set or its address (default: EMNIST, or digits)")
    for name in LISTS["cpu"]:
        parser.add_argument(f"--{name}", metavar="A,B", help="with commas, the base first")
    parser.add_argument("--images", type=int, metavar="N", help="most training images (default: all)")
    parser.add_argument("--runs", type=int, default=RUNS, help="of either loop; the median counts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a run, at least")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where to write the results")
    arguments = parser.parse_args()
    device = choose_device(arguments.device).type
    given = {name: getattr(arguments, name) for name in LISTS[device] if getattr(arguments, name)}
    settings = settings_of(LISTS[device] | given)
    shards = choose_set(arguments.shards)
    samples = Manifest.read(shards / "train").samples
    subset = min(1.0, arguments.images / samples) if arguments.images else 1.0
    records = []
    for setting in settings:
        print(f"{name_of(vars(setting))} ...", flush=True)
        found = in_process(measure, shards, setting, device, subset, arguments.runs, arguments.seconds)
        records.append({"name": "train_throughput", **vars(setting), **found})
    drawn = [record for record in records if "failed" not in record]
    picture = functools.partial(draw, drawn) if drawn else None
    write_results(arguments.out / "train_throughput", records, markdown(records), picture)
    return 0


if __name__ == "__main__":
    run_command(main)
