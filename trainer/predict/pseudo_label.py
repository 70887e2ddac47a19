"""Command: label images by a model's own confident predictions.

    python -m trainer.predict.pseudo_label RUN_DIR SHARDS [--split train] --confidence 0.95 --csv FILE
    python -m trainer.predict.pseudo_label RUN_DIR SHARDS --confidence 0.95 --add-to SET --out DIR

The first form writes row, label and confidence of each image with at least this confidence. Labels in SHARDS are
ignored. The second form packs SET again with these images added to its train split under the predicted labels. The
other splits stay as they are, and images that they contain are not added. `origins.csv` in the new train split states
the origin of each image. Lee 2013, Pseudo-label, ICML Workshop on Challenges in Representation Learning.
"""

from __future__ import annotations

import argparse
import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.dedup.overlap import image_digests
from pipeline.packing.pack import pack
from pipeline.packing.repack import concatenate, packed_split, packed_splits
from pipeline.readers.raw_split import RawSplit
from shards.atomic import check_writable, write_file
from shards.cli import program_name, run_command
from shards.errors import UserError
from shards.manifest import MANIFEST_NAME, SPLITS, Manifest
from shards.open import open_store
from shards.remote.datasets import resolve_dataset
from shards.stores.base import Store
from trainer.checkpoint.trained_model import load_trained_model
from trainer.evaluate.evaluator import loader_for, predict_logits
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.predict.predictor import add_run_arguments
from trainer.runtime.distributed import World, init_distributed


@dataclass(frozen=True)
class PseudoLabels:
    """Predictions for the images of a split, in the order of their rows.

    Attributes:
        source_index: int64 [N], rows of the images.
        labels: int64 [N], predicted classes.
        confidence: float32 [N], calibrated probability of the predicted class.
    """

    source_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    confidence: NDArray[np.float32]

    def above(self, confidence: float) -> PseudoLabels:
        """Select the labels with at least this confidence."""
        selected = self.confidence >= confidence
        return PseudoLabels(self.source_index[selected], self.labels[selected], self.confidence[selected])


def predict(run: Path, store: Store, world: World) -> PseudoLabels:
    """Predict every image of a split with the best epoch of a run, with its logit adjustment and temperature."""
    trained = load_trained_model(run)
    model = trained.build_model(world.device)
    output = predict_logits(model, loader_for(store, trained, world), trained.config.trainer, world)
    assert output is not None, "one rank"
    top = ProbabilityHead(**trained.posthoc_kwargs())(torch.from_numpy(output.logits)).max(dim=1)
    return PseudoLabels(np.sort(store.rows), top.indices.numpy(), top.values.numpy())


def to_csv(pseudo: PseudoLabels, classes: tuple[str, ...]) -> str:
    """Format labels as CSV: row, class name, confidence."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "label", "confidence"])
    for row, label, confidence in zip(pseudo.source_index, pseudo.labels, pseudo.confidence, strict=True):
        writer.writerow([row, classes[label], f"{confidence:.4f}"])
    return text.getvalue()


def with_pseudo_labels(
    splits: tuple[RawSplit, ...], unlabelled: RawSplit, pseudo: PseudoLabels
) -> tuple[tuple[RawSplit, ...], int]:
    """Add pseudo-labelled images to the train split, except for images of the other splits.

    Args:
        splits: The splits of a data set, train first.
        unlabelled: The split that was predicted.
        pseudo: Labels of some of its images.

    Returns:
        The splits, and the number of images that were skipped because another split contains them.
    """
    train, others = splits[0], splits[1:]
    added = replace(
        unlabelled.select(np.flatnonzero(np.isin(unlabelled.source_index, pseudo.source_index))),
        name="pseudo-labelled",
        classes=train.classes,
        labels=pseudo.labels,
        columns={"confidence": np.array([f"{value:.4f}" for value in pseudo.confidence])},
    )
    digests = np.concatenate([np.empty(0, np.uint64), *map(image_digests, others)])
    is_new = ~np.isin(image_digests(added), digests)
    if is_new.any():
        splits = (concatenate(train, added.select(np.flatnonzero(is_new))), *others)
    return splits, int((~is_new).sum())


def _add(directory: Path, out: str, unlabelled: RawSplit, pseudo: PseudoLabels, options: dict[str, Any]) -> str:
    manifest = Manifest.read(directory / "train")
    splits, skipped = with_pseudo_labels(packed_splits(directory), unlabelled, pseudo)
    packed = pack(
        lambda: splits,
        out,
        dataset=manifest.dataset,
        variant=manifest.variant,
        block_size=manifest.block_size,
        seed=manifest.seed,
        store=manifest.store,
        options={"packed_from": manifest.digest()[:12], **options},
    )
    note = f", {skipped:,} skipped (also in another split)" if skipped else ""
    already = "" if packed.is_new else " (already packed)"
    return f"{packed.manifests[0].samples:,} training images{note} in {out}{already}"


def _fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=program_name("trainer.predict.pseudo_label"),
        description="Label images by a model's own confident predictions.",
    )
    add_run_arguments(parser)
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="packed images to label, a directory or URL; their labels are ignored")
    add("--split", choices=SPLITS, default="train", help="split of SHARDS (default train)")
    add("--confidence", type=_fraction, required=True, metavar="P", help="minimum calibrated probability, 0 .. 1")
    add("--csv", type=Path, metavar="FILE", help="write row, label and confidence of each image")
    add("--add-to", metavar="SET", help="packed data set to whose train split the images are added")
    add("--out", metavar="PATH", help="directory or address of the extended data set")
    arguments = parser.parse_args()
    if arguments.csv:
        check_writable(arguments.csv)
    if not (arguments.csv or arguments.out) or bool(arguments.out) != bool(arguments.add_to):
        raise UserError(
            found="--out without --add-to" if arguments.out else "no output for the labels",
            expected="--csv FILE, or --add-to SET and --out DIR, or both",
            hint="--csv labels.csv",
        )
    classes = load_trained_model(arguments.run).classes
    target = resolve_dataset(arguments.add_to) if arguments.add_to else None
    if target is not None and Manifest.read(target / "train").classes != classes:
        raise UserError(
            found=f"--add-to {arguments.add_to} with other classes than the run",
            expected=f"the classes {' '.join(classes)}",
            hint="name a packed data set with the classes of the run",
        )
    directory = resolve_dataset(arguments.shards)
    if not (directory / MANIFEST_NAME).is_file():
        directory /= arguments.split
    with init_distributed(arguments.device) as world:
        store = open_store(directory)
        predictions = predict(arguments.run, store, world)
    pseudo = predictions.above(arguments.confidence)
    counts = np.bincount(pseudo.labels, minlength=len(classes))
    print(
        f"{len(pseudo.labels):,} of {len(predictions.labels):,} images labelled with a confidence of at least "
        f"{arguments.confidence:.2%}, {counts.min():,} to {counts.max():,} per class"
    )
    if arguments.csv:
        write_file(arguments.csv, to_csv(pseudo, classes))
        print(f"labels written to {arguments.csv}")
    if target is not None:
        options = {
            "pseudo_labelled": store.manifest.digest()[:12],
            "confidence": arguments.confidence,
            "predictions": len(pseudo.labels),
            "run": str(arguments.run),
        }
        print(_add(target, arguments.out, packed_split(store, directory), pseudo, options))
    return 0


if __name__ == "__main__":
    run_command(main)
