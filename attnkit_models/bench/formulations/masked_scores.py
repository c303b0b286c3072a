"""Sparsifiner's formulation: a whole matrix of predicted scores, a whole mask, a whole masked softmax."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS, THRESHOLD = 8, 0.02


def split_heads(x: Tensor, weights: Mapping[str, Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, heads, N, D) of a layer's input (B, N, C)."""
    qkv = F.linear(x, weights["qkv.weight"], weights["qkv.bias"]).unflatten(2, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def joined(out: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """(B, heads, N, D) -> (B, N, C)."""
    return F.linear(out.transpose(1, 2).flatten(2), weights["proj.weight"], weights["proj.bias"])


@torch.no_grad()
def predicted_mask(q: Tensor, k: Tensor, weights: Mapping[str, Tensor], keep: float) -> Tensor:
    """Which keys the predictor chooses for every query: bool (B, heads, N, N)."""
    near = {name.removeprefix("groups.0.predictor."): one for name, one in weights.items() if ".predictor." in name}
    small_q, small_k = (
        F.linear(one, near[f"{name}.weight"], near[f"{name}.bias"]) for name, one in (("query", q), ("key", k))
    )
    # The authors' code scales by the number of heads.
    logits = small_q @ (small_k.mT @ near["down"]) * q.shape[1] ** -0.5
    coefficients = logits.softmax(-1)
    best = coefficients.topk(min(COEFFICIENTS, coefficients.shape[-1]), dim=-1)
    coefficients = torch.zeros_like(coefficients).scatter(-1, best.indices, best.values)
    basis = near["up"].abs()
    scores = coefficients @ basis.where(basis > THRESHOLD, 0.0).mT
    budget = max(math.ceil(round(keep * k.shape[2], 6)), 1)
    chosen = scores.topk(budget, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def sparsifiner_layer(
    x: Tensor, weights: Mapping[str, Tensor], heads: int, keep: float, *, also_unmasked: bool = True
) -> Tensor:
    """The layer: (B, N, C) -> (B, N, C).

    Args:
        x: its input.
        weights: by the names they have in attnkit's layer.
        heads: number of heads.
        keep: share of keys each query sees.
        also_unmasked: whether the softmax of all scores is computed too, as the authors' code does in every pass; only
            their self-distillation reads it.
    """
    q, k, v = split_heads(x, weights, heads)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    unmasked = logits.softmax(-1) if also_unmasked else None
    mask = predicted_mask(q, k, weights, keep)
    shares = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    shares = shares.masked_fill(shares.isnan(), 0.0)
    out = joined(shares @ v, weights)
    del unmasked
    return out


def dense_layer(x: Tensor, weights: Mapping[str, Tensor], heads: int) -> Tensor:
    """The same layer with dense attention, on PyTorch's fused kernel."""
    return joined(F.scaled_dot_product_attention(*split_heads(x, weights, heads)), weights)


def exact_layer(x: Tensor, weights: Mapping[str, Tensor], heads: int, rows: Tensor, visible: Tensor | None) -> Tensor:
    """The layer at some tokens, under given keys: (B, rows, C)."""
    q, k, v = split_heads(x, weights, heads)
    logits = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return joined(logits.softmax(-1) @ v, weights)
