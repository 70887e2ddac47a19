"""Packing: raw splits are permuted once and written as shards, by one process or by many ranks."""
