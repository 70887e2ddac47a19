"""Draw a contact sheet of a recipe's training images: raw beside preprocessed and augmented.

    python -m trainer.predict.preview CONFIG [key=value ...] [--out FILE]

The sheet shows a few examples of each class.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.common.device import choose_device
from pipeline.preview import contact_sheet, save_png
from shards.atomic import check_writable
from shards.cli import command_parser, run_command
from shards.open import open_split
from shards.remote.datasets import resolve_dataset
from trainer.config import load as config
from trainer.config.base import add_recipe_arguments
from trainer.models.auto import resolve_auto


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.predict.preview", __doc__)
    add_recipe_arguments(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("preview.png"), metavar="FILE", help="PNG to write (default preview.png)"
    )
    arguments = parser.parse_intermixed_args()
    settings = config.load(arguments.config, arguments.overrides)
    check_writable(arguments.out)
    data = resolve_auto(settings, choose_device(settings.device)).data
    store = open_split(resolve_dataset(data.shards), "train")
    changes = data.interpolation, data.preprocessing(), settings.augment.augmentation()
    save_png(contact_sheet(store, data.final_resolution, *changes), arguments.out)
    return 0


if __name__ == "__main__":
    run_command(main)
