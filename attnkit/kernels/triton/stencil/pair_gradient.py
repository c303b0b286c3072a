"""The gradient of a bias or gain that holds numbers of each query's own.

Both kinds of queries have this kernel.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.stencil.shared_gradient import at_place
from attnkit.kernels.triton.stencil.windows import COUNTS
from attnkit.kernels.triton.tiles import placed


@triton.jit(do_not_specialize=COUNTS)
def stencil_pair_gradient(
    grad_bias,
    grad_gain,
    delta,
    grad_out,
    q,
    k,
    v,
    total,
    peak,
    bias,
    gain,
    seen,
    scale,
    grad_out_b,
    grad_out_h,
    grad_out_n,
    grad_out_d,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    bias_b,
    bias_h,
    bias_p,
    bias_0,
    bias_1,
    bias_2,
    gain_b,
    gain_h,
    gain_p,
    gain_0,
    gain_1,
    gain_2,
    seen_b,
    seen_h,
    heads,
    prefix,
    size0,
    size1,
    size2,
    queries0,
    queries1,
    queries2,
    kernel0,
    kernel1,
    kernel2,
    stride0,
    stride1,
    stride2,
    dilation0,
    dilation1,
    dilation2,
    own_items,
    own_heads,
    shared_items,
    shared_heads,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    GAIN_VARIES: tl.constexpr,
    PREFIX: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """What BLOCK_M queries give to a place of one table that holds numbers of their own.

    Args:
        grad_bias: float32 (own_items, own_heads, places, queries), or None.
        grad_gain: the same for the gain; one of the two is there.
        own_items, own_heads: items and heads the table has.
        shared_items, shared_heads: items and heads that share its numbers.
    """
    places = prefix + kernel0 * kernel1 * kernel2
    queries = queries0 * queries1 * queries2
    tile, place, own_item, own_head = placed(tl.cdiv(queries, BLOCK_M), places, own_heads)
    spot = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    found = tl.zeros((BLOCK_M, 1), tl.float32)
    for at in range(shared_items * shared_heads):
        # The counters of what is not shared stand still.
        item = own_item + at // shared_heads
        head = own_head + at % shared_heads + tl.arange(0, 1)
        _, weights, reached, factor, average = at_place(
            place.to(tl.int32),
            spot,
            item,
            head,
            delta,
            grad_out,
            q,
            k,
            v,
            total,
            peak,
            bias,
            gain,
            seen,
            scale,
            grad_out_b,
            grad_out_h,
            grad_out_n,
            grad_out_d,
            q_b,
            q_h,
            q_n,
            q_d,
            k_b,
            k_h,
            k_n,
            k_d,
            v_b,
            v_h,
            v_n,
            v_d,
            bias_b,
            bias_h,
            bias_p,
            bias_0,
            bias_1,
            bias_2,
            gain_b,
            gain_h,
            gain_p,
            gain_0,
            gain_1,
            gain_2,
            seen_b,
            seen_h,
            heads,
            prefix,
            size0,
            size1,
            size2,
            queries0,
            queries1,
            queries2,
            kernel0,
            kernel1,
            kernel2,
            stride0,
            stride1,
            stride2,
            dilation0,
            dilation1,
            dilation2,
            WIDTH,
            VALUE_WIDTH,
            BLOCK_D,
            BLOCK_V,
            BIAS_VARIES,
            GAIN_VARIES,
            PREFIX,
            CLAMPED,
        )
        if grad_gain is not None:
            found += weights * reached
        else:
            found += weights * (reached * factor - average)
    found = tl.sum(found, 1)
    spots = ((own_item * own_heads + own_head) * places + place) * queries + spot
    if grad_gain is not None:
        tl.store(grad_gain + spots, found, mask=spot < queries)
    else:
        tl.store(grad_bias + spots, found, mask=spot < queries)
