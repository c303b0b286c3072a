"""The gather backend: plain PyTorch that fetches the keys each query sees; nothing of size Nq x Nk exists."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work, fetched, pairs
from attnkit.kernels.softmax import fusable, fused_attention, global_rows, plain_attention, visible_values
from attnkit.layouts import Blocks, Stencil, TokenSets

# Numbers of keys and values that the caches of a processor hold.
CACHED = float(2**21)


class GatherBackend(MeasuredBackend):
    """Blocks: gathered keys and one batched attention. Token sets and stencils: a list of keys per query."""

    name: ClassVar[str] = "gather"

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        if not call.k.shape[2]:
            return ("there are no keys to fetch",)
        if isinstance(call.layout, (Blocks, Stencil, TokenSets)):
            return ()
        return (f"a {call.layout.kind} layout has no list of keys to fetch; it takes blocks, stencil and token_sets",)

    def work(self, call: AttendCall) -> Work:
        layout = call.layout
        if isinstance(layout, Blocks):
            counts = fetched(call, layout)
            # All at once, so that what the caches do not hold goes to memory and back.
            kernel = "gather windows" if layout.index is None else "gather blocks"
            return Work(kernel, {**counts, "spilled": max(counts["moved"] - CACHED, 0.0)})
        return Work("gather lists", pairs(call, layout.key_slots))

    def run(self, call: AttendCall) -> AttendResult:
        layout = call.layout
        prefix = layout.global_queries
        if isinstance(layout, Blocks):
            image = _blocks(call, layout)
        elif isinstance(layout, Stencil):
            image = _lists(call, layout.taps(call.q.device)[None, None])
        else:
            assert isinstance(layout, TokenSets)
            image = _lists(call, layout.index)
        if not prefix:
            return image
        row = global_rows(call, prefix)
        lse = None if image.lse is None or row.lse is None else torch.cat([row.lse, image.lse], dim=2)
        return AttendResult(torch.cat([row.out, image.out], dim=2), lse)


def _fetch(rows: Tensor, token: Tensor) -> Tensor:
    """Rows of (B, heads, N, D) at tokens >= 0 (B or 1, heads or 1, ...): (B, heads, ..., D).

    Heads that share their tokens are fetched together, straight from the (B, N, heads, D) order in which a projection
    leaves them.
    """
    batch, heads, count, width = rows.shape
    shape = token.shape[2:]
    if token.shape[1] == 1:
        flat = rows.transpose(1, 2)
        if token.shape[0] == 1:
            found = _select(flat, 1, token.flatten())
        else:
            step = torch.arange(batch, device=rows.device).view(-1, 1) * count
            found = _select(flat.reshape(batch * count, heads, width), 0, (token.flatten(1) + step).flatten())
        found = found.view(batch, *shape, heads, width).movedim(-2, 1)
    else:
        step = torch.arange(batch * heads, device=rows.device).view(batch, heads, 1) * count
        spots = (token.flatten(2).expand(batch, heads, -1) + step).flatten()
        found = _select(rows.reshape(batch * heads * count, width), 0, spots).view(batch, heads, *shape, width)
    return found


class _Select(torch.autograd.Function):
    """`index_select` whose gradient is added up in float32.

    Many queries may read one key, a prefix token above all. In bfloat16 a sum of ones ends at 256.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, dim: int, spots: Tensor) -> Tensor:
        return rows.index_select(dim, spots)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, Tensor], output: Tensor) -> None:
        rows, ctx.dim, spots = inputs
        ctx.shape = rows.shape
        ctx.save_for_backward(spots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        return total.index_add(ctx.dim, ctx.saved_tensors[0], grad.float()).to(grad.dtype), None, None


def _select(rows: Tensor, dim: int, spots: Tensor) -> Tensor:
    if rows.dtype.itemsize < 4 and rows.requires_grad and torch.is_grad_enabled():
        return _Select.apply(rows, dim, spots)
    return rows.index_select(dim, spots)


def _blocks(call: AttendCall, layout: Blocks) -> AttendResult:
    order, keys = layout.order, layout.key_tokens()
    prefix = layout.prefix
    if order.padded and layout.index is not None:
        # A block without queries fetches nothing: what only it would see may hold NaN.
        keys = torch.where((order.token >= 0).any(-1, keepdim=True), keys, -1)
    if prefix:
        shared = torch.arange(prefix, device=keys.device).expand(*keys.shape[:3], -1)
        keys = torch.cat([shared, keys], dim=3)
    partial = layout.key_mask is not None or layout.keys_cut.padded or layout.index is not None
    valid = None
    k, v = visible_values(call)
    if not fusable(call):
        k, v = k.to(call.compute_dtype), v.to(call.compute_dtype)
    near = keys.clamp(min=0) if partial else keys
    near_k, near_v = _fetch(k, near), _fetch(v, near)
    if partial:
        valid = keys >= 0
        # Slots without a key fetched token 0, whose values must not spread as zero times NaN.
        near_k, near_v = near_k.where(valid[..., None], 0.0), near_v.where(valid[..., None], 0.0)
        if layout.key_mask is not None:
            mask = layout.key_mask
            shape = torch.broadcast_shapes(mask.shape[:2], keys.shape[:2])
            spots = near.flatten(2).expand(*shape, -1)
            valid = valid & mask.expand(*shape, -1).gather(2, spots).view(*shape, *keys.shape[2:])
        valid = valid[..., None, :]
    near_q = _fetch(call.q, order.token.clamp(min=0) if order.padded else order.token)
    pairs = (order.token[..., :, None], keys[..., None, :])
    bias, gain = (call.pairs_at(values, *pairs) for values in (call.bias, call.gain))
    if fusable(call):
        out, lse = _fused_blocks(near_q, near_k, near_v, valid, call.scale, bias), None
    else:
        out, lse = plain_attention(near_q, near_k, near_v, valid, call.scale, bias, gain, call.compute_dtype)
    out = _fetch(out.flatten(2, 3), order.slot).to(call.v.dtype)
    if lse is not None:
        lse = _fetch(lse.flatten(2)[..., None], order.slot)[..., 0]
    return AttendResult(out, lse)


def _fused_blocks(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    """Blocks become batch items: (B, heads, R, T, D) -> (B * R, heads, T, D)."""
    batch, _, blocks = q.shape[:3]

    def fold(one: Tensor) -> Tensor:
        return rearrange(one, "b h r i j -> (b r) h i j")

    def fold_pairs(one: Tensor | None) -> Tensor | None:
        return None if one is None else fold(one.expand(batch, -1, blocks, -1, -1))

    out = fused_attention(fold(q), fold(k), fold(v), fold_pairs(valid), scale, fold_pairs(bias))
    return rearrange(out, "(b r) h i j -> b h r i j", r=blocks)


def _lists(call: AttendCall, index: Tensor) -> AttendResult:
    """Every query with its own list of keys: index (B or 1, heads or 1, Nq - prefix, K)."""
    layout, index = call.layout, index.long()
    if layout.global_keys:
        shared = torch.arange(layout.global_keys, device=index.device).expand(*index.shape[:3], -1)
        index = torch.cat([shared, index], dim=3)
    valid = index >= 0
    # Before they are fetched, so that the gradients of all who fetch a key are added up in this dtype.
    k, v = (one.to(call.compute_dtype) for one in visible_values(call))
    near = index.clamp(min=0)
    near_k, near_v = _fetch(k, near), _fetch(v, near)
    near_k, near_v = near_k.where(valid[..., None], 0.0), near_v.where(valid[..., None], 0.0)
    if layout.key_mask is not None:
        mask = layout.key_mask
        shape = torch.broadcast_shapes(mask.shape[:2], index.shape[:2])
        spots = near.flatten(2).expand(*shape, -1)
        valid = valid & mask.expand(*shape, -1).gather(2, spots).view(*shape, *index.shape[2:])
    first = layout.global_queries
    rows = torch.arange(first, layout.num_queries, device=index.device)[None, None, :, None]
    bias, gain = (call.pairs_at(values, rows, index) for values in (call.bias, call.gain))
    out, lse = plain_attention(
        call.q[:, :, first:, None],
        near_k,
        near_v,
        valid[..., None, :],
        call.scale,
        None if bias is None else bias[..., None, :],
        None if gain is None else gain[..., None, :],
        call.compute_dtype,
    )
    return AttendResult(out[..., 0, :].to(call.v.dtype), lse[..., 0] if lse is not None and call.return_lse else None)
