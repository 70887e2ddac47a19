"""Loader benchmarks: throughput (setting, runs, loader_worker, verify, report) and shuffle quality (shuffle_*)."""
