"""Lowering: the same meaning written as a more general kind of layout."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.errors import LayoutError, did_you_mean, shown
from attnkit.layouts.base import Layout
from attnkit.layouts.blocks import Blocks
from attnkit.layouts.dense import Dense
from attnkit.layouts.stencil import Stencil
from attnkit.layouts.token_mask import TokenMask
from attnkit.layouts.token_sets import TokenSets

KINDS = ("dense", "stencil", "blocks", "token_sets", "token_mask")


def lower(layout: Layout, kind: str) -> Layout:
    """Writes a layout as `kind`; its mask stays the same.

    Every layout lowers to `"token_sets"` and `"token_mask"`, and to its own kind.

    Raises:
        LayoutError: for an unknown kind, or one that cannot hold the layout.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise LayoutError(
            f"unknown kind of layout {shown(kind)}{did_you_mean(kind, KINDS)} (kinds: {', '.join(KINDS)})"
        )
    if layout.kind == kind:
        return layout
    if kind == "token_mask":
        return TokenMask(layout.to_mask())
    if kind == "token_sets":
        return to_token_sets(layout)
    raise LayoutError(f"a {layout.kind} layout cannot be written as {kind}; it lowers to 'token_sets' or 'token_mask'")


def to_token_sets(layout: Layout) -> TokenSets:
    """Lists the visible keys of every query."""
    device = None if layout.key_mask is None else layout.key_mask.device
    if isinstance(layout, TokenSets):
        return layout
    if isinstance(layout, Dense):
        index = torch.zeros(layout.num_queries, 0, dtype=torch.int64, device=device)
        return _sets(index[None, None], layout, keys_all=layout.num_keys)
    if isinstance(layout, Stencil):
        return _sets(layout.taps(device)[None, None], layout)
    if isinstance(layout, Blocks):
        return _sets(_block_lists(layout), layout)
    keys = torch.arange(layout.num_keys, device=layout.to_mask().device)
    index = torch.where(layout.to_mask(), keys, -1)
    return TokenSets(index, layout.num_keys, unique=True)


def _sets(index: Tensor, layout: Layout, keys_all: int | None = None) -> TokenSets:
    return TokenSets(
        index,
        layout.num_keys,
        queries_all=layout.global_queries,
        keys_all=layout.global_keys if keys_all is None else keys_all,
        unique=True,
        key_mask=layout.key_mask,
    )


def _block_lists(layout: Blocks) -> Tensor:
    """Key tokens of every image query: (B or 1, heads or 1, Nq - prefix, K * T)."""
    tokens = layout.key_tokens()
    slot = layout.order.slot
    shape = torch.broadcast_shapes(tokens.shape[:2], slot.shape[:2])
    block = (slot // layout.order.token.shape[3]).expand(*shape, -1)
    spots = block[..., None].expand(-1, -1, -1, tokens.shape[3])
    return tokens.expand(*shape, -1, -1).gather(2, spots)
