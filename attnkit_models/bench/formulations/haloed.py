"""HaloNet's formulation: blocks of queries meet their block of keys and a halo around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit_models.bench.formulations.learned import LearnedWeights, keys_and_values, projected_out

# Tokens a side of a block of queries, as in the paper.
BLOCK = 8


def haloed(rows: Tensor, sizes: tuple[int, int], halo: int) -> Tensor:
    """(B, heads, N, D) -> (B, heads, D, (BLOCK + 2 halo)^2, blocks), zeros outside the image."""
    maps = rows.transpose(2, 3).flatten(1, 2).unflatten(2, sizes)
    found = F.unfold(maps, BLOCK + 2 * halo, padding=halo, stride=BLOCK)
    return found.unflatten(1, (rows.shape[1], rows.shape[3], -1))


def in_blocks(rows: Tensor, sizes: tuple[int, int]) -> Tensor:
    """(..., N, D) -> (..., blocks, BLOCK * BLOCK, D)."""
    height, width = sizes
    cut = rows.unflatten(-2, (height // BLOCK, BLOCK, width // BLOCK, BLOCK)).transpose(-4, -3)
    return cut.flatten(-5, -4).flatten(-3, -2)


def in_rows(blocks: Tensor, sizes: tuple[int, int]) -> Tensor:
    """The inverse of `in_blocks`."""
    height, width = sizes
    cut = blocks.unflatten(-2, (BLOCK, BLOCK)).unflatten(-4, (height // BLOCK, width // BLOCK))
    return cut.transpose(-4, -3).flatten(-5, -2)


def window_places(kernel: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which keys of block and halo lie in a query's window, and where: bool and int64 (BLOCK^2, (BLOCK + 2 halo)^2).

    HaloNet itself lets a query see the whole halo; the window is what makes it the same function.
    """
    side = torch.arange(BLOCK + kernel - 1, device=device)
    keys, queries = torch.cartesian_prod(side, side), torch.cartesian_prod(side[:BLOCK], side[:BLOCK])
    step = keys[None] - queries[:, None]
    inside = ((step >= 0) & (step < kernel)).all(-1)
    return inside, (step[..., 0] * kernel + step[..., 1]).where(inside, 0)


def seen(sizes: tuple[int, int], kernel: int, inside: Tensor) -> Tensor:
    """Which keys are in the window and in the image: bool (blocks, queries of a block, keys of block and halo)."""
    ones = torch.ones(1, 1, *sizes, device=inside.device)
    image = F.unfold(ones, BLOCK + kernel - 1, padding=kernel // 2, stride=BLOCK)[0] > 0
    return inside & image.t()[:, None]


def halonet(q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int], kernel: int) -> Tensor:
    """Attention of every token over the window around it; arguments as `sasa`, sizes multiples of BLOCK."""
    near_k, near_v = haloed(k, sizes, kernel // 2), haloed(v, sizes, kernel // 2)
    inside, _ = window_places(kernel, q.device)
    logits = torch.einsum("bhgid,bhdmg->bhgim", in_blocks(q * q.shape[-1] ** -0.5, sizes), near_k)
    weights = logits.masked_fill(~seen(sizes, kernel, inside), -torch.inf).softmax(-1)
    return in_rows(torch.einsum("bhgim,bhdmg->bhgid", weights, near_v), sizes)


def halonet_learned(x: Tensor, weights: LearnedWeights, sizes: tuple[int, int], kernel: int) -> Tensor:
    """QnA's layer computed so: learned queries meet the keys of block and halo. x (B, N, C) -> (B, N, C)."""
    k, v = keys_and_values(x, weights)
    near_k, near_v = haloed(k, sizes, kernel // 2), haloed(v, sizes, kernel // 2)
    inside, spot = window_places(kernel, x.device)
    bias, gain = (weights.per_query(table).flatten(2)[:, :, spot] for table in (weights.bias, weights.gain))
    logits = torch.einsum("lhd,bhdmg->blhgm", weights.unit_query(), near_k)[..., None, :] + bias[:, :, None]
    shares = logits.masked_fill(~seen(sizes, kernel, inside), -torch.inf).softmax(-1) * gain[:, :, None]
    return projected_out(in_rows(torch.einsum("blhgim,bhdmg->bhgid", shares, near_v), sizes), weights)
