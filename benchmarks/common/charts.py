"""Chart maker of all benchmarks: one matplotlib style, PNG files and inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from shards.atomic import replace_file

if TYPE_CHECKING:
    from matplotlib.typing import HashableList, RcKeyType

# Colors by the names that they have as CSS variables in style.css.j2, which dark mode replaces.
COLORS = {
    "ink": "#1c1917",
    "muted": "#625c56",
    "rule": "#e3e0dc",
    "card": "#ffffff",
    "s1": "#1d4ed8",
    "s2": "#b45309",
    "s3": "#0f766e",
    "s4": "#a21caf",
}
INK, MUTED, RULE, CARD, *SERIES = COLORS.values()
_STYLE: dict[RcKeyType, Any] = {
    "font.size": 10,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.12,
    "savefig.dpi": 140,
    "text.color": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.minor.size": 3.5,  # like the major ticks, so that the labels are aligned
    "xtick.minor.pad": 3.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "inkstream",
}


@dataclass(frozen=True)
class Chart:
    """A figure of one or more panels.

    Args:
        draw: Fills the axes, which come in reading order.
        size: Width and height in inches.
        panels: Mosaic of panel names as in `Figure.subplot_mosaic`; "." is an empty cell.
        height_ratios: Relative heights of the rows of the mosaic.
        share_y: Whether all panels have the same y axis.
        title: Heading of the figure.
        note: Explanation below the figure.
    """

    draw: Callable[[Sequence[Axes]], None]
    size: tuple[float, float]
    panels: Sequence[Sequence[str]] = (("0",),)
    height_ratios: Sequence[float] | None = None
    share_y: bool = False
    title: str = ""
    note: str = ""

    def write_png(self, path: Path) -> None:
        """Write the figure on a white background at 140 dots per inch."""
        with plt.rc_context(_STYLE):
            figure = self._make_figure(CARD)
            with replace_file(path) as file:
                figure.savefig(file, format="png")
            plt.close(figure)

    def to_svg(self, prefix: str) -> str:
        """Return the `<svg>` element without a size or background; its colors are CSS variables.

        Args:
            prefix: Prefix of all ids within the element, unique in the page.
        """
        with plt.rc_context(_STYLE):
            figure = self._make_figure("none")
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            plt.close(figure)
        text = file.getvalue()
        text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text[text.index("<svg") :])
        for name, color in COLORS.items():
            text = text.replace(color, f"var(--{name})")
        text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
        return re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}-", text)

    def _make_figure(self, background: str) -> Figure:
        figure = plt.figure(figsize=self.size, facecolor=background)
        mosaic: list[HashableList[str]] = [list(row) for row in self.panels]
        axes = figure.subplot_mosaic(mosaic, height_ratios=self.height_ratios, sharey=self.share_y)
        if self.title:
            figure.suptitle(self.title, x=0.012, ha="left")
        if self.note:
            figure.supxlabel(self.note, fontsize=8.5, color=MUTED)
        self.draw(list(axes.values()))
        return figure


def grid(count: int, columns: int) -> list[list[str]]:
    """Lay out `count` panels in rows of at most `columns`, as `Chart.panels`."""
    columns = min(count, columns)
    names = [str(number) for number in range(count)] + ["."] * (-count % columns)
    return [names[start : start + columns] for start in range(0, len(names), columns)]


def set_title(axes: Axes, title: str, subtitle: str, **style: Any) -> None:
    """Set a title in a text style of matplotlib, with a smaller line below it."""
    axes.set_title(title, pad=18, **style)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=9, color=MUTED, in_layout=False)


def set_row_labels(axes: Axes, labels: Sequence[str]) -> None:
    """Label the rows of a horizontal chart, the first one at the top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def plain_numbers(axis: Axis, minor: bool = True) -> None:
    """Write tick labels as `1,234`; on a logarithmic axis also at 2 and 5 times the powers of ten if `minor`."""
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    is_labeled = "25" if minor and axis.get_scale() == "log" else ""
    axis.set_minor_formatter(lambda value, _: f"{value:,.12g}" if f"{value:.0e}"[0] in is_labeled else "")


def plot_spread(axes: Axes, x: Sequence[float], spreads: Sequence[dict[str, float]], **style: Any) -> None:
    """Plot medians over x with bars from the lowest to the highest value."""
    medians = [spread["median"] for spread in spreads]
    bars = [
        [spread["median"] - spread["low"] for spread in spreads],
        [spread["high"] - spread["median"] for spread in spreads],
    ]
    axes.errorbar(x, medians, yerr=bars, **style)
