"""Operators: what a family of layouts computes, as torch operators `attnkit::...` without any arithmetic.

Kernels are registered into them per device: plain torch by `attnkit.kernels.chunked`.
"""
