"""Evaluate a run on a packed data set with the same classes.

    python -m trainer.evaluate RUN_DIR SHARDS [--json FILE]

SHARDS is a packed data set with the classes of the run (its test split is evaluated) or one split of it. Every sample
of the split is evaluated once. FILE receives the metrics that `summary.json` holds.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.common.process_group import report_errors_on_main
from shards.atomic import check_writable, write_file
from shards.cli import command_parser, run_command
from trainer.checkpoint.trained_model import check_run_is_first
from trainer.evaluate.evaluator import evaluate_run
from trainer.runtime.distributed import init_distributed


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.evaluate", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="directory of a run")
    parser.add_argument("shards", metavar="SHARDS", help="directory or address of a packed data set or a split")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics to this file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the model")
    arguments = parser.parse_args()
    if arguments.json:
        check_writable(arguments.json)
    check_run_is_first(arguments.run, [arguments.shards])
    with report_errors_on_main(), init_distributed(arguments.device) as world:
        metrics = evaluate_run(arguments.run, arguments.shards, world)
        if world.is_main_process:
            top5 = f", top-5 accuracy {metrics['top5_accuracy']:.2%}" if "top5_accuracy" in metrics else ""
            print(
                f"{metrics['dataset']}: accuracy {metrics['accuracy']:.2%}{top5}, "
                f"balanced accuracy {metrics['balanced_accuracy']:.2%}, macro F1 {metrics['macro_f1']:.2%}, "
                f"weighted F1 {metrics['weighted_f1']:.2%} on {metrics['samples']:,} images"
            )
            print(f"\n{metrics.pop('report')}")
            if arguments.json:
                write_file(arguments.json, json.dumps(metrics, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
