"""Triton kernels of blocks: regions, windows and cuts of any kind that see whole blocks of keys."""
