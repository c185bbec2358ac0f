"""Measuring: the loss as a deterministic function, estimators of local smoothness, and the probe."""
