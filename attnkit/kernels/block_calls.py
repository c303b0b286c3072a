"""Calls of the operators of blocks: what every backend does that has kernels for them."""

from __future__ import annotations

from typing import cast

import torch

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.ops.registering import OpPair
from attnkit.kernels.softmax import global_rows
from attnkit.layouts import Blocks


def computed_by_blocks(call: AttendCall, pair: OpPair) -> AttendResult:
    """Computes a call without a gain under `Blocks`: the operator's rows, and those of prefix queries before them.

    Args:
        call: the call.
        pair: `BLOCKS`, or a pair with its arguments.
    """
    layout = cast("Blocks", call.layout)
    queries, keys, prefix = layout.order, layout.keys_cut, layout.prefix
    bias = None
    if call.bias is not None:
        tokens = layout.key_tokens()
        if prefix:
            shared = torch.arange(prefix, device=tokens.device).expand(*tokens.shape[:3], -1)
            tokens = torch.cat([shared, tokens], dim=3)
        bias = call.pairs_at(call.bias, queries.token[..., :, None], tokens[..., None, :])
    tables = (queries.token, queries.slot, keys.token, keys.slot, layout.index, layout.key_mask, bias)
    padded = [queries.padded, keys.padded]
    out, total, peak = pair.op(call.q, call.k, call.v, *tables, prefix, padded, float(call.scale))
    lse = total.log() + peak if call.return_lse else None
    if not prefix:
        return AttendResult(out, lse)
    row = global_rows(call, prefix)
    joined = None if row.lse is None or lse is None else torch.cat([row.lse, lse], dim=2)
    return AttendResult(torch.cat([row.out, out], dim=2), joined)
