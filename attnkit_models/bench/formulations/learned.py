"""The weights of a learned-query layer and what all formulations of it share; the exact layer, written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LearnedWeights:
    """Weights of QnA's layer.

    Attributes:
        query: (queries, heads, D).
        key: (heads * D, C).
        bias: added to the logits, (queries * heads, kernel, kernel).
        gain: factor of the weights after the softmax, the same shape.
        value: weight and bias of the values' projection.
        out: weight and bias of the output's projection.
    """

    query: Tensor
    key: Tensor
    bias: Tensor
    gain: Tensor
    value: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, leaves: tuple[Tensor, ...]) -> LearnedWeights:
        """From query, key, bias, gain and the two projections, in this order."""
        query, key, bias, gain, value, value_bias, out, out_bias = leaves
        return cls(query, key, bias, gain, (value, value_bias), (out, out_bias))

    def unit_query(self) -> Tensor:
        """The queries as they meet the keys: of length 1, times D ** -0.5."""
        length = self.query.norm(dim=2, keepdim=True)
        return self.query / (length + 1e-6) * self.query.shape[2] ** -0.5

    def per_query(self, table: Tensor) -> Tensor:
        """(queries * heads, kernel, kernel) -> (queries, heads, kernel, kernel)."""
        return table.unflatten(0, self.query.shape[:2])


def keys_and_values(x: Tensor, weights: LearnedWeights) -> tuple[Tensor, Tensor]:
    """x (B, N, C) -> two of (B, heads, N, D)."""
    heads = weights.query.shape[1]
    k, v = F.linear(x, weights.key), F.linear(x, *weights.value)
    return k.unflatten(2, (heads, -1)).transpose(1, 2), v.unflatten(2, (heads, -1)).transpose(1, 2)


def projected_out(out: Tensor, weights: LearnedWeights) -> Tensor:
    """(B, heads, N, D) -> (B, N, C)."""
    return F.linear(out.transpose(1, 2).flatten(2), *weights.out)


def exact_learned(x: Tensor, weights: LearnedWeights, sizes: tuple[int, int], kernel: int, rows: Tensor) -> Tensor:
    """The layer at some tokens, from all pairs of tokens: (B, rows, C)."""
    return projected_out(exact_windows(*keys_and_values(x, weights), weights, sizes, kernel, rows), weights)


def exact_windows(
    k: Tensor, v: Tensor, weights: LearnedWeights, sizes: tuple[int, int], kernel: int, rows: Tensor
) -> Tensor:
    """What learned queries see around some tokens: (B, heads, rows, D), summed over the queries of a head."""
    places = torch.cartesian_prod(*(torch.arange(size, device=k.device) for size in sizes))
    step = places - places[rows][:, None] + kernel // 2
    inside = ((step >= 0) & (step < kernel)).all(-1)
    spot = (step[..., 0] * kernel + step[..., 1]).where(inside, 0)
    logits = torch.einsum("lhd,bhnd->blhn", weights.unit_query(), k)[..., None, :]
    bias, gain = (weights.per_query(table).flatten(2)[:, :, spot] for table in (weights.bias, weights.gain))
    shares = (logits + bias).masked_fill(~inside, -torch.inf).softmax(-1) * gain
    return torch.einsum("blhin,bhnd->bhid", shares, v)
