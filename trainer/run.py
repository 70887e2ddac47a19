"""Train a recipe and write its report.

python -m trainer.run configs/quickstart.yaml [key=value ...] [--dry-run]
torchrun --nproc_per_node=2 -m trainer.run configs/byclass.yaml
"""

from __future__ import annotations

import argparse

from shards.cli import command_parser, run_command
from trainer.config.base import add_recipe_arguments, settings_help
from trainer.config.schema import Config


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "trainer.run",
        __doc__,
        epilog=f"settings (in the file, or key=value):\n{settings_help(Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would run, take one step, and stop")
    return parser.parse_intermixed_args()


def main() -> int:
    """Run the command; returns the exit status."""
    arguments = parse_arguments()
    from trainer.loop.train import train  # the import of torch takes seconds; --help does not need it

    return train(arguments.config, arguments.overrides, arguments.dry_run)


if __name__ == "__main__":
    run_command(main)
