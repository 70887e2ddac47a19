"""`report.html`: one self-contained page about a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from shards.atomic import write_file
from shards.stores.base import Store
from trainer.checkpoint.run_dir import RunDirectory
from trainer.evaluate.calibration import reliability
from trainer.evaluate.metrics import Confusion
from trainer.report import html
from trainer.report.error_gallery import explorer, pictures
from trainer.report.svg import Bins, confusion_chart, reliability_chart
from trainer.runtime.profiler import format_profile

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
    page = html.render(
        "run_page.html.j2",
        summary=summary,
        history=history,
        charts=html.curves(history),
        calibration=_calibration(predictions, summary["calibration"]["temperature"]),
        confusion=confusion_chart(confusion.counts, classes),
        explorer=explorer(store, predictions),
        classes=_class_rows(confusion, classes),
        pairs=_pair_rows(confusion, predictions, store),
        settings=settings,
        config=yaml.safe_load(settings),
        environment=json.loads(directory.environment.read_text()),
        profile=format_profile(json.loads(profile.read_text())) if profile.exists() else None,
    )
    write_file(directory.report, page)


def _calibration(predictions: dict[str, NDArray], temperature: float) -> dict[str, Any]:
    """The reliability diagram, after the temperature and before it."""
    correct = predictions["predicted"] == predictions["labels"]
    wanted = {"confidence": f"at the temperature {temperature:.2f}", "uncalibrated": "before it"}
    if temperature == 1:
        del wanted["uncalibrated"]
    series = [
        Bins(name, reliability(predictions[which], correct), html.style(number))
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
