"""Shares: how much of all pairs the tiles of token sets are expected to visit, and when that is too much."""

from __future__ import annotations

from attnkit.layouts import TokenMask, TokenSets

# A tile of 64 queries visits every key that one of them sees.
LISTED = 8


def shown_nearly_all(layout: TokenSets | TokenMask) -> str:
    """Why dense attention under a mask is expected to be faster; empty where lists are short."""
    if isinstance(layout, TokenMask):
        return (
            "How many keys a mask shows is not known before it is looked at, and where many, the kernels skip nothing"
        )
    if LISTED * layout.key_slots > layout.num_keys:
        return (
            f"With {layout.key_slots} of {layout.num_keys} keys for each query, tiles of queries see nearly all, and "
            f"the kernels skip nothing"
        )
    return ""
