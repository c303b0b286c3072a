"""Calibration: how long every backend takes for calls of every kind, and the constants of `attnkit.kernels.costs`."""
