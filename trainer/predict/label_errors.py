"""Find training images whose label is probably wrong, by cross-validation and confident learning.

    python -m trainer.predict.label_errors RECIPE [key=value ...] [--folds 5] [--out DIR]

Trains one model for each part of the training split, on the other parts (`data.fold`), and predicts the part with it.
Confident learning compares these out-of-fold probabilities with the labels: Northcutt, Jiang and Chuang 2021, Confident
Learning: Estimating Uncertainty in Dataset Labels, JAIR 70. `label_errors.html` shows the images, the most suspicious
first, and `label_errors.csv` lists them; `python -m pipeline.shard ... --exclude label_errors.csv` packs the others.
Folds that are complete are not trained again, so they can be trained in advance, on several machines:

    torchrun -m trainer.run RECIPE data.fold=1/5 run.dir=DIR/fold-1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.labelled_samples import LabelledSamples
from pipeline.common.process_group import report_errors_on_main
from pipeline.readers.formats.csv import format_csv
from shards.atomic import write_file
from shards.cli import command_parser, run_command
from shards.errors import UserError, quote
from shards.open import open_split
from shards.remote.datasets import resolve_dataset
from shards.stores.base import Store
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import load_trained_model
from trainer.config import load as config
from trainer.config.base import add_recipe_arguments
from trainer.config.schema import Config
from trainer.data.training_data import split_fold
from trainer.evaluate.evaluator import loader_for, map_logits
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.loop.train import train
from trainer.report.error_gallery import data_urls
from trainer.report.html import render
from trainer.runtime.distributed import World, init_distributed

_MAX_IMAGES = 500  # of the page
_MAX_SIDE = 96  # pixels


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of the images of a training split by models that were not trained on them, in the order of rows.

    Attributes:
        rows: int64 [N], positions in the raw source.
        labels: int64 [N].
        probabilities: float32 [N, C], calibrated.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def predict_folds(runs: list[Path], settings: Config, store: Store, world: World) -> OutOfFold | None:
    """Predict each part of a training split with the model of its run.

    Args:
        runs: The run of each fold.
        settings: Seed of the folds.
        store: The training split.
        world: The process group.

    Returns:
        The predictions on rank 0; None elsewhere.
    """

    def probabilities_of(head: ProbabilityHead, logits: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (head(logits),)

    parts = []
    for number, run in enumerate(runs, 1):
        trained = load_trained_model(run)
        head = ProbabilityHead(**trained.posthoc_kwargs())
        fold, _ = split_fold(LabelledSamples.of(store), f"{number}/{len(runs)}", settings.seed)
        loader, model = loader_for(store, trained, world, fold.samples), trained.build_model(world.device)
        output = map_logits(partial(probabilities_of, head), model, loader, trained.config.trainer, world)
        parts.append(None if output is None else output[0])
    if not world.is_main_process:
        return None
    rows, labels, probabilities = (np.concatenate(column) for column in zip(*filter(None, parts), strict=True))
    order = np.argsort(rows, kind="stable")
    return OutOfFold(rows[order], labels[order], probabilities[order])


def find_label_errors(labels: NDArray[np.int64], probabilities: NDArray[np.float32]) -> NDArray[np.int64]:
    """Find samples that are confidently of another class than their label.

    A sample counts for the class of the largest probability among those that reach the mean probability of the class
    over the samples labelled so (confident joint, equation 1 of the paper). As in cleanlab, a sample whose label is its
    most probable class counts as correct.

    Args:
        labels: int64 [N].
        probabilities: float32 [N, C], out of fold.

    Returns:
        Positions, int64 [n], those with the smallest normalized margin first: the probability of the label minus the
        largest other one.
    """
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    means = np.bincount(labels, own, minlength=len(counts)) / np.maximum(counts, 1)
    is_confident = probabilities >= np.where(counts, means, np.inf)
    confident = np.where(is_confident, probabilities, -1).argmax(axis=1)
    wrong = is_confident.any(axis=1) & (confident != labels) & (probabilities.argmax(axis=1) != labels)
    # The largest probability is of another class, as the label is not the most probable one.
    margin = own - probabilities.max(axis=1)
    positions = np.flatnonzero(wrong)
    return positions[np.argsort(margin[positions], kind="stable")]


def write_results(predictions: OutOfFold, suspicious: NDArray[np.int64], store: Store, out: Path) -> None:
    """Write `label_errors.csv` and `label_errors.html`.

    Args:
        predictions: Of the training split.
        suspicious: Positions in them, the most suspicious first.
        store: The training split.
        out: Directory.
    """
    classes = store.manifest.classes
    labels, probabilities = predictions.labels[suspicious], predictions.probabilities[suspicious]
    columns = predictions.rows[suspicious].tolist(), labels.tolist(), probabilities.argmax(axis=1).tolist()
    rows = [
        (store.manifest.split, row, classes[label], classes[other], f"{each[label]:.4f}", f"{each[other]:.4f}")
        for row, label, other, each in zip(*columns, probabilities, strict=True)
    ]
    header = ["part", "row", "label", "likely", "p(label)", "p(likely)"]
    write_file(out / "label_errors.csv", format_csv(header, rows))
    urls = data_urls(store, predictions.rows[suspicious][:_MAX_IMAGES], _MAX_SIDE)
    page = render(
        "label_errors.html.j2",
        Path(__file__).parent,
        name=store.manifest.name,
        images=[(url, *row[1:]) for url, row in zip(urls, rows, strict=False)],
        found=len(rows),
        samples=len(predictions.rows),
    )
    write_file(out / "label_errors.html", page)


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.predict.label_errors", __doc__)
    add_recipe_arguments(parser)
    add = parser.add_argument
    add("--folds", type=int, default=5, metavar="N", help="parts of the training split, 2 or more (default 5)")
    add("--out", type=Path, metavar="DIR", help="directory of runs and results (default runs/NAME-label-errors)")
    arguments = parser.parse_intermixed_args()
    given = {override.partition("=")[0].strip() for override in arguments.overrides}
    if own := sorted(given & {"data.fold", "resume", "run.dir"}):
        raise UserError(
            found=" and ".join(own),
            expected="no setting that differs between the folds: this command sets data.fold, run.dir and resume=auto",
            hint="--folds N for the number of parts, --out DIR for the directory of all runs",
        )
    if arguments.folds < 2:
        raise UserError(found=f"--folds {arguments.folds}", expected="two parts or more", hint="--folds 5")
    settings = config.load(arguments.config, [*arguments.overrides, f"data.fold=1/{arguments.folds}"])
    out = arguments.out or Path("runs") / f"{settings.run.name}-label-errors"
    runs = [out / f"fold-{number}" for number in range(1, arguments.folds + 1)]
    if (run := RunDirectory(runs[0])).config.exists():
        fold = run.read_settings()[1].data.fold
        if fold != f"1/{len(runs)}":
            raise UserError(
                found=f"{run.path}, a run of data.fold={'null' if fold is None else fold}",
                expected=f"a run of data.fold=1/{len(runs)} (--folds {len(runs)})",
                hint="choose another --out" + (f", or --folds {fold.split('/')[1]}" if fold else ""),
            )
    for number, path in enumerate(runs, 1):
        own = [f"data.fold={number}/{len(runs)}", f"run.dir={path}", "resume=auto"]
        status = train(arguments.config, [*arguments.overrides, *own], False)
        if status:
            return status
    with report_errors_on_main(), init_distributed(settings.device) as world, torch.inference_mode():
        store = open_split(resolve_dataset(settings.data.shards), "train")
        predictions = predict_folds(runs, settings, store, world)
        if predictions is not None:
            suspicious = find_label_errors(predictions.labels, predictions.probabilities)
            write_results(predictions, suspicious, store, out)
            accuracy = (predictions.probabilities.argmax(axis=1) == predictions.labels).mean()
            print(
                f"{len(suspicious):,} of {len(predictions.rows):,} labels are probably wrong "
                f"(out-of-fold accuracy {accuracy:.2%})\n"
                f"{out / 'label_errors.html'}\n{out / 'label_errors.csv'}\n"
                f"pack without them: inkstream pack SOURCE --exclude {quote(out / 'label_errors.csv')}"
            )
    return 0


if __name__ == "__main__":
    run_command(main)
