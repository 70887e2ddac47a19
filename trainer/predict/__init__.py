"""Inference with a trained model: predict image files, the drawing demo, pseudo-labels, label errors, previews.

Reading order: predictor, input_files, __main__, demo, pseudo_label, label_errors, preview.
"""
