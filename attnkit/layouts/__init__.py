"""Layouts: which keys each query sees, as plain data whose meaning is `to_mask()`."""

from attnkit.layouts.algebra import concat_heads, intersect, restrict, union
from attnkit.layouts.base import Layout
from attnkit.layouts.blocks import Blocks
from attnkit.layouts.dense import Dense
from attnkit.layouts.relative import RelativeTable
from attnkit.layouts.stencil import Stencil
from attnkit.layouts.token_mask import TokenMask
from attnkit.layouts.token_sets import TokenSets

__all__ = [
    "Blocks",
    "Dense",
    "Layout",
    "RelativeTable",
    "Stencil",
    "TokenMask",
    "TokenSets",
    "concat_heads",
    "intersect",
    "restrict",
    "union",
]
