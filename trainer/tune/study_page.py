"""What a search found: `study.html`, one self-contained page, and `best.yaml`, the recipe of the best trial."""

from __future__ import annotations

from typing import Any

from shards.atomic import write_file
from trainer.report.html import render
from trainer.settings import Config
from trainer.tune.search_charts import bar_chart, curves_chart, history_chart, parallel_chart
from trainer.tune.search_space import Search, best_recipe
from trainer.tune.study import Result, Study, full_values, importances, logarithmic

PAGE = "study.html"
BEST = "best.yaml"
_SHOWN = 20  # best trials of the table
_FIGURES = {"accuracy": "accuracy", "macro_f1": "macro F1"}


def write(study: Study, search: Search, base: Config) -> None:
    """Write the page, and the best recipe once there is one, into the study's directory."""
    results = study.results()
    ranked = ranking(results)
    if ranked:
        write_file(study.directory / BEST, _best(ranked[0], results, search, base))
    write_file(study.directory / PAGE, _page(results, ranked, search, base))


def ranking(results: list[Result]) -> list[Result]:
    """The complete trials, the best first."""
    done = [result for result in results if result.mean is not None]
    return sorted(done, key=lambda result: -result.mean)  # type: ignore[operator]


def line(result: Result) -> str:
    """What became of a trial, in a line."""
    figure = f" {shown(result)}" if result.mean is not None else f" ({result.note})" if result.note else ""
    return f"trial {result.number} {result.state}{figure}: {said(result.values)}"


def table(results: list[Result], rows: int = 5) -> str:
    """The best trials as lines, and how many there are of which kind."""
    states = [result.state for result in results]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    lines = [f"trials      {', '.join(counts) or 'none'}"]
    best = ranking(results)[:rows]
    lines += [f"{shown(result):<20}  trial {result.number}: {said(result.values)}" for result in best]
    return "\n".join(lines)


def said(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={plain(value)}" for name, value in values.items())


def plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


def shown(result: Result) -> str:
    """The mean figure of a complete trial, with the standard deviation of its repeats."""
    assert result.mean is not None
    spread = f" ± {100 * result.std:.2f}" if result.std is not None else ""
    return f"{100 * result.mean:.2f}{spread} %"


def _best(best: Result, results: list[Result], search: Search, base: Config) -> str:
    assert search.dir is not None
    name = f"{search.dir.name}_best"
    part = f"{100 * search.fraction:.4g} % of the train part" if search.fraction < 1 else "the train part"
    head = [
        f"The best of {len(results)} trials of a search around {search.recipe}: trial {best.number}, "
        f"{_FIGURES[base.trainer.monitor]}",
        f"{shown(best)} on the validation part, {_repeats(search)} on {part}.",
        "",
        f"  python -m trainer.run {search.dir / BEST}",
    ]
    return best_recipe(search, base, best.values, name, head)


def _repeats(search: Search) -> str:
    return f"mean and standard deviation of {search.repeats} seeds" if search.repeats > 1 else "one seed"


def _page(results: list[Result], ranked: list[Result], search: Search, base: Config) -> str:
    assert search.dir is not None
    figure = _FIGURES[base.trainer.monitor]
    shares = importances(results, search, base)
    numbers = [result.number for result in ranked]
    return render(
        "study_page.html.j2",
        plain=plain,
        shown=shown,
        name=search.dir.name,
        search=search,
        base=base,
        figure=figure,
        results=results,
        ranked=ranked,
        best=ranked[0] if ranked else None,
        states=[result.state for result in results],
        seconds=sum(result.seconds for result in results),
        history=history_chart(results, f"Validation {figure} of each trial, and the best so far") if ranked else "",
        curves=curves_chart(results, numbers, f"Validation {figure} of each trial by epochs trained"),
        importance=bar_chart(shares, "Importance of each setting") if shares else "",
        parallel=parallel_chart(ranked, full_values(ranked, search, base), logarithmic(search), figure)
        if ranked
        else "",
        settings=list(search.space),
        shown_trials=_SHOWN,
        repeats=_repeats(search),
        recipe=_best(ranked[0], results, search, base) if ranked else None,
    )
