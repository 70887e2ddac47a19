"""Label images by a model's own confident predictions.

    python -m trainer.predict.pseudo_label RUN_DIR IMAGES... [--split train] --confidence 0.95 --csv FILE
    python -m trainer.predict.pseudo_label RUN_DIR IMAGES... --confidence 0.95 --add-to SET --out DIR

IMAGES is a packed data set, whose labels are ignored, or image files and directories of them, which are converted to
the format of the training images as `trainer.predict` does. The first form writes row, label and confidence of each
image with at least this confidence, and the path of an image file. The second form packs SET again with these images
added to its train split under the predicted labels. The other splits stay as they are, and images that they contain
are not added. `origins.csv` in the new train split states the origin of each image. Lee 2013, Pseudo-label,
ICML Workshop on Challenges in Representation Learning.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.dedup.overlap import image_digests
from pipeline.packing.pack import PackSettings, pack
from pipeline.packing.repack import concatenate, packed_split, packed_splits
from pipeline.readers.formats.csv import format_csv
from pipeline.readers.raw_split import RawSplit
from shards.atomic import check_writable, detect_replacement, write_file
from shards.cli import command_parser, run_command
from shards.errors import UserError, quote
from shards.manifest import SPLITS, VALIDATION, Manifest, has_split, manifest_paths
from shards.open import open_dataset_or_split
from shards.remote.datasets import resolve_dataset
from shards.stores.base import Store
from trainer.checkpoint.trained_model import TrainedModel, check_run_is_first, load_trained_model
from trainer.evaluate.evaluator import loader_for, map_logits
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.predict.input_files import find_inputs, is_packed, read_samples
from trainer.predict.predictor import Predictor, add_run_arguments
from trainer.runtime.distributed import World, init_single_process

log = logging.getLogger(__name__)


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


def predict(trained: TrainedModel, store: Store, world: World) -> PseudoLabels:
    """Predict every image of a split, with the logit adjustment and temperature of the model."""
    model = trained.build_model(world.device)
    head, loader = ProbabilityHead(**trained.posthoc_kwargs()), loader_for(store, trained, world)

    def predict_classes(logits: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(head(logits).max(dim=1))[::-1]

    output = map_logits(predict_classes, model, loader, trained.config.trainer, world)
    assert output is not None, "one rank"
    (rows, _, labels, confidence), _ = output
    return PseudoLabels(rows, labels, confidence)


def predict_files(run: Path, names: list[str], device: str, transposed: bool) -> tuple[RawSplit, PseudoLabels]:
    """Predict image files; unusable ones are left out, with a message.

    Args:
        run: Run directory.
        names: Image files, directories of them or patterns.
        device: Device of the model.
        transposed: Whether the images of the data set are stored with rows and columns exchanged.

    Returns:
        The images as a split with their paths, and the predictions.
    """
    predictor = Predictor(run, device)
    if predictor.adapter.image_shape[0] is None:
        raise UserError(
            found=f"image files for {run}, which was trained on image files of different sizes",
            expected="a run on images that were packed at one size",
            hint="python -m pipeline.shard ... --size N",
        )
    paths: list[str] = []
    usable: list[NDArray[np.uint8]] = []
    probabilities: list[NDArray[np.float32]] = []
    for batch in read_samples(find_inputs(names, predictor), predictor):
        start = len(usable)
        for sample in batch:
            if sample.image is None:
                log.warning("%s is left out: %s", sample.name, sample.note)
            else:
                paths.append(sample.name)
                usable.append(sample.image)
        if usable[start:]:
            probabilities.append(predictor.predict(usable[start:]).probabilities)
    if not usable:
        raise UserError(
            found=f"no usable image in {' '.join(names)}",
            expected="image files of any size and format",
            hint=f"python -m trainer.predict {quote(run)} {' '.join(map(quote, names))}",
        )
    images, confidence = np.stack(usable), np.concatenate(probabilities)
    split = RawSplit.from_arrays(
        "unlabelled",
        np.ascontiguousarray(images.swapaxes(1, 2)) if transposed else images,
        confidence.argmax(axis=1),
        predictor.classes,
        transposed=transposed,
        columns={"path": np.array(paths)},
    )
    return split, PseudoLabels(split.source_index, split.labels, confidence.max(axis=1))


def add_pseudo_labels(
    directory: Path,
    out: str,
    unlabelled: RawSplit,
    pseudo: PseudoLabels,
    classes: tuple[str, ...],
    options: dict[str, Any],
    force: bool,
) -> str:
    """Pack a data set again with pseudo-labelled images in its train split, except for images of its other splits.

    Args:
        directory: The packed data set.
        out: Directory or address of the result.
        unlabelled: The split that was predicted.
        pseudo: Labels of some of its images.
        classes: Names of the classes, in the order of the labels.
        options: Options to record in the manifests.
        force: Whether a complete packed data set at `out` is replaced.

    Returns:
        A line for the terminal.
    """
    with detect_replacement(*manifest_paths(directory)):
        manifest = Manifest.read(directory / "train")
        train, *others = packed_splits(directory)
    if not has_split(directory, VALIDATION):
        log.warning(
            "%s has no val split: data.val_fraction will choose validation images among the pseudo-labelled ones, too; "
            "pack the val split first (python -m pipeline.shard ... --val-fraction 0.1), or train on %s with "
            "data.val_fraction=0",
            directory,
            out,
        )
    chosen = unlabelled.select(np.flatnonzero(np.isin(unlabelled.source_index, pseudo.source_index)))
    path_of = {name: values for name, values in chosen.columns.items() if name == "path"}
    added = replace(
        chosen,
        name="pseudo-labelled",
        classes=classes,
        labels=pseudo.labels,
        columns=path_of | {"confidence": np.array([f"{value:.4f}" for value in pseudo.confidence])},
    )
    is_new = ~np.isin(image_digests(added), np.concatenate([image_digests(split) for split in others]))
    if is_new.any():
        train = concatenate(train, added.select(np.flatnonzero(is_new)))
    settings = PackSettings.like(manifest, {"packed_from": manifest.identity()[:12], **options})
    packed = pack(lambda: (train, *others), out, settings, force=force)
    skipped = f", {(~is_new).sum():,} skipped (also in another split)" if not is_new.all() else ""
    already = "" if packed.is_new else " (already packed)"
    return f"{packed.manifests[0].samples:,} training images{skipped} in {out}{already}"


def probability(text: str) -> float:
    """Parse a probability. For invalid text, argparse prints the name of this function."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = command_parser("trainer.predict.pseudo_label", __doc__)
    add_run_arguments(parser)
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="packed data set (its labels are ignored), or image files or directories",
    )
    add("--split", choices=SPLITS, default="train", help="split of a packed data set (default train)")
    add("--confidence", type=probability, required=True, metavar="P", help="minimum calibrated probability, 0 .. 1")
    add("--csv", type=Path, metavar="FILE", help="write row, label, confidence (and path) of each image")
    add("--add-to", metavar="SET", help="packed data set to whose train split the images are added")
    add("--out", metavar="PATH", help="directory or address of the extended data set")
    add("--force", action="store_true", help="replace a complete packed data set at PATH")
    arguments = parser.parse_args()
    if arguments.csv:
        check_writable(arguments.csv)
    if not (arguments.csv or arguments.out) or bool(arguments.out) != bool(arguments.add_to):
        raise UserError(
            found="--out without --add-to" if arguments.out else "no output for the labels",
            expected="--csv FILE, or --add-to SET and --out DIR, or both",
            hint="--csv labels.csv",
        )
    return arguments


def main() -> int:
    """Run the command; returns the exit status."""
    arguments = parse_arguments()
    check_run_is_first(arguments.run, arguments.images)
    trained = load_trained_model(arguments.run)
    target = resolve_dataset(arguments.add_to) if arguments.add_to else None
    transposed = False
    if target is not None:
        manifest = Manifest.read(target / "train")
        trained.check_classes(manifest, f"--add-to {arguments.add_to}")
        transposed = manifest.transposed
    name = next(filter(is_packed, arguments.images), None)
    if name is not None:
        if len(arguments.images) > 1:
            raise UserError(
                found=f"{len(arguments.images)} inputs, of which {name} is a packed data set",
                expected="one packed data set, or image files and directories",
                hint="label each input with its own command, and pass the --out of one as --add-to of the next",
            )
        with init_single_process(arguments.device, "the command writes one set of labels") as world:
            store = open_dataset_or_split(name, arguments.split)
            predictions = predict(trained, store, world)
        unlabelled, source = packed_split(store), store.manifest.identity()
    else:
        unlabelled, predictions = predict_files(arguments.run, arguments.images, arguments.device, transposed)
        source = f"{image_digests(unlabelled).sum():016x}"
    pseudo = predictions.above(arguments.confidence)
    counts = np.bincount(pseudo.labels, minlength=len(trained.classes))
    print(
        f"{len(pseudo.labels):,} of {len(predictions.labels):,} images labelled with a confidence of at least "
        f"{arguments.confidence:.2%}, {counts.min():,} to {counts.max():,} per class"
    )
    if arguments.csv:
        labels = [trained.classes[label] for label in pseudo.labels]
        confidence = [f"{value:.4f}" for value in pseudo.confidence]
        columns: dict[str, Any] = {"row": pseudo.source_index, "label": labels, "confidence": confidence}
        if "path" in unlabelled.columns:
            columns["path"] = unlabelled.columns["path"][np.isin(unlabelled.source_index, pseudo.source_index)]
        write_file(arguments.csv, format_csv(list(columns), zip(*columns.values(), strict=True)))
        print(f"labels written to {arguments.csv}")
    if target is not None:
        if not len(pseudo.labels):
            highest = math.floor(predictions.confidence.max() * 1e4) / 1e4
            raise UserError(
                found=f"no image with a confidence of at least {arguments.confidence:.2%}",
                expected=f"images to add to {target}",
                hint=f"--confidence {highest:g}, which the surest prediction reaches",
            )
        options = {
            "pseudo_labelled": source[:12],
            "confidence": arguments.confidence,
            "predictions": len(pseudo.labels),
            "run": str(arguments.run),
        }
        print(add_pseudo_labels(target, arguments.out, unlabelled, pseudo, trained.classes, options, arguments.force))
    return 0


if __name__ == "__main__":
    run_command(main)
