"""Inference with a trained run: prediction of files, the drawing demo, pseudo-labels, and a preview of the input."""
