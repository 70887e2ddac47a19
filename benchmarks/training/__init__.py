"""Training benchmarks: the measured loop, the report of ablations and their plans."""
