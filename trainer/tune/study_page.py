"""Results of a study: `study.html`, one self-contained page, and `best.yaml`, the recipe of the best trial."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.text import Text

from shards.atomic import write_file
from trainer.config.schema import Config
from trainer.report.html import percent, render
from trainer.tune.search_space import SearchConfig, best_recipe
from trainer.tune.study import SharedStudy, TrialResult, can_rank, flat_study, optuna

PAGE = "study.html"
BEST = "best.yaml"
_SHOWN = 20  # best trials of the table
_INK = "#010203"  # becomes the text colour of the page, light or dark
_METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1"}


def write(study: SharedStudy, search: SearchConfig, base: Config) -> None:
    """Write the page, and the best recipe once there is one, into the study's directory."""
    results = study.results()
    ranked = ranking(results)
    recipe = _best(ranked[0], results, search, base) if ranked else None
    if recipe:
        write_file(study.directory / BEST, recipe)
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
        ranked=ranked,
        states=[result.state for result in results],
        seconds=sum(result.seconds for result in results),
        charts=_charts(flat_study(results, search, base), _METRICS[base.trainer.monitor]),
        shown_trials=_SHOWN,
        seeds=_seeds(search),
        recipe=recipe,
    )
    write_file(study.directory / PAGE, page)


def ranking(results: list[TrialResult]) -> list[TrialResult]:
    """The complete trials, the best first."""
    complete = [result for result in results if result.mean is not None]
    return sorted(complete, key=lambda result: -result.mean)  # type: ignore[operator]


def format_result(result: TrialResult) -> str:
    """The result of a trial, in a line."""
    score = f" {format_score(result)}" if result.mean is not None else f" ({result.note})" if result.note else ""
    return f"trial {result.number} {result.state}{score}: {format_values(result.values)}"


def format_table(results: list[TrialResult], rows: int = 5) -> str:
    """The number of trials by state, and the best trials as lines."""
    states = [result.state for result in results]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    lines = [f"trials      {', '.join(counts) or 'none'}"]
    for result in ranking(results)[:rows]:
        lines.append(f"{format_score(result):<20}  trial {result.number}: {format_values(result.values)}")
    return "\n".join(lines)


def format_values(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={format_value(value)}" for name, value in values.items())


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


def format_score(result: TrialResult) -> str:
    """The mean metric of a complete trial, with the standard deviation over its seeds."""
    assert result.mean is not None
    spread = f" ± {100 * result.std:.2f}" if result.std is not None else ""
    return percent(result.mean).replace(" %", f"{spread} %")


def _best(best: TrialResult, results: list[TrialResult], search: SearchConfig, base: Config) -> str:
    assert search.dir is not None
    part = f"{100 * search.train_fraction:.4g} % of the train split" if search.train_fraction < 1 else "the train split"
    head = [
        f"Best of {len(results)} trials of a search around {search.recipe}: trial {best.number}, "
        f"{_METRICS[base.trainer.monitor]}",
        f"{format_score(best)} on the validation split, {_seeds(search)} on {part}.",
        "",
        f"  python -m trainer.run {search.dir / BEST}",
    ]
    return best_recipe(search, base, best.values, f"{search.dir.name}_best", head)


def _seeds(search: SearchConfig) -> str:
    n = search.seeds_per_trial
    return f"mean and standard deviation of {n} seeds" if n > 1 else "one seed"


def _charts(study: optuna.Study, metric: str) -> dict[str, str]:
    """Optuna's plots as SVG by name, those that the trials so far suffice for."""
    plots = optuna.visualization.matplotlib
    trials = study.get_trials(deepcopy=False)
    names = list(trials[0].params) if trials else []
    wide = max(6.4, 1.25 * len(names) + 1.25)
    charts = {}
    with matplotlib.rc_context({"svg.fonttype": "none", "figure.figsize": (6.4, 3.4)}):
        plt.switch_backend("agg")
        if any(trial.intermediate_values for trial in trials):
            charts["curves"] = _svg(plots.plot_intermediate_values(study), f"Validation {metric} by epoch")
        if any(trial.value is not None for trial in trials):
            history = plots.plot_optimization_history(study, target_name=f"validation {metric}")
            charts["history"] = _svg(history, f"Validation {metric} of each trial, and the best so far")
            if can_rank(study):
                evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
                bars = plots.plot_param_importances(study, evaluator=evaluator)
                charts["importances"] = _svg(bars, "Importance of each setting", (6.4, 1 + 0.35 * len(names)))
            parallel = plots.plot_parallel_coordinate(study, target_name=metric)
            charts["parallel"] = _svg(parallel, f"Parallel coordinates: {metric}, {', '.join(names)}", (wide, 4))
            slices = plots.plot_slice(study, target_name=f"validation {metric}")
            charts["slice"] = _svg(slices, f"Validation {metric} by each setting", (max(6.4, 1.9 * len(names)), 3))
    return charts


def _svg(axes: Any, label: str, size: tuple[float, float] | None = None) -> str:
    """A plot as SVG for inclusion in the page: transparent, with text in the page's colour."""
    first = axes if isinstance(axes, plt.Axes) else axes[0]
    figure = first.figure
    if size:
        figure.set_size_inches(size)
    for ax in figure.axes:
        ax.set_facecolor("none")
        for place in ("left", "center"):
            ax.set_title("", loc=place)
        ax.tick_params(colors=_INK)
        if (legend := ax.get_legend()) is not None:
            legend.get_frame().set_alpha(0)
            if len(legend.get_texts()) > 6:
                legend.remove()
    figure.suptitle("")
    for text in figure.findobj(Text):
        text.set_color(_INK)
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    svg = content.getvalue().replace(_INK, "currentColor")
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    width = re.search(r'viewBox="0 0 ([\d.]+)', svg)[1]  # type: ignore[index]
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'style="max-width:{float(width) * 1.6:.0f}px"', svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
