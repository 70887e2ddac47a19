"""Charts of a resolution sweep: accuracy over throughput, cost per image, bytes on disk, interpolations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common.charts import CARD, MUTED, RULE, SERIES, Chart, plain_numbers, set_row_labels, set_title
from benchmarks.sweep.stats import BY_EPOCHS, PowerLaw, SeedGroup, pareto_front
from benchmarks.sweep.text import Series, SweepResults, run_name

ERROR_NOTE = "Bars: one standard error of the accuracy, where they are longer than the point."
_TRADE_NOTE = (
    "Bars: one standard error. Filled: no other point is both faster and more accurate (joined by the line). "
    "Ring: smallest resolution within one standard error of the best validation accuracy."
)


@dataclass(frozen=True)
class Panel:
    """A chart of the sweep.

    Attributes:
        title: Heading.
        subtitle: Line below the heading; empty for none.
        draw: Draws the chart.
        alt: Description for screen readers.
        height: Height on the page in inches.
    """

    title: str
    subtitle: str
    draw: Callable[[Axes], None]
    alt: str
    height: float = 2.9

    def to_svg(self, prefix: str) -> str:
        """Return the `<svg>` element; `prefix` is unique in the page."""
        # At 3.9 inches, text of 10 points stays readable at the width of a phone.
        return Chart(lambda panels: self.draw(panels[0]), (3.9, self.height)).to_svg(prefix)


def accuracy_note(results: SweepResults) -> str:
    """Return the legend of the panels of accuracy."""
    return ERROR_NOTE if results.compares_models else _TRADE_NOTE


def make_panels(results: SweepResults) -> tuple[list[Panel], list[Panel]]:
    """Return panels of accuracy (one per kind of run and subset) and of costs.

    For resolutions, accuracy is drawn over the training throughput. Models at one resolution have a row each.
    """
    if results.compares_models:
        return _model_panels(results)
    panels = []
    for run, subset in itertools.product(results.runs, results.subsets):
        own = results.of_subset(subset)
        panels.append(
            Panel(
                f"Accuracy over throughput after {run_name(run, results.first)}",
                own[0].title if len(own) == 1 else own[0].subtitle,
                partial(_draw_trade, own=own, run=run),
                "Test accuracy over training throughput at each resolution, with the Pareto front; values as below.",
            )
        )
    costs = "Milliseconds per image over its number of pixels, for training and for the loader; values as below."
    sizes = "Megabytes on disk by resolution: constant if images are resized at load time, else growing with pixels."
    return panels, [
        Panel("Cost per image", "", partial(_draw_costs, results=results), costs),
        Panel("Size on disk", "", partial(_draw_sizes, groups=results.main.groups), sizes),
    ]


def _model_panels(results: SweepResults) -> tuple[list[Panel], list[Panel]]:
    panels = []
    for run, subset in itertools.product(results.runs, results.subsets):
        own = results.of_subset(subset)
        groups = [series.groups[0] for series in own if series.groups[0].metric(run, "accuracy")]
        title = f"Accuracy after {run_name(run, results.first)}"
        panels.append(_accuracy_panel(title, own[0].subtitle, groups, run, "model"))
    groups = [series.groups[0] for series in results.largest_subsets]
    alt = "Milliseconds of training per image by model; the tables below give the throughput."
    return panels, [
        Panel("Training time per image", "", partial(_draw_times, groups=groups), alt, _rows_height(groups))
    ]


def interpolation_panel(groups: Sequence[SeedGroup]) -> Panel:
    """Return the test accuracy of each interpolation."""
    return _accuracy_panel("Test accuracy", "", groups, BY_EPOCHS, "interpolation")


def _accuracy_panel(title: str, subtitle: str, groups: Sequence[SeedGroup], run: str, by: str) -> Panel:
    labels = [getattr(group, by) for group in groups]
    alt = f"Test accuracy by {by}, with one standard error: {', '.join(labels)}; values as below."
    draw = partial(_draw_accuracies, groups=groups, run=run, labels=labels, from_zero=by == "model")
    return Panel(title, subtitle, draw, alt, _rows_height(groups))


def _rows_height(groups: Sequence[SeedGroup]) -> float:
    return 0.35 * len(groups) + 0.9


def write_png(results: SweepResults, path: Path) -> None:
    """Draw the panels of accuracy above those of costs."""
    accuracies, costs = make_panels(results)
    panels = [*accuracies, *costs]
    columns = len(results.subsets) if len(results.subsets) > 1 else len(accuracies)
    rows = len(accuracies) // columns
    upper = [[f"accuracy {row * columns + half // 2}" for half in range(2 * columns)] for row in range(rows)]
    lower = [f"cost {half * len(costs) // (2 * columns)}" for half in range(2 * columns)]
    height = max(3.7, *(panel.height for panel in panels))

    def draw(all_axes: Sequence[Axes]) -> None:
        for axes, panel in zip(all_axes, panels, strict=True):
            panel.draw(axes)
            if panel.subtitle:
                set_title(axes, panel.title, panel.subtitle)
            else:
                axes.set_title(panel.title)

    Chart(
        draw,
        size=(6.2 * columns, height * (rows + 1) + 0.6),
        panels=[*upper, lower],
        height_ratios=[height] * rows + [height - 0.3],
        title=f"{results.first['dataset']}: cost and accuracy of each {results.subject}",
        note=accuracy_note(results),
    ).write_png(path)


def _draw_trade(axes: Axes, own: Sequence[Series], run: str) -> None:
    """Plot test accuracy over training throughput: all models of one subset after one kind of run."""
    points = [
        (series, group, group.throughput, accuracy)
        for series in own
        for group in series.groups
        if (accuracy := group.metric(run, "accuracy"))
    ]
    front = pareto_front([(speed, accuracy.mean) for _, _, speed, accuracy in points])
    line = [(points[index][2], 100 * points[index][3].mean) for index in front]
    axes.plot(*zip(*line, strict=True), color=RULE, linewidth=5, zorder=1)
    choices = {series.model: series.recommend(run) for series in own}
    for index, (series, group, speed, accuracy) in enumerate(points):
        number, choice = own.index(series), choices[series.model]
        color, percent = SERIES[number % len(SERIES)], 100 * accuracy.mean
        axes.errorbar(speed, percent, yerr=100 * (accuracy.std_error or 0), color=color, linewidth=1.2, zorder=2)
        fill, label = color if index in front else CARD, series.model if group is series.groups[0] else None
        axes.plot(speed, percent, "o", color=fill, mec=color, markersize=7, zorder=3, label=label)
        if choice is not None and group is choice.chosen:
            axes.plot(speed, percent, "o", color="none", mec=color, markersize=14, zorder=2)
        offset = (7, 6 if number % 2 == 0 else -13)
        label_style: dict[str, Any] = {"textcoords": "offset points", "weight": "bold", "color": color}
        axes.annotate(str(group.resolution), (speed, percent), offset, **label_style)
    axes.set_xscale("log")
    speeds = [point[2] for point in points]
    axes.set_xlim(min(speeds) / 1.5, max(speeds) * 1.9)
    plain_numbers(axes.xaxis)
    axes.margins(y=0.12)  # room for the labels
    axes.set_xlabel("training images/s")
    axes.set_ylabel("test accuracy, %")
    if len(own) > 1:
        axes.legend()


def _draw_costs(axes: Axes, results: SweepResults) -> None:
    """Plot the time per image over its pixels for training and loading, with the fitted power laws."""
    all_series = results.largest_subsets
    for number, series in enumerate(all_series):
        name = "training" if len(all_series) == 1 else series.model
        costs = [group.train_ms for group in series.groups]
        _plot_cost(axes, series, costs, series.growth()["training time"], name, SERIES[number % len(SERIES)])
    main = results.main
    costs = [group.loader_ms for group in main.groups]
    _plot_cost(axes, main, costs, main.growth()["loader CPU time"], "loader (CPU)", MUTED)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(main.pixels, [f"{group.resolution}²" for group in main.groups])
    axes.set_xlim(min(main.pixels) / 1.4, max(main.pixels) * 1.4)
    plain_numbers(axes.yaxis)
    axes.minorticks_off()
    axes.set_xlabel("pixels")
    axes.set_ylabel("ms/image")
    axes.legend()


def _plot_cost(axes: Axes, series: Series, costs: Sequence[float], fit: PowerLaw | None, name: str, color: str) -> None:
    axes.plot(series.pixels, costs, "o", color=color, label=name if fit is None else f"{name}: pixels^({fit})")
    if fit is not None:
        ends = [min(series.pixels), max(series.pixels)]
        axes.plot(ends, [fit.factor * end**fit.exponent for end in ends], color=color, linewidth=1.2, zorder=1)


def _draw_sizes(axes: Axes, groups: Sequence[SeedGroup]) -> None:
    """Plot the bytes on disk, which do not depend on the resolution, and those of images resized in advance."""
    sides = [group.resolution for group in groups]
    for number, name, label in (
        (1, "bytes_pre_resized_float32", "resized in advance, float32"),
        (2, "bytes_pre_resized_uint8", "resized in advance, uint8"),
        (0, "bytes_at_rest", "resized at load time"),
    ):
        axes.plot(sides, [group.records[0][name] / 1e6 for group in groups], "o-", color=SERIES[number], label=label)
    axes.set_yscale("log")
    axes.set_xticks(sides, map(str, sides))
    plain_numbers(axes.yaxis)
    axes.minorticks_off()
    axes.set_xlabel("resolution")
    axes.set_ylabel("MB")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 10)  # room for the legend
    axes.legend(loc="upper left")


def _draw_times(axes: Axes, groups: Sequence[SeedGroup]) -> None:
    axes.plot([group.train_ms for group in groups], range(len(groups)), "o", color=SERIES[0], markersize=7)
    set_row_labels(axes, [group.model for group in groups])
    axes.set_xlim(left=0)
    plain_numbers(axes.xaxis)
    axes.set_xlabel("ms/image")


def _draw_accuracies(axes: Axes, groups: Sequence[SeedGroup], run: str, labels: Sequence[str], from_zero: bool) -> None:
    for row, group in enumerate(groups):
        accuracy = group.metric(run, "accuracy")
        assert accuracy is not None
        error = 100 * (accuracy.std_error or 0)
        axes.errorbar(100 * accuracy.mean, row, xerr=error, fmt="o", color=SERIES[0], markersize=7)
    set_row_labels(axes, labels)
    if from_zero:
        axes.set_xlim(left=0)
    axes.set_xlabel("test accuracy, %")
