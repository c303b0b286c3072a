"""Calls of the operators of blocks: what every backend does that has kernels for them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.ops.registering import OpPair
from attnkit.kernels.softmax import global_rows
from attnkit.layouts import Blocks, RelativeTable


def computed_by_blocks(call: AttendCall, pair: OpPair) -> AttendResult:
    """Computes a call without a gain under `Blocks`: the operator's rows, and those of prefix queries before them.

    Args:
        call: the call.
        pair: `BLOCKS`, or a pair with its arguments.
    """
    layout = cast("Blocks", call.layout)
    queries, keys, prefix = layout.order, layout.keys_cut, layout.prefix
    bias = None if call.bias is None else _bias_of(call, layout)
    tables = (queries.token, queries.slot, keys.token, keys.slot, layout.index, layout.key_mask, bias)
    padded = [queries.padded, keys.padded]
    row = global_rows(call, prefix) if prefix else None
    first = None if row is None else row.out
    out, total, peak = pair.op(call.q, call.k, call.v, *tables, prefix, padded, float(call.scale), first)
    if not call.return_lse:
        return AttendResult(out, None)
    lse = total.log() + peak
    return AttendResult(out, lse if row is None or row.lse is None else torch.cat([row.lse, lse], dim=2))


def _bias_of(call: AttendCall, layout: Blocks) -> Tensor | None:
    """The call's bias between the queries of a block and what they see, (B or 1, heads or 1, R or 1, T, keys)."""
    bias, prefix, cut = call.bias, layout.prefix, layout.order.made_of
    own = layout.index is None and layout.key_order is None
    if isinstance(bias, RelativeTable) and own and cut is not None and cut[0] == bias.grid:
        # All windows are alike.
        return bias.within(prefix, tuple((one.length, one.step) for one in cut[1]))[None, :, None]
    tokens = layout.key_tokens()
    if prefix:
        shared = torch.arange(prefix, device=tokens.device).expand(*tokens.shape[:3], -1)
        tokens = torch.cat([shared, tokens], dim=3)
    return call.pairs_at(bias, layout.order.token[..., :, None], tokens[..., None, :])
