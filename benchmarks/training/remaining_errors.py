"""Count the errors of a run on characters on the test split by groups of look-alike classes, and draw them.

    python -m benchmarks.training.remaining_errors RUN [--out DIR]

Output: remaining_errors.md, the errors by groups of look-alike classes, those whose label confident learning doubts
(`trainer.predict.label_errors`) and the accuracy by less strict criteria, and remaining_errors.png, the most confident
errors of each group.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from benchmarks.common.arguments import add_out_argument
from benchmarks.common.text import format_percent, markdown_table
from pipeline.preview import read_images, save_png, upright
from shards.atomic import make_directory, write_file
from shards.cli import run_command
from shards.open import open_split
from shards.stores.base import Store
from trainer.checkpoint.trained_model import load_trained_model
from trainer.evaluate.evaluator import ModelOutputs, loader_for, predict_logits
from trainer.predict.label_errors import find_label_errors
from trainer.report.contact_sheet import prediction_sheet
from trainer.report.error_gallery import find_samples
from trainer.runtime.distributed import init_distributed
from trainer.runtime.loggers.base import PredictedImage

_CASE = "upper and lower case of a letter"
_LOOK_ALIKES = ("0Oo", "1Il|i", "5Ss", "2Zz", "9qg", "8B", "6bG", "4yY", "7T", "fF", "hn", "uv", "rv", "DO0")
_GROUPS = 8  # of the sheet
_PER_GROUP = 12  # images, a row


def group_of(true: str, predicted: str) -> str:
    """Return the name of the group of look-alike classes that holds both; empty if there is none."""
    if true.casefold() == predicted.casefold():
        return _CASE
    return next((" ".join(each) for each in _LOOK_ALIKES if true in each and predicted in each), "")


def kind_of(character: str) -> str:
    """Return digit, upper or lower."""
    return "digit" if character.isdigit() else "upper" if character.isupper() else "lower"


def count_groups(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str]) -> dict[str, int]:
    """Count the errors of each group, the most frequent first; errors of no group come last as "others"."""
    counts: dict[str, int] = {}
    for true, wrong in zip(labels.tolist(), predicted.tolist(), strict=True):
        if true != wrong:
            name = group_of(classes[true], classes[wrong]) or "others"
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (item[0] == "others", -item[1])))


def coarse_accuracies(
    labels: NDArray[np.int64], logits: NDArray[np.float32], classes: Sequence[str]
) -> Mapping[str, float]:
    """Return the accuracy, and the fractions of predictions that are correct by less strict criteria."""
    predicted = logits.argmax(axis=1)
    pairs = [(classes[true], classes[guess]) for true, guess in zip(labels.tolist(), predicted.tolist(), strict=True)]
    best_two = np.argsort(-logits, axis=1)[:, :2]
    return {
        "class": float((predicted == labels).mean()),
        "class among the two most probable": float((best_two == labels[:, None]).any(axis=1).mean()),
        "class, ignoring case": float(np.mean([a.casefold() == b.casefold() for a, b in pairs])),
        "class or a look-alike class": float(np.mean([a == b or bool(group_of(a, b)) for a, b in pairs])),
        "digit, upper or lower case": float(np.mean([kind_of(a) == kind_of(b) for a, b in pairs])),
    }


def errors_markdown(outputs: ModelOutputs, classes: Sequence[str]) -> str:
    """Format tables of the errors by group, with the number of doubtful labels among them, and of the accuracies."""
    labels, predicted = outputs.labels, outputs.logits.argmax(axis=1)
    suspicious = find_label_errors(labels, softmax(outputs.logits, axis=1))  # all of them are errors
    counts = count_groups(labels, predicted, classes)
    doubtful = count_groups(labels[suspicious], predicted[suspicious], classes)
    total = sum(counts.values())
    groups = [
        [name, f"{count:,}", format_percent(count / total), f"{doubtful.get(name, 0):,}"]
        for name, count in counts.items()
    ]
    groups.append(["all", f"{total:,}", "", f"{len(suspicious):,}"])
    accuracies = coarse_accuracies(labels, outputs.logits, classes)
    rows = [[name, format_percent(fraction)] for name, fraction in accuracies.items()]
    by_group = markdown_table(["look-alike classes", "errors", "share", "doubtful labels"], groups)
    return f"{by_group}\n\n{markdown_table(['counted as correct', 'accuracy'], rows)}"


def error_tiles(store: Store, outputs: ModelOutputs) -> list[PredictedImage]:
    """Return the most confident errors of the most frequent groups."""
    classes, labels, logits = store.manifest.classes, outputs.labels, outputs.logits
    predicted, confidence = logits.argmax(axis=1), softmax(logits, axis=1).max(axis=1)
    wrong = np.flatnonzero(labels != predicted)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    by_group: dict[str, list[int]] = {name: [] for name in count_groups(labels, predicted, classes)}
    for sample in wrong.tolist():
        by_group[group_of(classes[labels[sample]], classes[predicted[sample]]) or "others"].append(sample)
    shown = np.array([sample for samples in list(by_group.values())[:_GROUPS] for sample in samples[:_PER_GROUP]])
    images = read_images(store, find_samples(store, outputs.rows[shown]))
    return [
        PredictedImage(upright(image, store.manifest.transposed), classes[guess], float(fraction), classes[true])
        for image, guess, fraction, true in zip(images, predicted[shown], confidence[shown], labels[shown], strict=True)
    ]


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description="Count the errors of a run on characters by groups of look-alike classes, and draw them."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    add_out_argument(parser)
    arguments = parser.parse_args()
    trained = load_trained_model(arguments.run)
    store = open_split(trained.config.data.shards, "test")
    with init_distributed(trained.config.device) as world:
        model = trained.build_model(world.device)
        outputs = predict_logits(model, loader_for(store, trained, world), trained.config.trainer, world)
    assert outputs is not None  # there is one process
    text = errors_markdown(outputs, trained.classes)
    make_directory(arguments.out)
    out = arguments.out / "remaining_errors"
    write_file(out.with_suffix(".md"), text + "\n")
    sheet = prediction_sheet(error_tiles(store, outputs), "The most confident errors of look-alike classes")
    save_png(sheet, out.with_suffix(".png"))
    print(f"{text}\n\n{out}.md, .png")
    return 0


if __name__ == "__main__":
    run_command(main)
