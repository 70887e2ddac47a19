"""The pictures of a resolution study: one drawing for the PNG and for the page, where style sheets give the colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.sweep.stats import BY_EPOCHS, BY_TIME, Cell, Growth, pareto
from benchmarks.sweep.text import Findings, Panel, run_name

# In the page each of these becomes the variable of that name, which is another colour in the dark.
COLOURS = {
    "ink": "#1c1917",
    "muted": "#57534e",
    "rule": "#e7e5e4",
    "card": "#ffffff",
    "first": "#1d4ed8",
    "second": "#b45309",
    "third": "#0f766e",
    "fourth": "#9d174d",
}
_SERIES = [COLOURS[name] for name in ("first", "second", "third", "fourth")]
_MARGINS = {"h_pad": 0.1, "w_pad": 0.12}  # inches around each chart
_STYLE = {
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "inkstream",
}


def write_png(findings: Findings, path: Path) -> None:
    """Accuracy against throughput after either kind of run, a column for each subset; beneath it the costs."""
    with plt.rc_context(_STYLE):
        runs, subsets = _runs(findings), _subsets(findings)
        rows, columns = _grid(len(runs), len(subsets))
        figure = plt.figure(
            figsize=(6.2 * columns, 3.7 * rows + 4.3), dpi=140, layout="constrained", facecolor=COLOURS["card"]
        )
        upper, lower = figure.subfigures(2, 1, height_ratios=(3.7 * rows, 3.4))
        for each in (upper, lower):
            each.set_facecolor("none")
        figure.get_layout_engine().set(**_MARGINS)
        first = findings.first
        figure.suptitle(
            f"{first['dataset']}: what each resolution costs and buys", x=0.012, ha="left", fontsize=14, weight="bold"
        )
        _trades(upper.subplots(rows, columns, squeeze=False).flat, findings)
        costs, sizes = lower.subplots(1, 2)
        _costs(costs, findings.panels)
        costs.set_title("What an image costs", loc="left", fontsize=11, weight="bold")
        _sizes(sizes, findings)
        sizes.set_title("What the set takes on disk", loc="left", fontsize=11, weight="bold")
        figure.supxlabel(
            "Bars: one standard error. Full dot: no other is both faster and better (joined by the line). "
            "Ring: the smallest within one standard error of the best on the validation part.",
            fontsize=8.5,
            color=COLOURS["muted"],
        )
        with path.open("wb") as file:
            figure.savefig(file, format="png")
        plt.close(figure)


def svgs(findings: Findings) -> dict[str, str]:
    """The charts of the page, by name: trade, costs, sizes and, if they were compared, interpolation."""
    rows, columns = _grid(len(_runs(findings)), len(_subsets(findings)))
    drawn = {
        "trade": _svg(rows, columns, (5.6 * columns, 3.6 * rows), lambda axes: _trades(axes, findings)),
        "costs": _svg(1, 1, (5.6, 3.6), lambda axes: _costs(axes[0], findings.panels)),
        "sizes": _svg(1, 1, (5.6, 3.6), lambda axes: _sizes(axes[0], findings)),
    }
    if found := findings.interpolations():
        inches = (7, 0.5 * len(found) + 0.9)
        drawn["interpolation"] = _svg(1, 1, inches, lambda axes: _interpolations(axes[0], found))
    # Names within a picture, made so that no other picture of the page has them.
    return {name: re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", text) for name, text in drawn.items()}


def _svg(rows: int, columns: int, inches: tuple[float, float], draw: Callable[[list[Axes]], None]) -> str:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=inches, layout="constrained", squeeze=False)
        figure.set_facecolor("none")
        figure.get_layout_engine().set(**_MARGINS)
        draw(list(axes.flat))
        text = _as_svg(figure)
        plt.close(figure)
    return text


def _as_svg(figure: Figure) -> str:
    """The element alone, without a size or a colour of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)


def _runs(findings: Findings) -> list[str]:
    timed = any(cell.figure(BY_TIME, "accuracy") for cell in findings.cells)
    return [BY_EPOCHS, BY_TIME] if timed else [BY_EPOCHS]


def _subsets(findings: Findings) -> list[float]:
    return sorted({panel.subset for panel in findings.panels})


def _grid(runs: int, subsets: int) -> tuple[int, int]:
    """A column for each subset and a row for each run; of a single subset the runs side by side."""
    return (runs, subsets) if subsets > 1 else (1, runs)


def _trades(places: Sequence[Axes], findings: Findings) -> None:
    pairs = [(run, subset) for run in _runs(findings) for subset in _subsets(findings)]
    for axes, (run, subset) in zip(places, pairs, strict=True):
        _trade(axes, [panel for panel in findings.panels if panel.subset == subset], run)


def _trade(axes: Axes, panels: Sequence[Panel], run: str) -> None:
    """Test accuracy against training throughput: the models of one subset after one kind of run."""
    points: list[tuple[Cell, float, float, float]] = []
    for panel in panels:
        for cell in panel.cells:
            if found := cell.figure(run, "accuracy"):
                points.append((cell, cell.throughput, 100 * found.mean, 100 * (found.error or 0)))
    front = pareto([point[1:3] for point in points])
    axes.plot(
        [points[n][1] for n in front], [points[n][2] for n in front], color=COLOURS["rule"], linewidth=5, zorder=1
    )
    models = [panel.model for panel in panels]
    for number, (cell, speed, accuracy, error) in enumerate(points):
        place = models.index(cell.model)
        colour = _SERIES[place % len(_SERIES)]
        above = (7, 6 if place % 2 == 0 else -13)
        face = colour if number in front else COLOURS["card"]
        axes.errorbar(speed, accuracy, yerr=error, color=colour, capsize=3, linewidth=1.2, zorder=2)
        axes.plot(speed, accuracy, "o", color=face, markeredgecolor=colour, markersize=7, zorder=3)
        axes.annotate(
            str(cell.resolution), (speed, accuracy), above, textcoords="offset points", weight="bold", color=colour
        )
    for panel in panels:
        if choice := panel.choice(run):
            found = choice.chosen.figure(run, "accuracy")
            assert found is not None
            colour = _SERIES[models.index(panel.model) % len(_SERIES)]
            ring = {"markerfacecolor": "none", "markeredgecolor": colour, "markersize": 14, "zorder": 2}
            axes.plot(choice.chosen.throughput, 100 * found.mean, "o", **ring)
    axes.set_xscale("log")
    speeds = [point[1] for point in points]
    if speeds:
        axes.set_xlim(min(speeds) / 1.5, max(speeds) * 1.9)
    _plain_numbers(axes)
    axes.set_xlabel("training images/s")
    axes.set_ylabel("test accuracy, %")
    first = panels[0].cells[0].records[0]
    axes.set_title(f"After {run_name(run, first)}", loc="left", fontsize=11, weight="bold", pad=18)
    below = panels[0].title if len(panels) == 1 else panels[0].title.partition(", ")[2]
    axes.text(0, 1.025, below, transform=axes.transAxes, fontsize=9, color=COLOURS["muted"])
    _legend(axes, models)


def _legend(axes: Axes, models: Sequence[str]) -> None:
    if len(models) > 1:
        for number, model in enumerate(models):
            axes.plot([], [], "o", color=_SERIES[number % len(_SERIES)], label=model)
        axes.legend(fontsize=9)


def _costs(axes: Axes, panels: Sequence[Panel]) -> None:
    """Milliseconds an image by pixels, of training and of the loader, with the fitted lines."""
    by_model: dict[str, Panel] = {}
    for panel in panels:  # the one with most images
        if panel.model not in by_model or panel.subset > by_model[panel.model].subset:
            by_model[panel.model] = panel
    for number, panel in enumerate(by_model.values()):
        name = "training" if len(by_model) == 1 else panel.model
        costs = [1000 * cell.seconds_per_image for cell in panel.cells]
        _cost(axes, panel, costs, panel.growth()["training time"], name, _SERIES[number % len(_SERIES)], 1000)
    panel = next(iter(by_model.values()))
    costs = [cell.spread("loader_cpu_seconds_per_thousand").median for cell in panel.cells]
    _cost(axes, panel, costs, panel.growth()["loader's processor time"], "loader (CPU)", COLOURS["muted"], 1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sides = [cell.resolution for cell in panel.cells]
    axes.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides])
    axes.minorticks_off()
    axes.set_xlim(min(sides) ** 2 / 1.4, max(sides) ** 2 * 1.4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("pixels")
    axes.set_ylabel("ms an image")
    axes.legend(fontsize=9)


def _cost(
    axes: Axes, panel: Panel, costs: Sequence[float], fit: Growth | None, name: str, colour: str, unit: float
) -> None:
    """unit: by what the fitted cost is multiplied to become milliseconds."""
    pixels = [cell.resolution**2 for cell in panel.cells]
    label = name
    if fit is not None:
        error = f" ± {fit.error:.2f}" if fit.error is not None else ""
        label = f"{name}: pixels to the {fit.exponent:.2f}{error}"
        ends = [min(pixels), max(pixels)]
        axes.plot(ends, [unit * fit.factor * end**fit.exponent for end in ends], color=colour, linewidth=1.2, zorder=1)
    axes.plot(pixels, costs, "o", color=colour, markersize=6, label=label)


def _sizes(axes: Axes, findings: Findings) -> None:
    """Bytes at rest, which do not depend on the resolution, beside those of images resized beforehand."""
    cells = findings.main.cells
    sides = [cell.resolution for cell in cells]
    lines = (
        ("bytes_pre_resized_float32", "second", "resized beforehand, float32"),
        ("bytes_pre_resized_uint8", "third", "resized beforehand, uint8"),
        ("bytes_at_rest", "first", "at rest, resized when loaded"),
    )
    for name, colour, label in lines:
        megabytes = [cell.records[0][name] / 1e6 for cell in cells]
        axes.plot(sides, megabytes, "o-", color=COLOURS[colour], markersize=5, label=label)
    axes.set_yscale("log")
    axes.set_xticks(sides, map(str, sides))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.minorticks_off()
    axes.set_xlabel("resolution")
    axes.set_ylabel("MB")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 8)  # room for the legend
    axes.legend(fontsize=9, loc="upper left")


def _interpolations(axes: Axes, found: Sequence[Cell]) -> None:
    for place, cell in enumerate(reversed(found)):
        accuracy = cell.figure(BY_EPOCHS, "accuracy")
        assert accuracy is not None
        axes.errorbar(100 * accuracy.mean, place, xerr=100 * (accuracy.error or 0), color=COLOURS["first"], capsize=3)
        axes.plot(100 * accuracy.mean, place, "o", color=COLOURS["first"], markersize=7)
    axes.set_yticks(range(len(found)), [cell.interpolation for cell in reversed(found)])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("test accuracy, %")


def _plain_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "25" else "")
