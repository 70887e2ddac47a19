"""Shared by all benchmarks: arguments, timing, processes, number formats, tables and charts."""
