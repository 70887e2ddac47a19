"""Report of the shuffle benchmark: JSON lines, Markdown table and chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from benchmarks.common.charts import MUTED, SERIES, Chart, grid, set_title
from benchmarks.common.harness import write_lines, write_results
from benchmarks.common.text import bullets, markdown_table
from benchmarks.loaders.shuffle_measures import Epoch, measure_quality
from benchmarks.loaders.shuffle_orders import LoaderOrder, OrderResults
from shards.cli import plural
from trainer.runtime.env_info import collect_env_info

_UNIFORM_ORDERS = 20  # random permutations, for the range of chance
_MAX_POINTS = 6_000  # samples per panel of the chart
_TITLES = {
    "neighbour_pairs": "neighbours in a batch",
    "repeated_pairs": "pairs repeated",
    "class_unevenness": "class unevenness",
    "mean_class_run": "class run, mean",
    "longest_class_run": "longest",
    "reach": "reach",
    "displacement": "position ~ index",
    "same_order": "epoch ~ next",
}


def write_report(results: OrderResults, batch_size: int, out: Path, json: Path | None) -> None:
    """Print the table and write shuffle_quality.jsonl, .md and .png, and the additional file of JSON lines."""
    records = make_records(results, batch_size)
    if json is not None:
        write_lines(json, records)
    write_png = partial(plot_orders, results, records)
    write_results(out / "shuffle_quality", records, shuffle_markdown(records, results), write_png)


def make_records(results: OrderResults, batch_size: int) -> list[dict[str, Any]]:
    """Measure each order; `uniform` holds the range of each measure over uniform orders of the same batches."""
    samples = len(results.labels)
    random = np.random.default_rng(0)
    uniform = [
        asdict(measure_quality([_uniform_epoch(random, samples, batch_size) for _ in range(2)], results.labels))
        for _ in range(_UNIFORM_ORDERS)
    ]
    ranges = {name: [min(one[name] for one in uniform), max(one[name] for one in uniform)] for name in _TITLES}
    machine = collect_env_info(torch.device("cpu"))
    return [
        {
            "name": order.name,
            "note": order.note,
            "samples": samples,
            "batch_size": batch_size,
            "epochs": len(order.epochs),
            "given": sum(map(len, order.epochs[0])) / samples,
            **asdict(measure_quality(order.epochs, results.labels)),
            "uniform": ranges,
            "environment": machine,
        }
        for order in results.orders
    ]


def _uniform_epoch(random: np.random.Generator, samples: int, batch_size: int) -> Epoch:
    order = random.permutation(samples)
    return [order[start : start + batch_size] for start in range(0, samples - batch_size + 1, batch_size)]


def shuffle_markdown(records: Sequence[dict[str, Any]], results: OrderResults) -> str:
    """Format the table and its explanation."""
    first = records[0]
    rows = [["uniform", *(f"{_number(low)} .. {_number(high)}" for low, high in first["uniform"].values())]]
    rows += [[record["name"], *(_number(record[name]) for name in _TITLES)] for record in records]
    notes = [
        f"{plural(first['samples'], 'sample')} sorted by class, batch size {first['batch_size']}, "
        f"{plural(first['epochs'], 'epoch')}; uniform: range of {_UNIFORM_ORDERS} random permutations",
        "neighbours in a batch: how often adjacent samples of the source share a batch; pairs repeated: how often two "
        "samples that share a batch share one in the next epoch; both as a multiple of chance",
        "class unevenness: chi-square of the classes in a batch, as a multiple of chance; reach: of the first batch; "
        "position ~ index, epoch ~ next: correlations",
    ]
    notes += [f"{record['name']}: {record['note']}" for record in records]
    notes += [f"{name}: skipped, {reason}" for name, reason in results.skipped.items()]
    notes += [f"{name}: FAILED, {reason}" for name, reason in results.failed.items()]
    return f"{markdown_table(['order', *_TITLES.values()], rows)}\n\n{bullets(notes)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def plot_orders(results: OrderResults, records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot source index over position in the first epoch, a panel per order. A uniform order fills it evenly."""
    panels = grid(len(results.orders), 5)
    first = records[0]

    def draw(axes_list: Sequence[Axes]) -> None:
        for axes, order, record in zip(axes_list, results.orders, records, strict=True):
            _draw_order(axes, order, record, len(results.labels))

    Chart(
        draw,
        size=(2.7 * len(panels[0]), 2.95 * len(panels) + 0.9),
        panels=panels,
        title="Source index (sorted by class) over position in the first epoch",
        note=f"{plural(first['samples'], 'sample')}, batch size {first['batch_size']}. A complete shuffle fills the "
        "square evenly. Neighbours in a batch and pairs repeated in the next epoch are multiples of chance.",
    ).write_png(path)


def _draw_order(axes: Axes, order: LoaderOrder, record: dict[str, Any], samples: int) -> None:
    indices = np.concatenate(order.epochs[0])
    positions = np.random.default_rng(0).choice(len(indices), min(_MAX_POINTS, len(indices)), replace=False)
    is_ours = order.name.startswith("inkstream")
    color = SERIES[0] if is_ours else MUTED
    axes.plot(positions / samples, indices[positions] / samples, ".", color=color, markersize=1.3, markeredgewidth=0)
    pairs = f"neighbours {_number(record['neighbour_pairs'])}, repeats {_number(record['repeated_pairs'])}"
    set_title(axes, order.name, pairs, fontsize=10, fontweight="bold" if is_ours else "normal", color=color)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
