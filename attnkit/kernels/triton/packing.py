"""Packing: small regions share tiles, by the kernels of token sets.

The kernels of blocks give every region tiles of its own, of 16 queries at least, so that a region of 4 tokens leaves
three quarters of its tiles empty. The kernels of token sets put up to 64 queries into a tile, whichever region they are
of, over the keys that any of them sees, and test a bit for each pair. Such a call costs a mask, one byte for each pair
of tokens and each table of routes, which is made on the device and kept for the backward pass.
"""

from __future__ import annotations

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.ops.registering import OpPair
from attnkit.kernels.token_set_calls import computed_by_table
from attnkit.layouts import Blocks
from attnkit.layouts.base import framed

# Queries of the smallest tiles there are.
ROWS = 16


def shares_tiles(call: AttendCall) -> bool:
    """Whether regions share tiles: routed ones of fewer than 16 tokens, without a bias, where two things hold.

    - Nothing is multiplied in vain that was not before, but for what tiles round up: a region in tiles of its own
      multiplies 16 rows with all keys that are listed for it, and in a shared one each of its tokens with all keys
      there are at most.
    - The mask of an item is no larger than its q, k and v.
    """
    layout = call.layout
    if not isinstance(layout, Blocks) or layout.index is None or call.bias is not None:
        return False
    tokens, listed = layout.order.token.shape[3], layout.key_slots - layout.prefix
    if tokens >= ROWS or tokens * (layout.num_keys - layout.prefix) > ROWS * listed:
        return False
    _, heads, queries, width = call.q.shape
    keys, values = call.v.shape[2:]
    mask = layout.lead[1] * queries * keys
    return mask <= heads * (queries * width + keys * (width + values)) * call.q.dtype.itemsize


def computed_packed(call: AttendCall, pair: OpPair) -> AttendResult:
    """Computes a call of which `shares_tiles` holds.

    Args:
        call: the call.
        pair: `TOKEN_SETS`, or a pair with its arguments.
    """
    layout = call.layout
    assert isinstance(layout, Blocks)
    prefix = layout.prefix
    mask = framed(layout.image_mask(), 0, prefix)
    # Tokens of a region see the same keys.
    places = layout.order
    order = places.slot.argsort(dim=-1) if places.padded else places.token.flatten(2) - prefix
    return computed_by_table(call, mask, (prefix, prefix), layout.key_mask, pair, order.int())
