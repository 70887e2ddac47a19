"""Evaluation: metrics, calibration, logit adjustment, test-time augmentation."""
