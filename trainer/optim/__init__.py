"""Optimizers, schedules, losses, MixUp, EMA and distillation."""
