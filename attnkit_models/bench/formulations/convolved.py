"""Learned queries as two convolutions, the way of QnA's paper: exp(score) times values over exp(score)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit_models.bench.formulations.learned import LearnedWeights, keys_and_values, projected_out


def convolved(k: Tensor, v: Tensor, weights: LearnedWeights, sizes: tuple[int, int]) -> Tensor:
    """Learned queries over the window around every token.

    With scores s, biases b and gains g,

        out[i] = sum_t g[t] exp(b[t]) (exp(s) v)[i + t] / sum_t exp(b[t]) exp(s)[i + t],

    is a depthwise convolution over another. The largest score of an image is subtracted first, so that scores which lie
    far apart underflow.

    Args:
        k: (B, heads, N, D), N = height * width.
        v: the same.
        weights: of the layer.
        sizes: height and width in tokens.

    Returns:
        (B, heads, N, D), summed over the queries of a head.
    """
    batch, heads, _, width = v.shape
    queries, kernel = weights.query.shape[0], weights.bias.shape[-1]
    scores = torch.einsum("lhd,bhnd->blhn", weights.unit_query(), k)
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    factor = (weights.bias - weights.bias.amax((1, 2), keepdim=True)).exp()
    maps = (shares[..., None] * v[:, None]).transpose(3, 4).reshape(batch, -1, *sizes)
    rows = (factor * weights.gain).repeat_interleave(width, 0)[:, None]
    above = F.conv2d(maps, rows, padding=kernel // 2, groups=len(rows))
    below = F.conv2d(shares.reshape(batch, -1, *sizes), factor[:, None], padding=kernel // 2, groups=len(factor))
    above = above.view(batch, queries, heads, width, -1)
    return (above / below.view(batch, queries, heads, 1, -1)).sum(1).transpose(2, 3)


def convolved_learned(x: Tensor, weights: LearnedWeights, sizes: tuple[int, int]) -> Tensor:
    """QnA's layer computed so: (B, N, C) -> (B, N, C)."""
    return projected_out(convolved(*keys_and_values(x, weights), weights, sizes), weights)
