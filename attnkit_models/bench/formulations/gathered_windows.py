"""Windows of a permuted row: tokens are gathered window by window, PyTorch's fused attention runs, they go back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def gathered_windows(q: Tensor, k: Tensor, v: Tensor, permutation: Tensor, window: int) -> Tensor:
    """Attention inside windows of `window` tokens of a permuted row; the last one may be shorter.

    Args:
        q: (B, heads, N, D).
        k: the same.
        v: the same.
        permutation: int64 (N,).
        window: tokens a window.
    """
    batch, heads, tokens, width = q.shape
    whole = tokens // window * window
    outputs = []
    for first, last, length in ((0, whole, window), (whole, tokens, tokens - whole)):
        if first < last:
            spots = permutation[first:last]
            parts = (one.index_select(2, spots).reshape(batch, -1, length, width) for one in (q, k, v))
            near_q, near_k, near_v = parts
            near = scaled_dot_product_attention(near_q, near_k, near_v)
            outputs.append(near.reshape(batch, heads, last - first, width))
    return torch.cat(outputs, dim=2).index_select(2, permutation.argsort())
