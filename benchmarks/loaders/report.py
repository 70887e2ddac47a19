"""What the comparison of loaders found: JSON lines, Markdown tables, a picture and the ratios that count."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.common.harness import size, table, write_lines, write_results
from benchmarks.loaders.baselines import LISTINGS
from benchmarks.loaders.runs import Results
from benchmarks.loaders.setting import Setting

_OURS = "#1d4ed8"
_OTHERS = "#78716c"
_FLOOR = "#b45309"
_BATCHED = "batched"


def write_records(results: Results, setting: Setting) -> None:
    """Write loader_throughput.jsonl, and the further file of lines if asked for."""
    for path in (setting.out / "loader_throughput.jsonl", setting.json):
        if path is not None:
            write_lines(path, results.records)


def write(results: Results, setting: Setting) -> None:
    """Print the tables and write loader_throughput.jsonl, .md and .png."""
    loading = any(record["variant"] != "reading" for record in results.records)
    picture = functools.partial(draw, results.records) if loading else None
    write_results(setting.out / "loader_throughput", results.records, markdown(results), picture)


def markdown(results: Results) -> str:
    parts = []
    reading = [record for record in results.records if record["variant"] == "reading"]
    loading = [record for record in results.records if record["variant"] != "reading"]
    for resolution in dict.fromkeys(record["resolution"] for record in loading):
        here = [record for record in loading if record["resolution"] == resolution]
        parts += [f"### {resolution}x{resolution}", _table(here)]
        lines = ratios(here)
        if lines:
            parts.append("\n".join(f"- {line}" for line in lines))
    if reading:
        parts += ["### Reading alone", _table(reading)]
    parts += ["### What was run", "\n".join(f"- {line}" for line in _notes(results))]
    return "\n\n".join(parts)


def _table(records: Sequence[dict[str, Any]]) -> str:
    head = ["loader", "variant", "workers", "images/s (range)", "CPU-s / 1,000", "bytes/image", "pack", "first batch"]
    head += ["peak memory", "reach", "max error"]
    on_gpu = any("gpu_milliseconds_per_thousand" in record for record in records)
    rows = []
    for record in sorted(records, key=lambda record: -record["images_per_second"]):
        low, high = record["images_per_second_low"], record["images_per_second_high"]
        row = [
            record["name"],
            record["variant"],
            str(record["workers"]),
            f"{record['images_per_second']:,.0f} ({low:,.0f} .. {high:,.0f})",
            f"{record['cpu_seconds_per_thousand']:.4f}",
            f"{record['bytes_per_image']:,.0f}",
            f"{record['pack_seconds']:.2f} s",
            f"{record['first_batch_seconds']:.2f} s",
            size(record["peak_memory_bytes"]),
            f"{record['reach']:.3f}",
            f"{record['max_error']:.1e}",
        ]
        rows.append(row + ([f"{record['gpu_milliseconds_per_thousand']:.3f}"] if on_gpu else []))
    return table(head + (["GPU-ms / 1,000"] if on_gpu else []), rows)


def ratios(records: Sequence[dict[str, Any]]) -> list[str]:
    """Our loaders at one resolution against the best of what counts, a line each."""
    rivals = {
        "the best torch DataLoader, image by image": _best(records, "torch-dataloader", without=_BATCHED),
        "its batched form": _best(records, "torch-dataloader", only=_BATCHED),
        "ffcv": _best(records, "ffcv"),
        "plain torch": _best(records, "plain-torch"),
        "the floor": _best(records, "floor"),
        "the floor with new memory for every batch": _best(records, "floor", only="fresh"),
    }
    lines = []
    for ours in (record for record in records if LISTINGS[record["name"]].ours):
        shares = [
            f"{ours['images_per_second'] / rival['images_per_second']:,.2f} times {name}"
            for name, rival in rivals.items()
            if rival
        ]
        if shares:
            lines.append(f"{ours['name']}: {', '.join(shares)}")
    return lines


def _best(records: Sequence[dict[str, Any]], name: str, only: str = "", without: str = "") -> dict[str, Any] | None:
    found = [
        record
        for record in records
        if record["name"] == name and (not only or record["variant"] == only) and record["variant"] != without
    ]
    return max(found, key=lambda record: record["images_per_second"], default=None)


def _notes(results: Results) -> list[str]:
    """What each variant is, what was skipped and what failed."""
    lines = []
    if results.records:
        first = results.records[0]
        machine = first["environment"]
        lines.append(
            f"{first['dataset']}, {first['samples']:,} images, batches of {first['batch_size']} on {first['device']}, "
            f"median and range of {first['runs']} runs; {machine['cores']} cores of {machine['processor']}"
            + (f", {machine['device']}" if machine["device"] != "cpu" else "")
        )
        lines.append("packages: " + ", ".join(f"{name} {found}" for name, found in machine["packages"].items()))
    lines += dict.fromkeys(f"{record['name']} {record['variant']}: {record['note']}" for record in results.records)
    lines += [f"{name}: skipped, {reason}" for name, reason in results.skipped.items()]
    lines += [f"{title}: FAILED, {reason}" for title, reason in results.failed.items()]
    return lines


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each resolution and a row for each loader: its fastest variant a full dot, the others hollow ones."""
    loading = [record for record in records if record["variant"] != "reading"]
    resolutions = list(dict.fromkeys(record["resolution"] for record in loading))
    loaders = len({record["name"] for record in loading})
    columns = min(2, len(resolutions))
    rows = -(-len(resolutions) // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(6.6 * columns, rows * (0.3 * loaders + 1.0) + 1.0),
        dpi=140,
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    for axes in panels.flat[len(resolutions) :]:
        axes.remove()
    for axes, resolution in zip(panels.flat, resolutions, strict=False):
        _panel(axes, [record for record in loading if record["resolution"] == resolution])
        axes.set_title(f"{resolution}x{resolution}", loc="left", fontsize=12, weight="bold")
    first = loading[0]
    machine = first["environment"]
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['cores']} cores of {machine['processor']}"
    figure.suptitle(
        f"{first['dataset']}: images a second of each loader, shuffled batches of {first['batch_size']}",
        x=0.015,
        ha="left",
        fontsize=14,
        weight="bold",
    )
    figure.supxlabel(
        f"images/s, log scale. Full dot: the fastest variant, hollow: others, as documented among them. {where}",
        fontsize=9.5,
        color="#57534e",
    )
    with path.open("wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def _panel(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    best = [_best(records, name) for name in {record["name"] for record in records}]
    best = sorted((record for record in best if record), key=lambda record: record["images_per_second"])
    for place, record in enumerate(best):
        name, speed = record["name"], record["images_per_second"]
        ours = LISTINGS[name].ours
        color = _OURS if ours else _FLOOR if name == "floor" else _OTHERS
        others = [one["images_per_second"] for one in records if one["name"] == name and one is not record]
        axes.plot([min([speed, *others]), speed], [place, place], color=color, linewidth=2.2, solid_capstyle="round")
        axes.plot(others, [place] * len(others), "o", color="white", markeredgecolor=color, markersize=6)
        axes.plot(speed, place, "o", color=color, markersize=9 if ours else 8)
        plain = record["variant"] in ("best", "default")
        axes.annotate(
            f"{speed:,.0f}" + ("" if plain else f"  {record['variant']}"),
            (speed, place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            weight="bold" if ours else "normal",
            color=_OURS if ours else "#1c1917",
        )
    speeds = [record["images_per_second"] for record in records]
    axes.set_xscale("log")
    axes.set_xlim(min(speeds) / 1.6, max(speeds) * 6)  # room for the numbers
    axes.set_ylim(-0.6, len(best) - 0.4)
    axes.set_yticks(range(len(best)), [record["name"] for record in best], fontsize=9.5)
    for label, record in zip(axes.get_yticklabels(), best, strict=True):
        if LISTINGS[record["name"]].ours:
            label.set(weight="bold", color=_OURS)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#f0efed", linewidth=7)
    axes.grid(axis="x", color="#e7e5e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
