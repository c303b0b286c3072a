"""Kernels of stencils: queries that see a window of the grid around their own place."""
