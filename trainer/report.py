"""`report.html`: one self-contained page about a run, or about several side by side.

python -m trainer.report RUN [--shards SHARDS]
python -m trainer.report RUN RUN ... [--out FILE.html]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from shards.atomic import check_writable, write_file
from shards.cli import run_command
from shards.errors import UserError
from shards.stores.base import Store
from trainer import comparison, pages
from trainer.calibration import reliability
from trainer.charts import Bins, confusion_chart, reliability_chart
from trainer.explorer import explorer, pictures
from trainer.finished import FinishedRun
from trainer.metrics import Confusion
from trainer.profiling import table
from trainer.run_directory import RunDirectory

_PAIRS = 12  # of most confused classes
_PICTURES = 8  # of each pair
_LARGEST = 128  # side of a picture on the page, pixels


def write(path: Path, store: Store, summary: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write the page into a run directory.

    store: the part that `predictions.npz` is about. summary, history: as in summary.json and metrics.jsonl.
    """
    directory = RunDirectory(path)
    classes = store.manifest.classes
    predictions = dict(np.load(directory.predictions))
    confusion = Confusion.of(predictions["labels"], predictions["predicted"], len(classes))
    profile, settings = directory.profile, directory.config.read_text()
    page = pages.render(
        "report.html.j2",
        summary=summary,
        history=history,
        charts=pages.curves(history),
        calibration=_calibration(predictions, summary["calibration"]["temperature"]),
        confusion=confusion_chart(confusion.counts, classes),
        explorer=explorer(store, predictions),
        classes=_class_rows(confusion, classes),
        pairs=_pair_rows(confusion, predictions, store),
        settings=settings,
        config=yaml.safe_load(settings),
        environment=json.loads(directory.environment.read_text()),
        profile=table(json.loads(profile.read_text())) if profile.exists() else None,
    )
    write_file(directory.report, page)


def _calibration(predictions: dict[str, NDArray], temperature: float) -> dict[str, Any]:
    """The reliability diagram, after the temperature and before it."""
    correct = predictions["predicted"] == predictions["labels"]
    wanted = {"confidence": f"at the temperature {temperature:.2f}", "uncalibrated": "before it"}
    if temperature == 1:
        del wanted["uncalibrated"]
    series = [
        Bins(name, reliability(predictions[which], correct), pages.style(number))
        for number, (which, name) in enumerate(wanted.items())
    ]
    return {"series": series, "svg": reliability_chart(series, "Accuracy of the test part by bins of confidence")}


def _class_rows(confusion: Confusion, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    columns = zip(classes, confusion.support, confusion.precision, confusion.recall, confusion.f1, strict=True)
    return [
        {"name": name, "samples": int(samples), "precision": precision, "recall": recall, "f1": f1}
        for name, samples, precision, recall, f1 in columns
    ]


def _pair_rows(confusion: Confusion, predictions: dict[str, NDArray], store: Store) -> list[dict[str, Any]]:
    """The most confused pairs, each with pictures of its errors, the most confident first."""
    labels, predicted, confidence = predictions["labels"], predictions["predicted"], predictions["confidence"]
    rows = []
    for true, said, count in confusion.most_confused(_PAIRS):
        errors = np.flatnonzero((labels == true) & (predicted == said))
        errors = errors[np.argsort(-confidence[errors], kind="stable")][:_PICTURES]
        sources = pictures(store, predictions["rows"][errors], _LARGEST)
        rows.append(
            {
                "true": store.manifest.classes[true],
                "said": store.manifest.classes[said],
                "count": count,
                "share": count / confusion.support[true],
                "pictures": [
                    {"source": source, "confidence": float(share), "row": int(row)}
                    for source, share, row in zip(sources, confidence[errors], predictions["rows"][errors], strict=True)
                ],
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report",
        description="Write a finished run's report.html again, or one page that compares several runs.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page that compares (default comparison.html here)")
    parser.add_argument("--shards", metavar="SHARDS", help="the run's packed set, if it is elsewhere now")
    arguments = parser.parse_args()
    if len(arguments.runs) == 1:
        if arguments.out:
            raise UserError(
                found=f"--out {arguments.out} with a single run",
                expected="several runs to compare; the page about one is in its directory",
                hint=f"leave --out away: python -m trainer.report {arguments.runs[0]}",
            )
        run = FinishedRun.open(arguments.runs[0])
        _, store = run.data(arguments.shards)
        write(run.directory.path, store, run.summary, run.history)
        print(run.directory.report)
        return 0
    if arguments.shards:
        raise UserError(
            found=f"--shards {arguments.shards} with several runs",
            expected="one run, whose pictures it has; a comparison shows none",
            hint="leave --shards away",
        )
    out = arguments.out or Path("comparison.html")
    check_writable(out)
    write_file(out, comparison.page([FinishedRun.open(path) for path in arguments.runs]))
    print(out)
    return 0


if __name__ == "__main__":
    run_command(main)
