"""Write report.html of a complete run again, or a page that compares several runs.

python -m trainer.report RUN [--shards SHARDS]
python -m trainer.report RUN RUN ... [--out FILE.html]
"""

from __future__ import annotations

from pathlib import Path

from shards.atomic import check_writable, write_file
from shards.cli import command_parser, run_command
from shards.errors import UserError
from trainer.checkpoint.completed_run import CompletedRun
from trainer.report import compare_page, run_page


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page of the comparison (default comparison.html)")
    parser.add_argument("--shards", metavar="SHARDS", help="the run's packed data set, if it has been moved")
    arguments = parser.parse_args()
    is_single = len(arguments.runs) == 1
    if arguments.out if is_single else arguments.shards:
        raise UserError(
            found="--out with one run" if is_single else "--shards with several runs",
            expected="--shards for the report of one run, --out for the comparison of several",
            hint="python -m trainer.report RUN [--shards SHARDS], or python -m trainer.report RUN RUN ... [--out FILE]",
        )
    if is_single:
        run = CompletedRun.open(arguments.runs[0])
        train, store = run.data(arguments.shards)
        run_page.write(run.directory.path, train, store, run.summary, run.history)
        print(run.directory.report)
        return 0
    out = arguments.out or Path("comparison.html")
    check_writable(out)
    write_file(out, compare_page.render_page([CompletedRun.open(path) for path in arguments.runs]))
    print(out)
    return 0


if __name__ == "__main__":
    run_command(main)
