"""Benchmarks: resolution sweep, loader, shuffle quality, training throughput, scaling, ablation, device check.

All use the public interfaces of the packages and one harness: warm-up, several runs, median and spread, alternating
order, environment, JSON lines, a chart and a Markdown table.
"""

import shards  # noqa: F401  see `exit_on_interrupt`
