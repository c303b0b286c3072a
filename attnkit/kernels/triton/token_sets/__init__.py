"""Triton kernels of token sets and token masks: queries with keys of their own, in tiles that share a list of keys."""
