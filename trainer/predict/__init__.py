"""Inference with a trained model: predict image files, the drawing demo, pseudo-labels, previews.

Reading order: predictor, input_files, __main__, contact_sheet, demo, pseudo_label, preview.
"""
