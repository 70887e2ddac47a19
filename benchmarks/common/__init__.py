"""What do all benchmarks share? Spreads, fresh processes, result files and the default data set."""
