"""Kinds of stores: readers and writers of block-record tar shards, zarr arrays and records of one image file."""
