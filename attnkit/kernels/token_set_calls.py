"""Calls of the operators of token sets: what every backend does that has kernels for them."""

from __future__ import annotations

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.ops.registering import OpPair
from attnkit.layouts import TokenMask, TokenSets


def computed_by_token_sets(call: AttendCall, pair: OpPair) -> AttendResult:
    """Computes a call without a gain under `TokenSets` or `TokenMask`.

    Args:
        call: the call.
        pair: `TOKEN_SETS`, or a pair with its arguments.
    """
    layout = call.layout
    assert isinstance(layout, (TokenSets, TokenMask))
    table = layout.index if isinstance(layout, TokenSets) else layout.mask
    prefix = (layout.global_queries, layout.global_keys)
    bias = call.pair_values(call.bias)
    out, lse = pair.op(call.q, call.k, call.v, table, layout.key_mask, bias, *prefix, float(call.scale))
    return AttendResult(out, lse if call.return_lse else None)
