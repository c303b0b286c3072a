"""Blocks on the CPU: a few blocks of queries at a time, with the blocks of keys they see copied beside each other.

The rows of a few heads are put into the order of their blocks, so that a block is one run of memory. What a block's
queries see is then a few whole runs. PyTorch's fused attention computes the rest, in float32 or float64; for few
logits, and in the backward pass under a bias, the products are written out. The backward pass makes the weights again.
Beside the gradients, memory grows with the tokens of one head, and not with how many keys a query sees.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from attnkit.kernels.block_calls import computed_by_blocks
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.chunked.block_slabs import Near, Slabs
from attnkit.kernels.chunked.family import Family
from attnkit.kernels.costs import Work, fetched
from attnkit.kernels.ops.blocks import BLOCKS, BlockTables, gradient_of_first, output_of
from attnkit.kernels.ops.registering import exporting
from attnkit.layouts import Blocks

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


# Logits of a block up to which products, softmax and products again are faster than fused attention, whose tiles are
# made for longer rows.
SMALL = 64 * 64


def _why_not(call: AttendCall) -> tuple[str, ...]:
    reasons = []
    if call.q.device.type != "cpu":
        reasons.append(f"q lies on {call.q.device}, and its kernels for blocks are for the CPU")
    if call.gain is not None:
        reasons.append("a gain multiplies the weights after the softmax, which the fused kernel does not do")
    if call.q.dtype != call.v.dtype:
        reasons.append(f"q and k are {call.q.dtype} but v is {call.v.dtype}; it needs one dtype")
    if not call.layout.key_slots:
        reasons.append("there are no keys to fetch")
    if exporting():
        reasons.append("torch.export writes PyTorch's own operators, so that what it writes needs no attnkit")
    return tuple(reasons)


def _work(call: AttendCall) -> Work:
    layout = cast("Blocks", call.layout)
    # What lies beside each other already is not looked up.
    own = layout.index is None and layout.order.token.shape[:2].numel() == 1
    small = "small " if _small(layout.order.token.shape[3], layout.key_slots) else ""
    return Work(f"chunked {small}windows" if own else f"chunked {small}blocks", fetched(call, layout))


def _run(call: AttendCall) -> AttendResult:
    return computed_by_blocks(call, BLOCKS)


def _small(queries: int, keys: int) -> bool:
    return queries * keys <= SMALL


BLOCKED = Family(_why_not, _work, _run)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tables = BlockTables(*rest)
    small = _small(*_block(tables))
    batch, heads = q.shape[:2]
    count = tables.query_slot.shape[2]
    out, rows = output_of(v, tables)
    slabs = Slabs(q, v, tables, written=small or tables.bias is not None)
    lse = q.new_empty(batch, heads, count, dtype=slabs.dtype)
    slab_q, slab_k, slab_v, first_k, first_v = _inputs(slabs)
    slab_out = slabs.queries()
    for pairs in slabs.slabs:
        slabs.start(*pairs)
        used = slabs.put_queries(q[:, :, tables.prefix :], slab_q)
        slabs.put_keys(k, slab_k, first_k)
        slabs.put_keys(v, slab_v, first_v)
        found_lse = slabs.like.new_empty(used.shape[:2])
        for first, last in slabs.chunks():
            near = slabs.near(slab_k, slab_v, first_k, first_v, first, last)
            attention = _written_attention if small else _fused_attention
            slab_out[first:last], found_lse[first:last] = attention(used[first:last], near, tables.scale)
            if near.empty is not None:
                found_lse[first:last].masked_fill_(near.empty, -torch.inf)
        slabs.take_queries(slab_out, rows)
        slabs.take_numbers(found_lse, lse)
    # Backward makes the sums of powers anew where they matter.
    return out, torch.ones_like(lse), lse


def _backward(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    grad_peak: None,
    out: Tensor,
    total: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> list[Tensor]:
    tables, needs = BlockTables(*rest[:-1]), rest[-1]
    grad_out, out, grad_first = gradient_of_first(grad_out, out, tables)
    written = tables.bias is not None or grad_total is not None or _small(*_block(tables))
    slabs = Slabs(q, v, tables, written=written)
    grads = [torch.empty_like(one) for one in (q, k, v)]
    grads[0][:, :, : tables.prefix] = 0.0
    grad_bias = _like_bias(tables.bias, slabs) if needs[3] else None
    slab_q, slab_k, slab_v, first_k, first_v = _inputs(slabs)
    slab_grad, slab_grad_q = slabs.queries(), slabs.queries()
    slab_out = None if written else slabs.queries()
    slab_grad_k, slab_grad_v, first_grad_k, first_grad_v = (
        *(slabs.keys() for _ in range(2)),
        *(slabs.first_keys() for _ in range(2)),
    )
    for pairs in slabs.slabs:
        slabs.start(*pairs)
        used = slabs.put_queries(q[:, :, tables.prefix :], slab_q)
        slabs.put_keys(k, slab_k, first_k)
        slabs.put_keys(v, slab_v, first_v)
        grad = slab_grad[: len(used)] if grad_out is None else slabs.put_queries(grad_out, slab_grad)
        # Where nothing is seen there are no weights: exp(logit - inf) is 0.
        peak = slabs.put_numbers(lse, torch.inf)
        peak.masked_fill_(peak == -torch.inf, torch.inf)
        if slab_out is not None:
            reached = slabs.put_queries(out, slab_out)
        elif grad_out is not None:
            reached = slabs.put_products(grad_out, out)
        else:
            reached = torch.zeros_like(peak)
        if grad_total is not None:
            reached -= slabs.put_numbers(grad_total, 0.0).masked_fill_(peak == torch.inf, 0.0)
        slabs.clear_keys(slab_grad_k, first_grad_k)
        slabs.clear_keys(slab_grad_v, first_grad_v)
        for first, last in slabs.chunks():
            near = slabs.near(slab_k, slab_v, first_k, first_v, first, last)
            given = (grad[first:last], used[first:last], near, reached[first:last], peak[first:last])
            if written:
                found = _written_gradients(*given, tables.scale)
                if grad_bias is not None:
                    grad_bias.index_add_(0, slabs.biases[first:last], found[3].flatten(1))
            else:
                found = _fused_gradients(*given, tables.scale)
            slab_grad_q[first:last] = found[0]
            slabs.add_keys(found[1], slab_grad_k, first_grad_k, first, last)
            slabs.add_keys(found[2], slab_grad_v, first_grad_v, first, last)
        slabs.take_queries(slab_grad_q, grads[0][:, :, tables.prefix :])
        slabs.take_keys(slab_grad_k, first_grad_k, grads[1])
        slabs.take_keys(slab_grad_v, first_grad_v, grads[2])
    gradients: list[Tensor | None] = [*grads, None, grad_first]
    if grad_bias is not None:
        assert tables.bias is not None
        gradients[3] = torch.empty_like(tables.bias).copy_(grad_bias.view(tables.bias.shape))
    return [one for one, need in zip(gradients, needs, strict=True) if need and one is not None]


BLOCKS.kernels("CPU", _forward, _backward)


def _inputs(slabs: Slabs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return slabs.queries(), slabs.keys(), slabs.keys(), slabs.first_keys(), slabs.first_keys()


def _like_bias(bias: Tensor | None, slabs: Slabs) -> Tensor:
    assert bias is not None
    return slabs.like.new_zeros(bias.shape[:3].numel(), bias.shape[3:].numel())


def _block(tables: BlockTables) -> tuple[int, int]:
    """How many queries a block has, and how many keys they see."""
    blocks_seen = 1 if tables.routes is None else tables.routes.shape[3]
    return tables.query_token.shape[3], tables.prefix + blocks_seen * tables.key_token.shape[3]


def _fused_attention(q: Tensor, near: Near, scale: float) -> tuple[Tensor, Tensor]:
    mask = None if near.mask is None else near.mask[:, None]
    folded = (one[:, None] for one in (q, near.k, near.v))
    out, lse = _fused(*folded, attn_mask=mask, scale=scale)
    return out[:, 0], lse[:, 0]


def _written_attention(q: Tensor, near: Near, scale: float) -> tuple[Tensor, Tensor]:
    logits = _logits(q, near, scale)
    peak, weights = logits.amax(-1), logits.softmax(-1)
    # The largest weight is one over the denominator.
    lse = peak - weights.amax(-1).log_()
    if near.empty is not None:
        weights.masked_fill_(near.empty[..., None], 0.0)
    return torch.bmm(weights, near.v), lse


def _logits(q: Tensor, near: Near, scale: float) -> Tensor:
    # With beta = 0 what would be added is not even read.
    added, beta = (q[:, :, :1], 0.0) if near.mask is None else (near.mask, 1.0)
    return torch.baddbmm(added, q, near.k.transpose(1, 2), beta=beta, alpha=scale)


def _fused_gradients(
    grad: Tensor, q: Tensor, near: Near, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    mask = None if near.mask is None else near.mask[:, None]
    folded = [one[:, None] for one in (grad, q, near.k, near.v, out, lse)]
    found = _fused_backward(*folded, 0.0, False, attn_mask=mask, scale=scale)
    return found[0][:, 0], found[1][:, 0], found[2][:, 0]


def _written_gradients(
    grad: Tensor, q: Tensor, near: Near, mean: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the logits' bias.

    With weights p and `reached = grad . v`, the logits get `p * (reached - mean)`, where `mean` (blocks, T) is the
    average of what is reached, which is `grad . out`, less what arrives at the sum of powers.
    """
    # Not exp(logit - lse): of -1e8, a bias that hides all keys of a row alike, the lse has lost the denominator.
    weights = _logits(q, near, scale).softmax(-1)
    weights.masked_fill_((lse == torch.inf)[..., None], 0.0)
    grad_v = torch.bmm(weights.transpose(1, 2), grad)
    pull = torch.baddbmm(mean[..., None], grad, near.v.transpose(1, 2), beta=-1.0).mul_(weights)
    return torch.bmm(pull, near.k).mul_(scale), torch.bmm(pull.transpose(1, 2), q).mul_(scale), grad_v, pull
