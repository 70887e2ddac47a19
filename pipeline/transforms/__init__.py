"""From raw images to model input: one specification, computed by DALI or by torch."""
