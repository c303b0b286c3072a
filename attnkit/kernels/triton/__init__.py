"""Triton kernels; nothing else of attnkit imports triton."""
