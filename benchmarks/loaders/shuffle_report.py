"""What the comparison of orders found: JSON lines, a Markdown table and a picture."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from benchmarks.common.harness import DEFAULT_OUT, table, write_lines, write_results
from benchmarks.loaders.shuffle_measures import Epoch, quality
from benchmarks.loaders.shuffle_orders import Found, Given
from trainer.runtime.env_info import collect_env_info

_DRAWS = 20  # of a uniform order, to tell chance from fault
_POINTS = 6_000  # of an order, in its picture
_OURS = "#1d4ed8"
_OTHERS = "#57534e"
_HEAD = {
    "neighbour_pairs": "neighbours in a batch",
    "repeated_pairs": "pairs repeated",
    "class_unevenness": "class unevenness",
    "mean_class_run": "class run, mean",
    "longest_class_run": "longest",
    "reach": "reach",
    "displacement": "place ~ row",
    "same_order": "epoch ~ next",
}


def write(found: Found, batch_size: int, out: Path | None, json: Path | None) -> None:
    """Print the table and write shuffle_quality.jsonl, .md and .png, and the further file of lines if asked for."""
    records = measure(found, batch_size)
    if json is not None:
        write_lines(json, records)
    picture = functools.partial(draw, found, records)
    write_results((out or DEFAULT_OUT) / "shuffle_quality", records, markdown(records, found), picture)


def measure(found: Found, batch_size: int) -> list[dict[str, Any]]:
    """A record for each order, with the range that each measure has for uniform orders of the same batches."""
    samples = len(found.labels)
    random = np.random.default_rng(0)
    uniform = [quality([_uniform(random, samples, batch_size) for _ in range(2)], found.labels) for _ in range(_DRAWS)]
    drawn = [one.to_json() for one in uniform]
    ranges = {name: [min(one[name] for one in drawn), max(one[name] for one in drawn)] for name in _HEAD}
    stamp = collect_env_info(torch.device("cpu"))
    return [
        {
            "name": given.name,
            "note": given.note,
            "samples": samples,
            "batch_size": batch_size,
            "epochs": len(given.epochs),
            "given": sum(len(rows) for rows in given.epochs[0]) / samples,
            **quality(given.epochs, found.labels).to_json(),
            "uniform": ranges,
            "environment": stamp,
        }
        for given in found.orders
    ]


def _uniform(random: np.random.Generator, samples: int, batch_size: int) -> Epoch:
    rows = random.permutation(samples)
    return [rows[start : start + batch_size] for start in range(0, samples - batch_size + 1, batch_size)]


def markdown(records: list[dict[str, Any]], found: Found) -> str:
    ranges = records[0]["uniform"]
    rows = [["uniform", *(f"{_figure(low)} .. {_figure(high)}" for low, high in ranges.values())]]
    rows += [[record["name"], *(_figure(record[name]) for name in _HEAD)] for record in records]
    first = records[0]
    notes = [
        f"{first['samples']:,} samples sorted by class, batches of {first['batch_size']}, {first['epochs']} epochs; "
        f"uniform: the range of {_DRAWS} draws",
        "neighbours in a batch: how often samples that lie side by side in the source share a batch, and pairs "
        "repeated: how often two that shared one share one in the next epoch again, both as a multiple of chance",
        "class unevenness: chi-square of the classes in a batch, as a multiple of chance; reach: of the first batch; "
        "place ~ row, epoch ~ next: correlations",
    ]
    notes += [f"{record['name']}: {record['note']}" for record in records]
    notes += [f"{name}: skipped, {reason}" for name, reason in found.skipped.items()]
    notes += [f"{name}: FAILED, {reason}" for name, reason in found.failed.items()]
    return table(["order", *_HEAD.values()], rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def draw(found: Found, records: list[dict[str, Any]], path: Path) -> None:
    """A panel for each order: in which order the first epoch gives the rows. A uniform one fills it evenly."""
    columns = min(5, len(found.orders))
    rows = -(-len(found.orders) // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(2.7 * columns, 2.95 * rows + 0.9),
        dpi=140,
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    for axes in panels.flat[len(found.orders) :]:
        axes.remove()
    for axes, given, record in zip(panels.flat, found.orders, records, strict=False):
        _panel(axes, given, record, len(found.labels))
    first = records[0]
    figure.suptitle(
        "Which rows come when: the first epoch of each order", x=0.015, ha="left", fontsize=14, weight="bold"
    )
    figure.supxlabel(
        f"place in the epoch, of {first['samples']:,} samples in batches of {first['batch_size']}; an evenly filled "
        "square is a full shuffle. Neighbours in a batch, pairs repeated in the next epoch: multiples of chance",
        fontsize=9.5,
        color="#57534e",
    )
    figure.supylabel("row in the source, which is sorted by class", fontsize=9.5, color="#57534e")
    with path.open("wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def _panel(axes: Axes, given: Given, record: dict[str, Any], samples: int) -> None:
    order = np.concatenate(given.epochs[0])
    chosen = np.sort(np.random.default_rng(0).choice(len(order), min(_POINTS, len(order)), replace=False))
    ours = given.name.startswith("inkstream")
    color = _OURS if ours else _OTHERS
    axes.plot(chosen / samples, order[chosen] / samples, ".", color=color, markersize=1.3, markeredgewidth=0)
    axes.set_title(given.name, loc="left", fontsize=10, weight="bold" if ours else "normal", color=color, pad=16)
    axes.text(
        0,
        1.025,
        f"neighbours {_figure(record['neighbour_pairs'])}, repeats {_figure(record['repeated_pairs'])}",
        transform=axes.transAxes,
        fontsize=8,
        color="#57534e",
        in_layout=False,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)
