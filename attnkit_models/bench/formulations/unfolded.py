"""SASA's formulation: keys and values of every window are unfolded, k x k copies of the map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit_models.bench.formulations.learned import LearnedWeights, keys_and_values, projected_out


def unfolded(rows: Tensor, sizes: tuple[int, int], kernel: int) -> Tensor:
    """(B, heads, N, D) -> (B, heads, D, kernel * kernel, N), zeros outside the image."""
    maps = rows.transpose(2, 3).flatten(1, 2).unflatten(2, sizes)
    found = F.unfold(maps, kernel, padding=kernel // 2)
    return found.unflatten(1, (rows.shape[1], rows.shape[3], kernel**2))


def outside(sizes: tuple[int, int], kernel: int, device: torch.device) -> Tensor:
    """Which places of a window lie outside the image: bool (kernel * kernel, N)."""
    return F.unfold(torch.ones(1, 1, *sizes, device=device), kernel, padding=kernel // 2)[0] == 0


def sasa(q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int], kernel: int) -> Tensor:
    """Attention of every token over the window around it.

    Args:
        q: (B, heads, N, D), N = height * width.
        k: the same.
        v: the same.
        sizes: height and width in tokens.
        kernel: tokens a side of the window, odd.
    """
    near_k, near_v = unfolded(k, sizes, kernel), unfolded(v, sizes, kernel)
    logits = torch.einsum("bhnd,bhdkn->bhkn", q * q.shape[-1] ** -0.5, near_k)
    weights = logits.masked_fill(outside(sizes, kernel, q.device), -torch.inf).softmax(2)
    return torch.einsum("bhkn,bhdkn->bhnd", weights, near_v)


def sasa_learned(x: Tensor, weights: LearnedWeights, sizes: tuple[int, int], kernel: int) -> Tensor:
    """QnA's layer computed so: learned queries meet the unfolded keys. x (B, N, C) -> (B, N, C)."""
    k, v = keys_and_values(x, weights)
    near_k, near_v = unfolded(k, sizes, kernel), unfolded(v, sizes, kernel)
    logits = torch.einsum("lhd,bhdkn->blhkn", weights.unit_query(), near_k)
    logits = logits + weights.per_query(weights.bias).flatten(2)[..., None]
    shares = logits.masked_fill(outside(sizes, kernel, x.device), -torch.inf).softmax(3)
    shares = shares * weights.per_query(weights.gain).flatten(2)[..., None]
    return projected_out(torch.einsum("blhkn,bhdkn->bhnd", shares, near_v), weights)
