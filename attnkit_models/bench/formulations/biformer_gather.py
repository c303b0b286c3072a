"""BiFormer's formulation: keys and values of the routed regions are fetched by torch.gather from an expanded map."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from attnkit.kernels import AttendCall, AttendResult, Backend
from attnkit.layouts import Blocks

NAME = "biformer_gather"


def attend_to_gathered(
    q: Tensor, kv: Tensor, index: Tensor, heads: int, scale: float, hidden: Tensor | None = None
) -> Tensor:
    """Attention of every region over the regions it is routed to, on tokens that lie region by region.

    Args:
        q: (B, R, T, C).
        kv: keys and values side by side, (B, R, T, C + Cv).
        index: int64 (B, R, topk).
        heads: number of heads.
        scale: factor of the logits.
        hidden: bool (B or 1, R, topk * T), keys that are none; None where all are.

    Returns:
        (B, R, T, Cv).
    """
    batch, regions, tokens, width = kv.shape
    topk = index.shape[-1]
    near = torch.gather(
        kv[:, None].expand(-1, regions, -1, -1, -1),
        dim=2,
        index=index[..., None, None].expand(-1, -1, -1, tokens, width),
    )
    k, v = near.split([q.shape[-1], width - q.shape[-1]], dim=-1)
    k = rearrange(k, "b r k t (h d) -> (b r) h d (k t)", h=heads)
    v = rearrange(v, "b r k t (h d) -> (b r) h (k t) d", h=heads)
    logits = (rearrange(q, "b r t (h d) -> (b r) h t d", h=heads) * scale) @ k
    if hidden is not None:
        logits = logits.masked_fill(
            hidden.expand(batch, regions, topk * tokens).reshape(-1, 1, 1, topk * tokens), -torch.inf
        )
    out = logits.softmax(-1) @ v
    return rearrange(out, "(b r) h t d -> b r t (h d)", r=regions)


def biformer_gather(q: Tensor, k: Tensor, v: Tensor, index: Tensor, sizes: tuple[int, int], regions: int) -> Tensor:
    """Routed attention on row-major image tokens whose map divides into regions.

    Args:
        q: (B, heads, N, D), N = height * width.
        k: the same.
        v: the same.
        index: int64 (B, R, topk).
        sizes: height and width in tokens.
        regions: regions a side.
    """
    heads = q.shape[1]
    cut = {"y": regions, "x": regions, "h": sizes[0] // regions, "w": sizes[1] // regions}

    def by_region(one: Tensor) -> Tensor:
        return rearrange(one, "b m (y h x w) d -> b (y x) (h w) (m d)", **cut)

    kv = torch.cat([by_region(k), by_region(v)], dim=-1)
    out = attend_to_gathered(by_region(q), kv, index, heads, q.shape[-1] ** -0.5)
    return rearrange(out, "b (y x) (h w) (m d) -> b m (y h x w) d", m=heads, **cut)


class BiFormerGather(Backend):
    """The same as a backend, so that a whole model runs on it; chosen only where it is asked for."""

    name: ClassVar[str] = NAME

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        layout = call.layout
        if not isinstance(layout, Blocks) or layout.index is None:
            return (f"BiFormer gathers routed regions, not a {call.layout.kind} layout",)
        reasons = []
        if layout.index.shape[1] != 1 or layout.order.token.shape[:2] != (1, 1) or layout.key_order is not None:
            reasons.append("BiFormer's heads share their regions")
        if layout.prefix or layout.key_mask is not None:
            reasons.append("BiFormer has neither prefix tokens nor masked ones")
        if call.bias is not None or call.gain is not None or call.return_lse or call.q.dtype != call.v.dtype:
            reasons.append("BiFormer's attention has no bias, gain, lse, nor a second dtype")
        return tuple(reasons)

    def cost(self, call: AttendCall) -> float:
        return math.inf

    def run(self, call: AttendCall) -> AttendResult:
        layout = call.layout
        assert isinstance(layout, Blocks) and layout.index is not None
        token, slot = layout.order.token[0, 0], layout.order.slot[0, 0]
        index = layout.index[:, 0].expand(call.q.shape[0], -1, -1)

        def by_region(one: Tensor) -> Tensor:
            rows = one.transpose(1, 2).flatten(2)
            return rows[:, token.clamp(min=0).flatten()].unflatten(1, token.shape)

        hidden = None
        if layout.order.padded:
            found = torch.where(index[..., None] < 0, -1, token[index.clamp(min=0)])
            hidden = (found < 0).flatten(2)
            # A region without tokens sees something, which nobody reads.
            hidden = hidden & ~hidden.all(-1, keepdim=True)
        kv = torch.cat([by_region(call.k), by_region(call.v)], dim=-1)
        out = attend_to_gathered(by_region(call.q), kv, index.clamp(min=0), call.q.shape[1], call.scale, hidden)
        out = out.flatten(1, 2)[:, slot].unflatten(-1, (call.q.shape[1], -1)).transpose(1, 2)
        return AttendResult(out, None)
