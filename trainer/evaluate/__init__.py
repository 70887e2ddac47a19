"""Evaluation: metrics, calibration, post-hoc logit adjustment, test-time augmentation."""
