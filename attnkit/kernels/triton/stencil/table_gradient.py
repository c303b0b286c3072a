"""The gradients of tables that hold a number for each place: by shares of the queries, which are added up afterwards.

Nothing is added to memory that another program adds to. Both kinds of queries have this kernel.
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
def stencil_table_gradient(
    sum_bias,
    sum_gain,
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
    batch,
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
    share,
    shares,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    GAIN_VARIES: tl.constexpr,
    PREFIX: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """What a share of an item's queries gives to a place of the tables of BLOCK_H heads.

    Args:
        sum_bias: float32 (shares, B, heads, places), or None.
        sum_gain: the same for the gain, or None.
        share: queries of a share, a multiple of BLOCK_M.
        BIAS_VARIES: whether the bias differs from query to query; then this is the gradient of the gain only.
        GAIN_VARIES: whether the gain does; then this is the gradient of the bias only.
        PREFIX: whether there is a prefix.
        CLAMPED: whether windows are moved inside the grid.
    """
    places = prefix + kernel0 * kernel1 * kernel2
    # The places of a share are neighbours: they read the same rows.
    place, number, item, group = placed(places, shares, tl.cdiv(heads, BLOCK_H))
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    biases = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    gains = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(0, share, BLOCK_M):
        spot = number * share + start + tl.arange(0, BLOCK_M)
        _, weights, reached, factor, average = at_place(
            place,
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
        gains += weights * reached
        biases += weights * (reached * factor - average)
    spots = ((number * batch + item) * heads + head) * places + place
    if sum_bias is not None:
        tl.store(sum_bias + spots, tl.sum(biases, 0), mask=head < heads)
    if sum_gain is not None:
        tl.store(sum_gain + spots, tl.sum(gains, 0), mask=head < heads)
