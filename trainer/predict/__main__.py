"""Predict images with a trained model.

    python -m trainer.predict RUN_DIR IMAGES... [--csv FILE] [--json FILE] [--sheet FILE.png] [--embeddings FILE]

IMAGES are image files of any size and format, directories of them, glob patterns, a CSV table with labels (columns
file and label), or a packed data set (its test split). If the training images are light ink on dark, as in EMNIST, dark
ink is inverted, and ink is centered and scaled as in the data set; the conversion of every image is reported. With
labels, the metrics of an evaluation are printed. Exit status: 0; 1 if an image is unusable (damaged or blank; the
others are predicted); 2 for an error in the command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.preview import to_png
from pipeline.readers.formats.csv import format_csv
from pipeline.transforms.spec import UndecodableImage
from shards.atomic import check_writable, replace_file, write_file
from shards.cli import command_parser, plural, run_command
from shards.errors import UserError
from trainer.checkpoint.trained_model import check_run_is_first
from trainer.evaluate.calibration import calibration_error
from trainer.evaluate.metrics import ClassificationMetrics, confusion_matrix, most_confused
from trainer.predict.input_files import ImageFile, Sample, find_inputs, read_samples
from trainer.predict.predictor import Predictor, add_run_arguments
from trainer.report.contact_sheet import MAX_TILES, prediction_sheet
from trainer.runtime.loggers.base import PredictedImage

_MAX_LINES = 100  # of the table on the terminal
_RUNNERS_UP = 2
_MAX_NAME = 48  # characters of a file name in the table
_PAIRS = 10  # most frequent confusions
_MAX_MATRIX = 32  # classes of a confusion matrix
_UNUSABLE = 1  # exit status


class Prediction(NamedTuple):
    """Prediction of a sample.

    Attributes:
        sample: The sample without its image.
        probabilities: float32 [C]; None if the image is unusable.
    """

    sample: Sample
    probabilities: NDArray[np.float32] | None


def predict(
    batches: Iterable[list[Sample]], predictor: Predictor, embedding_file: BinaryIO | None = None
) -> Iterator[tuple[Prediction, NDArray[np.uint8] | None]]:
    """Predict all samples, one batch at a time.

    Args:
        batches: Samples, up to `predictor.batch_size` at a time.
        predictor: The model.
        embedding_file: Receives a row for each sample, float32 [F]; NaN for an unusable image.

    Yields:
        The prediction of each sample in their order, and the model input as uint8 pixels; None for an unusable image.
    """
    unusable = None, None, np.full(predictor.embedding_width, np.nan, np.float32)
    for batch in batches:
        outputs: Iterator[tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]] = iter(())
        while images := [sample.image for sample in batch if sample.image is not None]:
            try:
                outputs = zip(*predictor.predict(images), strict=True)
                break
            except UndecodableImage as error:
                bad = images[error.position]
                batch = [each._replace(image=None, note=error.reason) if each.image is bad else each for each in batch]
        for sample in batch:
            output, image, embedding = unusable if sample.image is None else next(outputs)
            if embedding_file is not None:
                embedding_file.write(embedding.tobytes())
            yield Prediction(sample._replace(image=None), output), image


class Totals:
    """What is kept of any number of predictions: the first ones, and label, class and confidence of the others.

    Attributes:
        first: The predictions of the table on the terminal.
        tiles: The images of the contact sheet.
        samples: Number of samples.
        unusable: Number of unusable images.
        has_labels: Whether a sample has a label.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.first: list[Prediction] = []
        self.tiles: list[PredictedImage] = []
        self.samples = self.unusable = 0
        self.has_labels = False
        self._classes = classes
        self._labels, self._predicted, self._confidence = array("q"), array("q"), array("f")

    def add(self, prediction: Prediction, image: NDArray[np.uint8] | None) -> None:
        """Count a prediction."""
        (sample, output), classes = prediction, self._classes
        self.samples += 1
        self.has_labels |= sample.label is not None
        if len(self.first) < _MAX_LINES:
            self.first.append(prediction)
        if output is None or image is None:
            self.unusable += 1
            return
        best, true = int(output.argmax()), None if sample.label is None else classes[sample.label]
        if len(self.tiles) < MAX_TILES:
            self.tiles.append(PredictedImage(image, classes[best], float(output[best]), true))
        if sample.label is not None:
            self._labels.append(sample.label)
            self._predicted.append(best)
            self._confidence.append(float(output[best]))

    def metrics(self) -> dict[str, Any] | None:
        """Compute the metrics of an evaluation over the samples with labels; None if there are none."""
        if not self._labels:
            return None
        classes = self._classes
        labels, predicted = (np.frombuffer(column, np.int64) for column in (self._labels, self._predicted))
        confidence = np.frombuffer(self._confidence, np.float32)
        metrics = ClassificationMetrics.of(labels, predicted, len(classes))
        return {
            **metrics.summary(),
            "calibration_error": calibration_error(confidence, predicted == labels),
            "classes": metrics.class_metrics(classes),
            "confusion_matrix": confusion_matrix(labels, predicted, len(classes)).tolist()
            if len(classes) <= _MAX_MATRIX
            else None,
            "most_confused": [
                {"true": classes[true], "predicted": classes[wrong], "count": count}
                for true, wrong, count in most_confused(labels, predicted, _PAIRS)
            ],
        }


def print_table(totals: Totals, classes: tuple[str, ...]) -> None:
    """Print a line for each sample: name, class, probability, runners-up, true class if known, and note."""
    rows = [["file", "class", "probability", "next", "true", "note"]]
    for sample, output in totals.first:
        name = sample.name if len(sample.name) <= _MAX_NAME else f"…{sample.name[1 - _MAX_NAME :]}"
        true = "" if sample.label is None else classes[sample.label]
        if output is None:
            rows.append([name, "", "", "", true, f"not predicted: {sample.note}"])
            continue
        best, *others = np.argsort(-output, kind="stable")[: 1 + _RUNNERS_UP]
        following = ", ".join(f"{classes[other]} {output[other]:.2%}" for other in others)
        rows.append([name, classes[best], f"{output[best]:>11.2%}", following, true, sample.note])
    if not totals.has_labels:
        rows = [[*row[:4], row[5]] for row in rows]
    _print_rows(rows)
    if totals.samples > _MAX_LINES:
        print(f"... and {totals.samples - _MAX_LINES:,} more (list all with --csv FILE)")


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print the metrics, those of each class, and the most frequent confusions."""
    scores = ", ".join(
        f"{name.replace('_f1', ' F1')} {metrics[name]:.2%}" for name in ("accuracy", "macro_f1", "weighted_f1")
    )
    print(f"\n{scores}, calibration error {metrics['calibration_error']:.2%} on {metrics['samples']:,} samples\n")
    rows = [["class", "  samples", "precision", " recall", "     F1"]]
    for row in metrics["classes"]:
        if row["samples"] or row["precision"]:
            fractions = f"{row['precision']:>9.2%}", f"{row['recall']:>7.2%}", f"{row['f1']:>7.2%}"
            rows.append([row["name"], f"{row['samples']:>9,}", *fractions])
    _print_rows(rows)
    if metrics["confusion_matrix"]:
        print("\nconfusion matrix (rows: true class, columns: predicted class)\n")
        names = [row["name"] for row in metrics["classes"]]
        rows = [["", *names]] + [
            [name, *map(str, row)] for name, row in zip(names, metrics["confusion_matrix"], strict=True)
        ]
        width = max(map(len, chain(*rows)))
        _print_rows([[cell.rjust(width) for cell in row] for row in rows])
    if metrics["most_confused"]:
        pairs = (f"{row['true']} -> {row['predicted']} ({row['count']:,})" for row in metrics["most_confused"])
        print(f"\nmost frequent confusions: {', '.join(pairs)}")


def _print_rows(rows: list[list[str]]) -> None:
    """Print rows in columns; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def to_record(prediction: Prediction, classes: tuple[str, ...]) -> dict[str, Any]:
    """Convert a prediction to plain values: file, label, predicted, probabilities (6 digits) and note."""
    sample, output = prediction
    return {
        "file": sample.name,
        "label": None if sample.label is None else classes[sample.label],
        "predicted": None if output is None else classes[int(output.argmax())],
        "probabilities": None if output is None else [float(f"{value:.6g}") for value in output],
        "note": sample.note,
    }


def to_csv(record: dict[str, Any], classes: tuple[str, ...]) -> list[object]:
    """Convert a record to a row of the CSV file."""
    values = record["probabilities"] or [""] * len(classes)
    return [record["file"], record["label"], record["predicted"], max(values), record["note"], *values]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line and check that the files can be written."""
    parser = command_parser(
        "trainer.predict",
        __doc__,
        epilog="Exit status: 0; 1 if an image is unusable (the others are predicted); 2 for an error in the command.",
    )
    add_run_arguments(parser)
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="image files, directories of them, glob patterns, a CSV or TSV table (columns file and label), or a "
        "packed data set (its test split, or a split), as directory or URL",
    )
    add("--csv", type=Path, metavar="FILE", help="write the predictions with all probabilities as CSV")
    add("--json", type=Path, metavar="FILE", help="write the predictions, and the metrics if there are labels, as JSON")
    add("--sheet", type=Path, metavar="FILE", help="draw model inputs and predictions as a contact sheet (PNG)")
    add(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="write the input of the classifier for each image as a NumPy array (.npy, float32, NaN if unusable)",
    )
    arguments = parser.parse_args()
    outputs = list(filter(None, (arguments.csv, arguments.json, arguments.sheet, arguments.embeddings)))
    for number, path in enumerate(outputs):
        check_writable(path)
        if path.resolve() in map(Path.resolve, outputs[:number]):
            raise UserError(
                found=f"two outputs in one file, {path}",
                expected="a file for each of --csv, --json, --sheet and --embeddings",
                hint="name different files: --csv FILE.csv --json FILE.json --sheet FILE.png --embeddings FILE.npy",
            )
    return arguments


def main() -> int:
    """Run the command; returns the exit status."""
    arguments = parse_arguments()
    check_run_is_first(arguments.run, arguments.images)
    predictor = Predictor(arguments.run, arguments.device, with_embeddings=arguments.embeddings is not None)
    classes = predictor.classes
    inputs = find_inputs(arguments.images, predictor)
    totals = Totals(classes)
    with contextlib.ExitStack() as stack:
        files = {
            path: stack.enter_context(replace_file(path))
            for path in (arguments.csv, arguments.json, arguments.embeddings)
            if path
        }
        if arguments.embeddings:
            samples = sum(1 if isinstance(each, ImageFile) else len(each) for each in inputs)
            header = {"descr": "<f4", "fortran_order": False, "shape": (samples, predictor.embedding_width)}
            np.lib.format.write_array_header_1_0(files[arguments.embeddings], header)
        if arguments.csv:
            head = ["file", "label", "predicted", "probability", "note", *(f"p({name})" for name in classes)]
            files[arguments.csv].write(format_csv(head, []).encode())
        if arguments.json:
            about = {
                "run": str(predictor.run),
                "classes": classes,
                "temperature": predictor.temperature,
                "resolution": predictor.resolution,
            }
            files[arguments.json].write(f'{_json(about)[:-1]}, "predictions": ['.encode())
        for prediction, image in predict(read_samples(inputs, predictor), predictor, files.get(arguments.embeddings)):
            if arguments.csv or arguments.json:
                record = to_record(prediction, classes)
            if arguments.csv:
                files[arguments.csv].write(format_csv(to_csv(record, classes), []).encode())
            if arguments.json:
                files[arguments.json].write(f"{', ' if totals.samples else ''}{_json(record)}".encode())
            totals.add(prediction, image)
        metrics = totals.metrics()
        if arguments.json:
            files[arguments.json].write(f'], "metrics": {_json(metrics)}}}\n'.encode())
    if arguments.sheet:
        not_shown = totals.samples - totals.unusable - len(totals.tiles)
        write_file(arguments.sheet, to_png(prediction_sheet(totals.tiles, arguments.run.name, not_shown)))
    print_table(totals, classes)
    if metrics:
        print_metrics(metrics)
    if totals.unusable:
        print(f"\n{totals.unusable:,} of {plural(totals.samples, 'image')} unusable")
    return _UNUSABLE if totals.unusable else 0


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False)


if __name__ == "__main__":
    run_command(main)
