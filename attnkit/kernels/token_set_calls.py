"""Calls of the operators of token sets: what every backend does that has kernels for them."""

from __future__ import annotations

from torch import Tensor

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.ops.registering import OpPair
from attnkit.layouts import TokenMask, TokenSets


def computed_by_token_sets(call: AttendCall, pair: OpPair, ordered: bool = False) -> AttendResult:
    """Computes a call without a gain under `TokenSets` or `TokenMask`.

    Args:
        call: the call.
        pair: `TOKEN_SETS`, or a pair with its arguments.
        ordered: whether its kernels make use of the order of queries.
    """
    layout = call.layout
    assert isinstance(layout, (TokenSets, TokenMask))
    table = layout.index if isinstance(layout, TokenSets) else layout.mask
    order = None
    if ordered and layout.query_groups is not None:
        order = layout.query_groups.argsort(dim=-1, stable=True).int()
    prefix = (layout.global_queries, layout.global_keys)
    return computed_by_table(call, table, prefix, layout.key_mask, pair, order)


def computed_by_table(
    call: AttendCall,
    table: Tensor,
    prefix: tuple[int, int],
    key_mask: Tensor | None,
    pair: OpPair,
    order: Tensor | None = None,
) -> AttendResult:
    """Computes a call without a gain by the operator's own arguments.

    Args:
        call: the call; nobody looks at its layout.
        table: keys of each query, or a mask, as the operator takes them.
        prefix: how many of the first queries see every key, and how many of the first keys every query sees.
        key_mask: bool (B or 1, heads or 1, Nk), or None.
        pair: `TOKEN_SETS`, or a pair with its arguments.
        order: the table's rows, as the operator takes them.
    """
    bias = call.pair_values(call.bias)
    out, total, peak = pair.op(call.q, call.k, call.v, table, key_mask, bias, *prefix, float(call.scale), order)
    return AttendResult(out, total.log() + peak if call.return_lse else None)
