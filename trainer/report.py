"""`report.html`: one self-contained page about a run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from pipeline.preview import read_images, to_picture, upright
from shards import Store
from shards.atomic import write_file
from trainer.charts import Line, confusion_chart, line_chart
from trainer.metrics import Confusion
from trainer.profiling import table
from trainer.progress import duration

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_PAIRS = 12  # of most confused classes
_PICTURES = 8  # of each pair
_LARGEST = 128  # side of a picture on the page, pixels


def write(directory: Path, store: Store, summary: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write the page into a run directory.

    store: the part that `predictions.npz` is about. summary, history: as in summary.json and metrics.jsonl.
    """
    classes = store.manifest.classes
    predictions = np.load(directory / "predictions.npz")
    labels, predicted = predictions["labels"], predictions["predicted"]
    confusion = Confusion.of(labels, predicted, len(classes))
    profile = directory / "profile.json"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    page = environment.get_template(_TEMPLATE.name).render(
        summary=summary,
        history=history,
        charts=_charts(history),
        confusion=confusion_chart(confusion.counts, classes),
        classes=_class_rows(confusion, classes),
        pairs=_pair_rows(confusion, predictions, store),
        settings=(directory / "config.yaml").read_text(),
        config=yaml.safe_load((directory / "config.yaml").read_text()),
        environment=json.loads((directory / "env.json").read_text()),
        name=directory.name,
        profile=table(json.loads(profile.read_text())) if profile.exists() else None,
    )
    write_file(directory / "report.html", page)


def _charts(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title, legend and SVG of each curve."""
    judged = [record["validation"] for record in history if "validation" in record]
    losses = [Line("training objective", [record["train_loss"] for record in history], "first")]
    charts = []
    if judged:
        losses.append(Line("validation cross-entropy", [record["loss"] for record in judged], "second"))
        figures = [
            Line("accuracy", [record["accuracy"] for record in judged], "first"),
            Line("macro F1", [record["macro_f1"] for record in judged], "second"),
        ]
        charts.append({"title": "Validation", "lines": figures, "percent": True})
    charts.insert(0, {"title": "Loss", "lines": losses, "percent": False})
    rates = [Line("learning rate", [record["lr"] for record in history], "first")]
    charts.append({"title": "Learning rate at the end of the epoch", "lines": rates, "percent": False})
    for chart in charts:
        chart["svg"] = line_chart(chart["lines"], f"{chart['title']} by epoch", chart["percent"])
    return charts


def _class_rows(confusion: Confusion, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    columns = zip(classes, confusion.support, confusion.precision, confusion.recall, confusion.f1, strict=True)
    return [
        {"name": name, "samples": int(samples), "precision": precision, "recall": recall, "f1": f1}
        for name, samples, precision, recall, f1 in columns
    ]


def _pair_rows(confusion: Confusion, predictions: Any, store: Store) -> list[dict[str, Any]]:
    """The most confused pairs, each with pictures of its errors, the most confident first."""
    by_row = np.argsort(store.rows)
    labels, predicted, confidence = predictions["labels"], predictions["predicted"], predictions["confidence"]
    rows = []
    for true, said, count in confusion.most_confused(_PAIRS):
        errors = np.flatnonzero((labels == true) & (predicted == said))
        errors = errors[np.argsort(-confidence[errors], kind="stable")][:_PICTURES]
        samples = by_row[np.searchsorted(store.rows[by_row], predictions["rows"][errors])]
        images = [upright(image, store.manifest.transposed) for image in read_images(store, samples)]
        rows.append(
            {
                "true": store.manifest.classes[true],
                "said": store.manifest.classes[said],
                "count": count,
                "share": count / confusion.support[true],
                "pictures": [
                    {"source": _data_address(image), "confidence": float(share), "row": int(row)}
                    for image, share, row in zip(images, confidence[errors], predictions["rows"][errors], strict=True)
                ],
            }
        )
    return rows


def _data_address(image: NDArray[np.uint8]) -> str:
    """A PNG inside the page: a `data:` address of an image [H, W, C], made smaller if it is large."""
    content = io.BytesIO()
    picture: Image.Image = to_picture(image)
    picture.thumbnail((_LARGEST, _LARGEST))
    picture.save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
