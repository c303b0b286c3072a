"""Tuning: times the configurations of Triton's kernels beside their neighbours, and rewrites the table of this GPU."""
