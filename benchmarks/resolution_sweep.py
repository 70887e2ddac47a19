"""What does each resolution cost, and what does it buy?

    python benchmarks/resolution_sweep.py [--shards DIR] [--resolutions 28,56,112] [--epochs N] [--out DIR]

Without arguments: a packed EMNIST ByClass if there is one, the digits inside scikit-learn otherwise; at most 2,000
training images and a small network, in under five minutes on two cores. Every resolution is measured in a fresh
process. Writes resolution_sweep.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.harness import Spread, in_process, rates, size, table, write_lines
from pipeline.backend import make_graph
from pipeline.pack import pack
from pipeline.sources import Request, find_source
from shards import Manifest, UserError, open_part
from shards.atomic import write_file
from shards.errors import run_command
from shards.manifest import is_packed_set
from shards.places import local_set
from trainer import engine
from trainer.arithmetic import with_precision
from trainer.config import validate
from trainer.data import evaluation_loader, open_data
from trainer.distributed import join
from trainer.environment import environment
from trainer.run_directory import RunDirectory
from trainer.training import make_training

DEFAULT_OUT = Path("benchmarks/out")
PACKED_EMNIST = Path("data/shards/emnist-byclass")
PACKED_DIGITS = Path("data/shards/digits")
RESOLUTIONS = (28, 56, 112)
TRAINING_IMAGES = 2_000
TEST_IMAGES = 10_000  # of a larger test part the first in packed order, which is random
EPOCHS = 5
LOADER_RUNS = 5
LOADER_IMAGES = 32_768  # of one run, in as many passes over the training part as that takes


def measure(shards: Path, resolution: int, subset: float, epochs: int, model: str) -> dict[str, Any]:
    """Everything about one resolution; called in a process of its own."""
    settings = validate(_recipe(shards, resolution, subset, epochs, model), "the sweep")
    with join("auto") as world, tempfile.TemporaryDirectory() as run:
        settings = with_precision(settings, world.device)
        data = open_data(settings, world)
        test_samples = data.test.order.samples[:TEST_IMAGES]
        graph = make_graph(data.spec, data.backend, world.device, settings.loader.batch_size)
        data = replace(data, test=evaluation_loader(data.test_store, test_samples, graph, settings, world))
        passes = max(1, LOADER_IMAGES // len(data.train.samples))

        def load() -> int:
            images = 0
            for epoch in range(passes):
                for batch in data.train.batches(epoch):
                    images += len(batch.labels)
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            return images

        loader = rates({"loader": load}, runs=LOADER_RUNS)["loader"]
        training = make_training(settings, data, world)
        directory = RunDirectory(Path(run))
        start = time.perf_counter()
        with directory.held(), contextlib.redirect_stdout(io.StringIO()):
            evaluation = engine.fit(training, directory, sinks=[])
        device_memory = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
        return {
            "loader_images_per_second": loader.to_json(),
            "loader_backend": data.backend,
            "training_images": len(data.train.samples),
            "training_images_per_second": Spread.of(
                # The first epoch warms up; of a single one there is nothing else.
                [record["images_per_second"] for record in training.history[1:] or training.history]
            ).to_json(),
            "data_wait_share": training.finished.wait_share,
            "seconds": time.perf_counter() - start,
            "peak_device_memory_bytes": device_memory,
            "precision": settings.trainer.precision,
            "environment": environment(world.device),
            **evaluation.summary(),
        }


def _recipe(shards: Path, resolution: int, subset: float, epochs: int, model: str) -> dict[str, Any]:
    return {
        "data": {"shards": str(shards), "resolution": resolution, "subset": subset, "validation": 0.1},
        "loader": {"batch_size": 64},
        "model": {"name": model, "drop_rate": 0.3},
        "optim": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "one_cycle", "warmup": 1},
        "trainer": {"epochs": epochs},
    }


def sweep(shards: Path, resolutions: list[int], subset: float, epochs: int, model: str) -> list[dict[str, Any]]:
    """Measure each resolution in turn; a point that runs out of memory is kept as such, and the sweep goes on."""
    manifests = [open_part(shards, part).manifest for part in ("train", "test")]
    samples = sum(manifest.samples for manifest in manifests)
    channels = manifests[0].image_shape[2]
    records = []
    for resolution in resolutions:
        print(f"{resolution}x{resolution} ...", flush=True)
        record = {
            "name": "resolution_sweep",
            "dataset": manifests[0].name,
            "model": model,
            "resolution": resolution,
            "epochs": epochs,
            "subset": subset,
            "bytes_at_rest": sum(manifest.packed_bytes for manifest in manifests),
            "bytes_pre_resized_uint8": samples * resolution**2 * channels,
            "bytes_pre_resized_float32": samples * resolution**2 * channels * 4,
        }
        records.append(record | in_process(measure, shards, resolution, subset, epochs, model))
    return records


def markdown(records: list[dict[str, Any]]) -> str:
    head = [
        "resolution",
        "loader images/s (range)",
        "training images/s (range)",
        "data wait",
        "peak memory",
        "at rest",
        "pre-resized (uint8 / float32)",
        "accuracy",
        "macro F1",
    ]
    rows = []
    for record in records:
        pre_resized = f"{size(record['bytes_pre_resized_uint8'])} / {size(record['bytes_pre_resized_float32'])}"
        if "failed" in record:
            failed = [record["failed"], "", "", ""]
            rows.append([str(record["resolution"]), *failed, size(record["bytes_at_rest"]), pre_resized, "", ""])
            continue
        rows.append(
            [
                str(record["resolution"]),
                _spread(record["loader_images_per_second"]),
                _spread(record["training_images_per_second"]),
                f"{record['data_wait_share']:.1%}",
                size(record["peak_memory_bytes"]),
                size(record["bytes_at_rest"]),
                pre_resized,
                f"{record['accuracy']:.2%}",
                f"{record['macro_f1']:.2%}",
            ]
        )
    return table(head, rows)


def _spread(measured: dict[str, float]) -> str:
    return f"{measured['median']:,.0f} ({measured['low']:,.0f} .. {measured['high']:,.0f})"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against training throughput, a point for each resolution, with one standard error of the accuracy."""
    measured = [record for record in records if "failed" not in record]
    speed = [record["training_images_per_second"]["median"] for record in measured]
    accuracy = [100 * record["accuracy"] for record in measured]
    errors = [100 * (record["accuracy"] * (1 - record["accuracy"]) / record["samples"]) ** 0.5 for record in measured]
    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=160, layout="constrained")
    axes.errorbar(speed, accuracy, yerr=errors, color="#1d4ed8", marker="o", markersize=7, capsize=3, linewidth=1.5)
    for record, x, y in zip(measured, speed, accuracy, strict=True):
        axes.annotate(
            f"{record['resolution']} px",
            (x, y),
            xytext=(10, 10),
            textcoords="offset points",
            fontsize=11,
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    axes.set_xscale("log")
    axes.set_xlim(min(speed) / 1.4, max(speed) * 1.7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel("training throughput, images/s (log scale)")
    axes.set_ylabel("test accuracy, %")
    first = measured[0]
    axes.set_title(
        f"{first['dataset']}: what each resolution costs and buys", loc="left", fontsize=13, weight="bold", pad=24
    )
    axes.text(
        0,
        1.03,
        f"{first['model']}, {first['training_images']:,} training images, {first['epochs']} epochs each; "
        f"bars: one standard error",
        transform=axes.transAxes,
        fontsize=9.5,
        color="#57534e",
    )
    axes.grid(color="#e7e5e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with path.open("wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def choose_set(shards: str | None) -> Path:
    """The packed set to measure: the one named, a packed EMNIST, or the embedded digits, packed if need be."""
    if shards is not None:
        return local_set(shards)
    if is_packed_set(PACKED_EMNIST):
        return PACKED_EMNIST
    source = find_source("digits")
    pack(lambda: source.load(Request(Path())), PACKED_DIGITS, dataset=source.name)
    return PACKED_DIGITS


def _resolutions(text: str) -> list[int]:
    try:
        resolutions = [int(word) for word in text.split(",")]
        if min(resolutions) < 1:
            raise ValueError
    except ValueError:
        raise UserError(
            found=f"--resolutions {text}", expected="sides in pixels with commas", hint="--resolutions 28,56,112"
        ) from None
    return resolutions


def main() -> int:
    parser = argparse.ArgumentParser(description="What does each resolution cost, and what does it buy?")
    parser.add_argument(
        "--shards", metavar="DIR", help="packed set or its address (default: EMNIST ByClass, or digits)"
    )
    parser.add_argument("--resolutions", default=",".join(map(str, RESOLUTIONS)), help="sides in pixels, with commas")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs at every resolution")
    parser.add_argument("--images", type=int, default=TRAINING_IMAGES, help="most training images, chosen by class")
    parser.add_argument("--model", default="three_block_cnn", help="three_block_cnn or a timm model")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where to write the results")
    arguments = parser.parse_args()
    resolutions = _resolutions(arguments.resolutions)
    shards = choose_set(arguments.shards)
    available = Manifest.read(shards / "train").samples
    subset = min(1.0, arguments.images / available)
    records = sweep(shards, resolutions, subset, arguments.epochs, arguments.model)
    out = arguments.out / "resolution_sweep"
    write_lines(out.with_suffix(".jsonl"), records)
    text = markdown(records)
    write_file(out.with_suffix(".md"), text + "\n")
    print(text)
    if any("failed" not in record for record in records):
        draw(records, out.with_suffix(".png"))
        print(f"\n{out}.jsonl, .md, .png")
    return 0


if __name__ == "__main__":
    run_command(main)
