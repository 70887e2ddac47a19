"""Readers of raw data sets: archives, file formats, directory layouts and class names."""
