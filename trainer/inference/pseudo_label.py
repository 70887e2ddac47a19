"""Label images by a run's own predictions, where it is sure of them.

    python -m trainer.inference.pseudo_label RUN_DIR SHARDS [--part train] --confidence 0.95 --csv FILE
    python -m trainer.inference.pseudo_label RUN_DIR SHARDS --confidence 0.95 --add-to SET --out DIR

The first writes a line (row, label, confidence) for each image of which the run is at least so sure; whatever labels
SHARDS has are not looked at. The second packs SET again with those images added to its train part, under the labels
predicted; its test and val parts stay as they are, and images that these hold are not added. `origins.csv` in the new
train part tells where each image has come from. Lee 2013, Pseudo-label, ICML Workshop on Challenges in Representation
Learning.
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
from shards.remote.sets import resolve_dataset
from shards.stores.base import Store
from trainer.checkpoint.trained_model import load_trained_model
from trainer.evaluate.evaluator import loader_for, logits_of
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.runtime.distributed import World, init_distributed


@dataclass(frozen=True)
class PseudoLabels:
    """Of all images of a part, in the order of rows: int64 rows and labels, float32 confidence, each [N]."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    confidence: NDArray[np.float32]

    def above(self, confidence: float) -> PseudoLabels:
        sure = self.confidence >= confidence
        return PseudoLabels(self.rows[sure], self.labels[sure], self.confidence[sure])


def predict(run: Path, store: Store, world: World) -> PseudoLabels:
    """What the best model of a run says of every image of a part, by its decision and temperature."""
    trained = load_trained_model(run)
    model = trained.build_model(world.device)
    found = logits_of(model, loader_for(store, trained, world), trained.config.trainer, world)
    assert found is not None, "one rank"
    top = ProbabilityHead(**trained.posthoc_kwargs())(torch.from_numpy(found[0])).max(dim=1)
    return PseudoLabels(np.sort(store.rows), top.indices.numpy(), top.values.numpy())


def to_csv(found: PseudoLabels, classes: tuple[str, ...]) -> str:
    """A table of the labels. classes: names by number."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", "label", "confidence"])
    for row, label, confidence in zip(found.rows, found.labels, found.confidence, strict=True):
        lines.writerow([row, classes[label], f"{confidence:.4f}"])
    return text.getvalue()


def with_pseudo_labels(
    parts: tuple[RawSplit, ...], unlabelled: RawSplit, found: PseudoLabels
) -> tuple[tuple[RawSplit, ...], int]:
    """The parts of a set with the images found added to train, but for those that are in another part; how many
    these are. unlabelled: the part that was predicted."""
    train, others = parts[0], parts[1:]
    some = unlabelled.select(np.flatnonzero(np.isin(unlabelled.source_index, found.rows)))
    some = replace(
        some,
        name="pseudo-labelled",
        classes=train.classes,
        labels=found.labels,
        columns={"confidence": np.array([f"{value:.4f}" for value in found.confidence])},
    )
    held = np.concatenate([np.empty(0, np.uint64), *(image_digests(part) for part in others)])
    new = ~np.isin(image_digests(some), held)
    if not new.any():
        return parts, int((~new).sum())
    return (concatenate(train, some.select(np.flatnonzero(new))), *others), int((~new).sum())


def _add(directory: Path, out: str, unlabelled: RawSplit, found: PseudoLabels, options: dict[str, Any]) -> str:
    parts = packed_splits(directory)
    manifest = Manifest.read(directory / "train")
    parts, held = with_pseudo_labels(parts, unlabelled, found)
    packed = pack(
        lambda: parts,
        out,
        dataset=manifest.dataset,
        variant=manifest.variant,
        block_size=manifest.block_size,
        seed=manifest.seed,
        store=manifest.store,
        options={"packed_from": manifest.digest()[:12], **options},
    )
    left = f", {held:,} left out that its other parts hold" if held else ""
    there = "" if packed.is_new else " (packed already)"
    return f"{packed.manifests[0].samples:,} images to train on{left}, in {out}{there}"


def _open(shards: str, part: str) -> tuple[Store, Path]:
    """A part and its directory; shards may be the part itself."""
    directory = resolve_dataset(shards)
    place = directory if (directory / MANIFEST_NAME).is_file() else directory / part
    return open_store(place), place


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("trainer.inference.pseudo_label"),
        description="Label images by a run's predictions, where it is sure.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="directory of a run")
    add("shards", metavar="SHARDS", help="packed images to label, or their address; their labels are not looked at")
    add("--part", choices=SPLITS, default="train", help="which part of SHARDS (default train)")
    add("--confidence", type=_share, required=True, metavar="P", help="least calibrated probability, 0 .. 1")
    add("--csv", type=Path, metavar="FILE", help="write row, label and confidence of each image here")
    add("--add-to", metavar="SET", help="packed set whose train part the images are added to")
    add("--out", metavar="PLACE", help="where to pack that, a directory or address")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    arguments = parser.parse_args()
    if arguments.csv:
        check_writable(arguments.csv)
    if not (arguments.csv or arguments.out) or bool(arguments.out) != bool(arguments.add_to):
        raise UserError(
            found="nowhere to write the labels" if not arguments.out else "--out without --add-to",
            expected="--csv FILE, or --add-to SET and --out DIR, or both",
            hint="--csv labels.csv",
        )
    classes = load_trained_model(arguments.run).classes
    target = resolve_dataset(arguments.add_to) if arguments.add_to else None
    if target is not None and Manifest.read(target / "train").classes != classes:
        raise UserError(
            found=f"--add-to {arguments.add_to} with other classes than the run",
            expected=f"the classes {' '.join(classes)}",
            hint="name a packed set of the data set and split that the run was trained on",
        )
    with init_distributed(arguments.device) as world:
        store, place = _open(arguments.shards, arguments.part)
        everything = predict(arguments.run, store, world)
    found = everything.above(arguments.confidence)
    counts = np.bincount(found.labels, minlength=len(classes))
    print(
        f"{len(found.rows):,} of {len(everything.rows):,} images labelled with at least {arguments.confidence:.1%} "
        f"confidence, {counts.min():,} to {counts.max():,} of a class"
    )
    if arguments.csv:
        write_file(arguments.csv, to_csv(found, classes))
        print(f"listed in {arguments.csv}")
    if target is not None:
        options = {
            "pseudo_labelled": store.manifest.digest()[:12],
            "confidence": arguments.confidence,
            "predictions": len(found.rows),
            "run": str(arguments.run),
        }
        print(_add(target, arguments.out, packed_split(store, place), found, options))
    return 0


if __name__ == "__main__":
    run_command(main)
