"""Report of the loader benchmark: JSON lines, Markdown tables, chart and speed ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common.charts import CARD, INK, MUTED, SERIES, Chart, grid, plain_numbers, set_row_labels
from benchmarks.common.harness import write_lines, write_results
from benchmarks.common.text import bullets, format_bytes, format_machine, markdown_table, tabulate
from benchmarks.loaders.baselines import REGISTRY
from benchmarks.loaders.runs import BenchmarkResults
from benchmarks.loaders.setting import BenchmarkConfig
from shards.cli import plural

_BATCHED = "batched"


def write_records(results: BenchmarkResults, config: BenchmarkConfig) -> None:
    """Write loader_throughput.jsonl, and the additional file of JSON lines if there is one."""
    for path in (config.out / "loader_throughput.jsonl", config.json):
        if path is not None:
            write_lines(path, results.records)


def write_report(results: BenchmarkResults, config: BenchmarkConfig) -> None:
    """Print the tables and write loader_throughput.jsonl, .md and .png."""
    has_loaders = any(record["variant"] != "reading" for record in results.records)
    write_png = partial(plot_loaders, results.records) if has_loaders else None
    write_results(config.out / "loader_throughput", results.records, loader_markdown(results), write_png)


def loader_markdown(results: BenchmarkResults) -> str:
    """Format a table and the ratios per resolution, the table of reading alone and the conditions."""
    blocks = []
    reading = [record for record in results.records if record["variant"] == "reading"]
    loading = [record for record in results.records if record["variant"] != "reading"]
    for resolution in dict.fromkeys(record["resolution"] for record in loading):
        records = [record for record in loading if record["resolution"] == resolution]
        blocks += [f"### {resolution}x{resolution}", _table(records), bullets(ratios(records))]
    if reading:
        blocks += ["### Reading alone", _table(reading)]
    blocks += ["### Conditions", bullets(_notes(results))]
    return "\n\n".join(filter(None, blocks))


def _table(records: Sequence[dict[str, Any]]) -> str:
    def images_per_second(record: dict[str, Any]) -> str:
        low, high = record["images_per_second_low"], record["images_per_second_high"]
        return f"{record['images_per_second']:,.0f} ({low:,.0f} .. {high:,.0f})"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "loader": lambda record: record["name"],
        "variant": lambda record: record["variant"],
        "workers": lambda record: str(record["workers"]),
        "images/s (range)": images_per_second,
        "CPU-s / 1,000": lambda record: f"{record['cpu_seconds_per_thousand']:.4f}",
        "bytes/image": lambda record: f"{record['bytes_per_image']:,.0f}",
        "pack": lambda record: f"{record['pack_seconds']:.2f} s",
        "first batch": lambda record: f"{record['first_batch_seconds']:.2f} s",
        "peak memory": lambda record: format_bytes(record["peak_memory_bytes"]),
        "reach": lambda record: f"{record['reach']:.3f}",
        "max error": lambda record: f"{record['max_error']:.1e}",
    }
    if any("gpu_milliseconds_per_thousand" in record for record in records):
        columns["GPU-ms / 1,000"] = lambda record: f"{record['gpu_milliseconds_per_thousand']:.3f}"
    return markdown_table(*tabulate(columns, sorted(records, key=lambda record: -record["images_per_second"])))


def ratios(records: Sequence[dict[str, Any]]) -> list[str]:
    """Compare each loader of Inkstream at one resolution with the fastest references, one line per loader."""
    references = {
        "the fastest torch DataLoader image by image": _fastest(records, "torch-dataloader", exclude=_BATCHED),
        "its batched variant": _fastest(records, "torch-dataloader", variant=_BATCHED),
        "ffcv": _fastest(records, "ffcv"),
        "plain torch": _fastest(records, "plain-torch"),
        "the floor": _fastest(records, "floor"),
        "the floor with new memory for every batch": _fastest(records, "floor", variant="fresh"),
    }
    lines = []
    for record in records:
        if REGISTRY[record["name"]].is_ours:
            speeds = [
                f"{record['images_per_second'] / reference['images_per_second']:,.2f} times {name}"
                for name, reference in references.items()
                if reference
            ]
            lines += [f"{record['name']}: {', '.join(speeds)}"] if speeds else []
    return lines


def _fastest(
    records: Sequence[dict[str, Any]], name: str, variant: str | None = None, exclude: str | None = None
) -> dict[str, Any] | None:
    candidates = [
        record
        for record in records
        if record["name"] == name and variant in (None, record["variant"]) and record["variant"] != exclude
    ]
    return max(candidates, key=lambda record: record["images_per_second"], default=None)


def _notes(results: BenchmarkResults) -> list[str]:
    """Describe the conditions and variants, and list what was skipped or failed."""
    lines = []
    if results.records:
        first = results.records[0]
        machine = first["environment"]
        lines.append(
            f"{first['dataset']}, {plural(first['samples'], 'image')}, batch size {first['batch_size']} on "
            f"{first['device']}, median and range of {plural(first['runs'], 'run')}; {format_machine(machine)}"
        )
        lines.append("packages: " + ", ".join(f"{name} {version}" for name, version in machine["packages"].items()))
    lines += dict.fromkeys(f"{record['name']} {record['variant']}: {record['note']}" for record in results.records)
    lines += [f"{name}: skipped, {reason}" for name, reason in results.skipped.items()]
    return lines + [f"{title}: FAILED, {reason}" for title, reason in results.failed.items()]


def plot_loaders(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot a panel per resolution and a row per loader: the fastest variant filled, the others hollow."""
    loading = [record for record in records if record["variant"] != "reading"]
    resolutions = list(dict.fromkeys(record["resolution"] for record in loading))
    panels = grid(len(resolutions), 2)
    loaders = len({record["name"] for record in loading})
    first = loading[0]

    def draw(axes_list: Sequence[Axes]) -> None:
        for axes, resolution in zip(axes_list, resolutions, strict=True):
            _draw_resolution(axes, [record for record in loading if record["resolution"] == resolution])
            axes.set_title(f"{resolution}x{resolution}", fontsize=12)

    Chart(
        draw,
        size=(6.6 * len(panels[0]), len(panels) * (0.3 * loaders + 1.0) + 1.0),
        panels=panels,
        title=f"{first['dataset']}: loader throughput, shuffled, batch size {first['batch_size']}",
        note="images/s, logarithmic. Filled: fastest variant. Hollow: other variants, among them the documented one. "
        f"{format_machine(first['environment'])}",
    ).write_png(path)


def _draw_resolution(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    fastest = [record for name in {record["name"] for record in records} if (record := _fastest(records, name))]
    fastest.sort(key=lambda record: -record["images_per_second"])
    for row, record in enumerate(fastest):
        name, speed = record["name"], record["images_per_second"]
        is_ours = REGISTRY[name].is_ours
        color = SERIES[0] if is_ours else SERIES[1] if name == "floor" else MUTED
        others = [one["images_per_second"] for one in records if one["name"] == name and one is not record]
        axes.plot([min([speed, *others]), speed], [row, row], color=color, linewidth=2.2, solid_capstyle="round")
        axes.plot(others, [row] * len(others), "o", color=CARD, markeredgecolor=color, markersize=6)
        axes.plot(speed, row, "o", color=color, markersize=9 if is_ours else 8)
        variant = "" if record["variant"] in ("best", "default") else f"  {record['variant']}"
        text: dict[str, Any] = {"weight": "bold" if is_ours else "normal", "color": SERIES[0] if is_ours else INK}
        position: dict[str, Any] = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{speed:,.0f}{variant}", (speed, row), fontsize=9, **position, **text)
    speeds = [record["images_per_second"] for record in records]
    axes.set_xscale("log")
    axes.set_xlim(min(speeds) / 1.6, max(speeds) * 12)  # room for the numbers
    plain_numbers(axes.xaxis, minor=False)
    set_row_labels(axes, [record["name"] for record in fastest])
    for label, record in zip(axes.get_yticklabels(), fastest, strict=True):
        if REGISTRY[record["name"]].is_ours:
            label.set(weight="bold", color=SERIES[0])
