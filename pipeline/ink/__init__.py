"""Conversion of arbitrary images to the format of a packed data set, including the placement of ink.

Reading order: `adapter`, `geometry`, `shading`.
"""
