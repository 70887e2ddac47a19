"""Write the HTML report of a run again, or one page that compares several runs.

python -m trainer.report RUN [--shards SHARDS]
python -m trainer.report RUN RUN ... [--out FILE.html]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shards.atomic import check_writable, write_file
from shards.cli import program_name, run_command
from shards.errors import UserError
from trainer.checkpoint.completed_run import CompletedRun
from trainer.report import compare_page, run_page


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("trainer.report"),
        description="Write a finished run's report.html again, or one page that compares several runs.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page that compares (default comparison.html here)")
    parser.add_argument("--shards", metavar="SHARDS", help="the run's packed set, if it is elsewhere now")
    arguments = parser.parse_args()
    if len(arguments.runs) == 1:
        if arguments.out:
            raise UserError(
                found=f"--out {arguments.out} with a single run",
                expected="several runs to compare; the page about one is in its directory",
                hint=f"leave --out away: python -m trainer.report {arguments.runs[0]}",
            )
        run = CompletedRun.open(arguments.runs[0])
        _, store = run.data(arguments.shards)
        run_page.write(run.directory.path, store, run.summary, run.history)
        print(run.directory.report)
        return 0
    if arguments.shards:
        raise UserError(
            found=f"--shards {arguments.shards} with several runs",
            expected="one run, whose pictures it has; a comparison shows none",
            hint="leave --shards away",
        )
    out = arguments.out or Path("comparison.html")
    check_writable(out)
    write_file(out, compare_page.page([CompletedRun.open(path) for path in arguments.runs]))
    print(out)
    return 0


if __name__ == "__main__":
    run_command(main)
