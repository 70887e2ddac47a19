"""Runtime of a training: process group, signals, seeds, memory, environment, profiler, progress and metric loggers."""
