"""Predict pictures with a finished run.

    python -m trainer.predict RUN_DIR IMAGES... [--csv FILE] [--json FILE] [--sheet FILE.png]

IMAGES are picture files of any size and kind, directories of them, patterns, a CSV table of truth (columns file and
label), or a packed set (its test part). Where the run was trained on light ink on dark, as EMNIST, dark ink is
inverted, and ink is centred and scaled as in that set; what was done is said for every picture. With truth, the
figures of an evaluation follow. Exit status: 0; 1 if a picture could not be used (damaged, or nothing on it), which
the table says, while the others are predicted; 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.transforms.spec import UndecodableImage
from shards.atomic import check_writable, write_file
from shards.cli import program_name, run_command
from trainer.evaluate.calibration import calibration_error
from trainer.evaluate.metrics import Confusion
from trainer.inference.contact_sheet import MOST_TILES, Tile, prediction_sheet
from trainer.inference.input_files import Sample, find_inputs, read_samples
from trainer.inference.predictor import Predictor

_MOST_LINES = 100  # of the table on the terminal
_RUNNERS_UP = 2
_WIDEST = 48  # letters of a file's name in the table
_PAIRS = 10  # of classes taken for each other
_UNUSABLE = 1  # exit status


@dataclass
class Answers:
    """What became of each sample, in their order, without the images.

    probabilities: float32 [C] of each, None where it could not be used. tiles: the first images, for the sheet.
    """

    names: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probabilities: list[NDArray[np.float32] | None] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)

    @property
    def unusable(self) -> int:
        return sum(one is None for one in self.probabilities)

    def add(self, batch: list[Sample], predictor: Predictor) -> None:
        """Predict a batch of samples; those that cannot be decoded are noted."""
        while usable := [sample for sample in batch if sample.image is not None]:
            try:
                seen = predictor.predict([sample.image for sample in usable if sample.image is not None])
                break
            except UndecodableImage as error:
                bad = usable[error.position]
                batch = [one._replace(image=None, note=error.reason) if one is bad else one for one in batch]
        answers = iter(zip(seen.probabilities, seen.images, strict=True) if usable else ())
        for sample in batch:
            probabilities = None
            if sample.image is not None:
                probabilities, image = next(answers)
                if len(self.tiles) < MOST_TILES:
                    best = int(probabilities.argmax())
                    true = None if sample.label is None else predictor.classes[sample.label]
                    self.tiles.append(Tile(image, predictor.classes[best], float(probabilities[best]), true))
            self.names.append(sample.name)
            self.labels.append(sample.label)
            self.notes.append(sample.note)
            self.probabilities.append(probabilities)

    def judged(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """True classes [N] and probabilities [N, C] of the samples that have both."""
        pairs = [
            (label, one)
            for label, one in zip(self.labels, self.probabilities, strict=True)
            if label is not None and one is not None
        ]
        labels = np.array([label for label, _ in pairs], np.int64)
        return labels, np.stack([one for _, one in pairs]) if pairs else np.empty((0, 0), np.float32)


def metrics(answers: Answers, classes: tuple[str, ...]) -> dict[str, Any] | None:
    """The figures of an evaluation where the truth is known, and of every class; None without truth."""
    labels, probabilities = answers.judged()
    if not len(labels):
        return None
    predicted = probabilities.argmax(axis=1)
    confusion = Confusion.of(labels, predicted, len(classes))
    columns = zip(classes, confusion.support, confusion.precision, confusion.recall, confusion.f1, strict=True)
    return {
        **confusion.summary(),
        "calibration_error": calibration_error(probabilities.max(axis=1), predicted == labels),
        "classes": [
            {"name": name, "samples": int(samples), "precision": precision, "recall": recall, "f1": f1}
            for name, samples, precision, recall, f1 in columns
        ],
        "most_confused": [
            {"true": classes[true], "predicted": classes[said], "count": count}
            for true, said, count in confusion.most_confused(_PAIRS)
        ],
    }


def print_table(answers: Answers, classes: tuple[str, ...]) -> None:
    """A line for each sample: name, class, probability, the next classes, the true one, and what was done."""
    shown = answers.names[:_MOST_LINES]
    width = min(_WIDEST, max(map(len, shown)))
    said = max(len("class"), *map(len, classes))
    true = any(label is not None for label in answers.labels)
    head = f"{'file':<{width}}  {'class':<{said}}  probability  {'next':<{2 * said + 16}}"
    print(head + (f"  {'true':<{said}}" if true else "") + "  note")
    for name, label, note, one in zip(shown, answers.labels, answers.notes, answers.probabilities, strict=False):
        name = name if len(name) <= width else f"…{name[1 - width :]}"
        if one is None:
            print(f"{name:<{width}}  not predicted: {note}")
            continue
        best, *others = np.argsort(-one, kind="stable")[: 1 + _RUNNERS_UP]
        following = ", ".join(f"{classes[other]} {one[other]:.1%}" for other in others)
        line = f"{name:<{width}}  {classes[best]:<{said}}  {one[best]:>11.1%}  {following:<{2 * said + 16}}"
        if true:
            line += f"  {'' if label is None else classes[label]:<{said}}"
        print(f"{line}  {note}")
    if len(answers.names) > len(shown):
        print(f"... and {len(answers.names) - len(shown):,} more, which --csv FILE lists")


def print_metrics(found: dict[str, Any]) -> None:
    print(
        f"\naccuracy {found['accuracy']:.2%}, macro F1 {found['macro_f1']:.2%}, "
        f"weighted F1 {found['weighted_f1']:.2%}, "
        f"calibration error {found['calibration_error']:.2%} on {found['samples']:,} samples"
    )
    width = max(len("class"), *(len(row["name"]) for row in found["classes"]))
    print(f"\n{'class':<{width}}  {'samples':>9}  precision   recall       F1")
    for row in found["classes"]:
        if row["samples"] or row["precision"]:
            print(
                f"{row['name']:<{width}}  {row['samples']:>9,}  {row['precision']:>9.2%}  {row['recall']:>7.2%}  "
                f"{row['f1']:>7.2%}"
            )
    if found["most_confused"]:
        pairs = (f"{row['true']} for {row['predicted']} ({row['count']:,})" for row in found["most_confused"])
        print(f"\nmost often taken: {', '.join(pairs)}")


def to_csv(answers: Answers, classes: tuple[str, ...]) -> str:
    """The answers as a table: file, label, predicted, probability, note, and the probability of each class."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["file", "label", "predicted", "probability", "note", *(f"p({name})" for name in classes)])
    for name, label, note, one in zip(answers.names, answers.labels, answers.notes, answers.probabilities, strict=True):
        true = "" if label is None else classes[label]
        if one is None:
            writer.writerow([name, true, "", "", note, *("" for _ in classes)])
        else:
            said, shares = classes[int(one.argmax())], [f"{share:.6g}" for share in one]
            writer.writerow([name, true, said, f"{one.max():.6g}", note, *shares])
    return content.getvalue()


def to_json(answers: Answers, predictor: Predictor, found: dict[str, Any] | None) -> str:
    """The answers with all probabilities, in the order of `classes`, and the figures if there are any."""
    classes = predictor.classes
    rows = zip(answers.names, answers.labels, answers.notes, answers.probabilities, strict=True)
    return json.dumps(
        {
            "run": str(predictor.run),
            "classes": classes,
            "temperature": predictor.temperature,
            "resolution": predictor.resolution,
            "metrics": found,
            "predictions": [
                {
                    "file": name,
                    "label": None if label is None else classes[label],
                    "predicted": None if one is None else classes[int(one.argmax())],
                    "probabilities": None if one is None else [float(f"{share:.6g}") for share in one],
                    "note": note,
                }
                for name, label, note, one in rows
            ],
        },
        ensure_ascii=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("trainer.predict"),
        description="Predict pictures with a finished run.",
        epilog="Exit status: 0, 1 if a picture could not be used (the others are predicted), 2 for a mistake.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="directory of a run")
    add(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="picture files, directories of them, patterns, a CSV table (columns file and label), or a packed set (its "
        "test part, or one part) or its address",
    )
    add("--csv", type=Path, metavar="FILE", help="write the predictions with all probabilities as a table")
    add("--json", type=Path, metavar="FILE", help="write them, and the figures if the truth is known, as JSON")
    add("--sheet", type=Path, metavar="FILE", help="draw what the model saw and said (PNG)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    arguments = parser.parse_args()
    for path in filter(None, (arguments.csv, arguments.json, arguments.sheet)):
        check_writable(path)
    predictor = Predictor(arguments.run, arguments.device)
    answers = Answers()
    for batch in read_samples(find_inputs(arguments.images, predictor), predictor):
        answers.add(batch, predictor)
    print_table(answers, predictor.classes)
    found = metrics(answers, predictor.classes)
    if found:
        print_metrics(found)
    if arguments.csv:
        write_file(arguments.csv, to_csv(answers, predictor.classes))
    if arguments.json:
        write_file(arguments.json, to_json(answers, predictor, found) + "\n")
    if arguments.sheet:
        content = io.BytesIO()
        left_out = len(answers.names) - answers.unusable - len(answers.tiles)
        prediction_sheet(answers.tiles, arguments.run.name, left_out).save(content, "PNG")
        write_file(arguments.sheet, content.getvalue())
    if answers.unusable:
        print(f"\n{answers.unusable:,} of {len(answers.names):,} pictures could not be used")
    return _UNUSABLE if answers.unusable else 0


if __name__ == "__main__":
    run_command(main)
