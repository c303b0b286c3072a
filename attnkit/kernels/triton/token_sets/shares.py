"""Shares: whether dense attention under a mask is expected to be faster than the kernels of token sets.

Nothing was measured on a GPU yet; this is arithmetic over what both ways move and multiply, for one pair of a query and
a key of one head, in bytes of memory's traffic:

- Products of a pair, 4 flops for each number of a head's width: a Hopper does half of its 989 Tflop/s of 16 bits while
  it moves 3.35 TB/s, so that 37 numbers take as long as a byte; of 32 bits, without tensor cores, half of 67 Tflop/s,
  2.5 numbers.
- The kernels here visit a share of the pairs, and for each test a bit, a tenth more arithmetic than a softmax has. For
  each set of lists they read one byte a pair, and write and read twelve bytes for 64; where a mask has to be made of
  lists of keys it is one byte more that is set to 0 and one that is written.
- Dense attention does all products. PyTorch reads a mask of bools, writes it in the dtype of the inputs, and reads that
  for each head; from lists of keys the mask itself is made before, by four passes over bytes.

So lists or masks of each head pay for themselves however much tiles visit: dense attention is ahead only where many
heads and items share a mask, which then costs nothing, and tiles skip nothing.
"""

from __future__ import annotations

from attnkit.kernels.call import AttendCall
from attnkit.layouts import TokenSets
from attnkit.layouts.base import common_lead

# Numbers of a head's width whose products take as long as a byte, by bytes of a number.
PRODUCTS = {2: 37.0, 4: 2.5}
TESTED = 1.1
# Bytes a pair for lists of tiles, from a mask and from lists of keys; and for a mask in the dtype of the inputs.
LISTED, FROM_KEYS = 1.4, 2.0
CONVERTED, FROM_LISTS = 1.0, 4.0


def dense_instead(call: AttendCall) -> str:
    """Why dense attention under a mask is expected to be faster for a call under token sets; empty where it is not."""
    layout, size = call.layout, call.q.dtype.itemsize
    batch, heads, _, width = call.q.shape
    lists, share = isinstance(layout, TokenSets), 1.0
    # Whose groups of queries differ have lists of tiles of their own, even of a mask that they share.
    own = common_lead("a layout with its hints", layout.lead, *(tuple(one.shape[:2]) for one in layout.hints))
    sets, masks = (items * some / max(batch * heads, 1) for items, some in (own, layout.lead))
    if isinstance(layout, TokenSets):
        share = expected_share(layout.key_slots / max(layout.num_keys, 1), layout.query_groups is not None)
    products = width / PRODUCTS.get(size, PRODUCTS[4])
    ours = TESTED * share * products + sets * (LISTED + FROM_KEYS * lists)
    dense = products + masks * (CONVERTED + 2 * size + FROM_LISTS * lists)
    if ours < dense:
        return ""
    served = f"that serve{'' if lists else 's'} {round(1 / masks)} items and heads cost{'' if lists else 's'}"
    if lists:
        shown = f"Lists of {layout.key_slots} of {layout.num_keys} keys {served}"
        return f"{shown} dense attention little, and tiles of queries see nearly all keys"
    return f"A mask {served} dense attention little, and tiles of queries may see nearly all keys"


def expected_share(density: float, grouped: bool) -> float:
    """Share of the keys that a tile of 64 queries visits whose lists hold a share of them.

    Counted for lists of trained mask predictors (`benchmarks/results/token-sets/unions.json`), tiles of queries in
    groups see about as much as four would whose lists have nothing to do with each other (three to five, by tokens and
    density), and without groups as five (four to seven).
    """
    return 1.0 - (1.0 - min(density, 1.0)) ** (4 if grouped else 5)
