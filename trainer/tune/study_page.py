"""Results of a study: `study.html`, one self-contained page, and `best.yaml`, the recipe of the best trial."""

from __future__ import annotations

import io
import itertools
import re
import time
import warnings
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import yaml
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from shards.atomic import file_lock, write_file
from shards.errors import quote
from trainer.config import load as config
from trainer.config.schema import Config
from trainer.report.html import render
from trainer.tune.search_space import SearchConfig
from trainer.tune.study import SharedStudy, TrialResult, can_rank, flat_study, optuna

PAGE = "study.html"
BEST = "best.yaml"
_SHOWN = 20  # best trials of the table
_WIDTH = 9.6  # of the page, in inches
_PRINTED = 5  # best trials in the terminal
_BLUES = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.45, 1, 256)))  # without its faint part
_METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1"}


def write(study: SharedStudy, search: SearchConfig, base: Config, min_age: float = 0) -> None:
    """Write the page into the study's directory and, once a trial is complete, the recipe of the best one.

    Args:
        study: The study.
        search: The search.
        base: The recipe with the settings of all trials.
        min_age: Keep an existing page that is younger, in seconds.
    """
    with file_lock(study.directory / ".page.lock"):  # workers finish trials at the same time
        path, results = study.directory / PAGE, study.results()
        if recipe := _best_recipe(results, search, base):
            write_file(study.directory / BEST, recipe)
        if path.exists() and time.time() - path.stat().st_mtime < min_age:
            return
        page = render(
            "study_page.html.j2",
            Path(__file__).parent,
            format_value=format_value,
            format_score=format_score,
            name=study.directory.name,
            search=search,
            base=base,
            metric=_METRICS[base.trainer.monitor],
            results=results,
            ranked=ranking(results),
            counts=_counts(results),
            seconds=sum(result.seconds for result in results),
            charts=_charts(results, search, base),
            shown_trials=_SHOWN,
            seeds=_seeds(search),
            recipe=recipe,
        )
        write_file(path, page)


def ranking(results: list[TrialResult]) -> list[TrialResult]:
    """The complete trials, the best first."""
    complete = [(result.mean, result) for result in results if result.mean is not None]
    return [result for _, result in sorted(complete, key=lambda pair: -pair[0])]


def format_result(result: TrialResult) -> str:
    """The result of a trial, in a line."""
    score = f" {format_score(result)}" if result.mean is not None else f" ({result.note})" if result.note else ""
    return f"trial {result.number} {result.state}{score}: {format_values(result.values)}"


def format_table(results: list[TrialResult]) -> str:
    """The number of trials by state, and the best trials as lines."""
    lines = [f"trials      {_counts(results) or 'none'}"]
    for result in ranking(results)[:_PRINTED]:
        lines.append(f"{format_score(result):<20}  trial {result.number}: {format_values(result.values)}")
    return "\n".join(lines)


def format_values(values: dict[str, Any]) -> str:
    """Format settings as key=value."""
    return " ".join(f"{name}={format_value(value)}" for name, value in values.items())


def format_value(value: Any) -> str:
    """Format a value with up to 4 digits."""
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


def format_score(result: TrialResult) -> str:
    """The mean metric of a complete trial, with the standard deviation over its seeds."""
    assert result.mean is not None
    return f"{result.mean:.2%}" + (f" ± {result.std:.2%}" if result.std is not None else "")


def _counts(results: list[TrialResult]) -> str:
    return ", ".join(f"{count} {state}" for state, count in Counter(result.state for result in results).items())


def _best_recipe(results: list[TrialResult], search: SearchConfig, base: Config) -> str | None:
    """Format a complete recipe with the values of the best trial, as YAML; None if no trial is complete."""
    ranked = ranking(results)
    if not ranked:
        return None
    assert search.dir is not None
    own: dict[str, Any] = {"run.name": f"{search.dir.name}_best"}
    if "data.val_fraction" in search.settings:
        own["data.val_fraction"] = config.load(search.recipe, []).data.val_fraction
    best = config.replace_settings(base, ranked[0].values | own, "the best trial")
    settings = yaml.safe_dump(best.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    return (
        f"# Best of {len(results)} trials of a search around {search.recipe}: trial {ranked[0].number}, "
        f"{_METRICS[base.trainer.monitor]}\n"
        f"# {format_score(ranked[0])} on the validation split, {_seeds(search)},\n"
        f"# trained on {search.train_fraction:.2%} of the train split.\n"
        f"#\n#   python -m trainer.run {quote(search.dir / BEST)}\n{settings}"
    )


def _seeds(search: SearchConfig) -> str:
    n = search.seeds_per_trial
    return f"mean and standard deviation of {n} seeds" if n > 1 else "one seed"


def _charts(results: list[TrialResult], search: SearchConfig, base: Config) -> dict[str, str]:
    """Draw plots as SVG by name, as far as there are enough trials. All but the learning curves are Optuna's."""
    plots = optuna.visualization.matplotlib
    study, metric = flat_study(results, search, base), _METRICS[base.trainer.monitor]
    names = list(search.space)
    charts = {}
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "figure.figsize": (4.6, 3)}):
        warnings.simplefilter("ignore")  # of a setting that had one value, about which a user can do nothing
        plt.switch_backend("agg")
        if any(result.curve for result in results):
            _plot_curves(results, search.seeds_per_trial, base.trainer.epochs, metric)
            charts["curves"] = _figure_to_svg(f"Validation {metric} by epoch", legend="right")
        if any(result.mean is not None for result in results):
            axes = plots.plot_optimization_history(study, target_name=f"validation {metric}")
            axes.legend(["each trial", "best so far"], ncols=2)
            axes.set_xlabel("trial")
            charts["history"] = _figure_to_svg(f"Validation {metric} of each trial, and the best so far", legend="top")
            if can_rank(study):
                axes = plots.plot_param_importances(
                    study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
                )
                axes.set_xlabel("importance")
                axes.set_ylabel("")
                charts["importances"] = _figure_to_svg("Importance of each setting", (4.6, 1 + 0.35 * len(names)))
            plots.plot_parallel_coordinate(study, target_name=metric)
            label = f"Parallel coordinates: {metric}, {', '.join(names)}"
            charts["parallel"] = _figure_to_svg(label, (max(_WIDTH, 1.6 * len(names) + 1.6), 4.2))
            plots.plot_slice(study, target_name=f"validation {metric}")
            size = (max(_WIDTH, 3.2 * len(names)), 3.4)
            charts["slice"] = _figure_to_svg(f"Validation {metric} by each setting", size)
    return charts


def _plot_curves(results: list[TrialResult], seeds: int, default_epochs: int, metric: str) -> None:
    """Plot a line for each seed of each trial over the epochs of all its seeds, in a color for each trial."""
    plt.style.use("ggplot")  # as Optuna does
    _, axes = plt.subplots()
    for result, color in zip(results, itertools.cycle(matplotlib.color_sequences["tab20"])):
        epochs = result.values.get("trainer.epochs", default_epochs)
        for seed in range(seeds):
            line = [(step, mean) for step, mean in result.curve if seed * epochs < step <= (seed + 1) * epochs]
            label = f"trial {result.number}" if seed == 0 else None
            axes.plot([step for step, _ in line], [mean for _, mean in line], color=color, marker=".", label=label)
    axes.set_xlabel("epoch" if seeds == 1 else f"epochs of {seeds} seeds, in sequence")
    axes.set_ylabel(f"validation {metric}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _figure_to_svg(
    label: str, size: tuple[float, float] | None = None, legend: Literal["right", "top"] = "right"
) -> str:
    """Convert the current figure to SVG for inclusion in the page, without faint colours.

    Args:
        label: Accessible description.
        size: Width and height in inches; None for those of the figure.
        legend: Place of the legend, outside of the plot.
    """
    figure = plt.gcf()
    if size:
        figure.set_size_inches(size)
    figure.suptitle("")
    for ax in figure.axes:
        ax.set_facecolor("none")  # the page inverts the plots on dark screens
        ax.grid(visible=False)  # white, across the lines
        for place in ("left", "center"):
            ax.set_title("", loc=place)
        for line in ax.get_lines():
            line.set_alpha(0.9)
        for collection in ax.collections:
            collection.set_cmap(_BLUES)
        if len(figure.axes) > 2 and any(len(tick.get_text()) > 5 for tick in ax.get_xticklabels()):
            ax.tick_params(axis="x", rotation=30)
        if (box := ax.get_legend()) is not None:
            box.set_visible(1 < len(box.get_texts()) <= 6)
            box.set_frame_on(False)
            box.set_loc("upper left" if legend == "right" else "lower right")
            box.set_bbox_to_anchor((1.02, 1) if legend == "right" else (1, 1))
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    svg = content.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], count=1, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
