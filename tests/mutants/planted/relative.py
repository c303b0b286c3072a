"""Mistakes in relative tables: biases and gains by offset."""

from __future__ import annotations

from attnkit import LearnedQuery, Neighborhood, Window
from tests.mutants.mutant import Mutant, gather, reference

SPOTS = "attnkit.layouts.relative:RelativeTable._spots"
WINDOW = "attnkit.layouts.relative:RelativeTable.window"

MUTANTS = [
    Mutant(
        "offsets_mirrored",
        "Offsets are measured from the key to the query.",
        SPOTS,
        "key % self.grid.sizes[axis] - query % query_sizes[axis] * strides[axis]",
        "query % query_sizes[axis] * strides[axis] - key % self.grid.sizes[axis]",
        (Window(2, 2, relative_bias=True), reference("dense"), gather("stencil")),
        ("equals_dense",),
    ),
    Mutant(
        "offsets_without_stride",
        "Offsets take a query's number for its place, though queries have a stride.",
        SPOTS,
        "query % query_sizes[axis] * strides[axis]",
        "query % query_sizes[axis]",
        (LearnedQuery(2, 3, stride=2), reference("stencil")),
        ("equals_dense",),
    ),
    Mutant(
        "queries_on_the_grid_of_keys",
        "Strided queries are looked for on the grid of the keys.",
        SPOTS,
        "self.grid.strided(self.stride).sizes",
        "self.grid.sizes",
        (LearnedQuery(2, 3, stride=2), reference("stencil")),
        ("equals_dense",),
    ),
    Mutant(
        "prefix_has_an_offset",
        "Prefix tokens get the value of some offset.",
        SPOTS,
        "inside = (query >= 0) & (key >= 0)",
        "inside = torch.ones_like((query >= 0) & (key >= 0))",
        (Neighborhood(2, 3, relative_bias=True), reference("token_mask")),
        ("equals_dense",),
    ),
    Mutant(
        "extents_swapped",
        "A table is read with the extents of its axes in reverse order.",
        SPOTS,
        "extent = self.table.shape[1 + axis]",
        "extent = self.table.shape[self.grid.ndim - axis]",
        (reference("dense", "token_mask"),),
        ("equals_dense",),
        60,
    ),
    Mutant(
        "table_cache_forgets_the_grid",
        "Positions in a table are taken from the cache for another grid of as many tokens.",
        "attnkit.layouts.relative:RelativeTable.dense",
        "tuple(self.table.shape[1:]), self.grid, self.stride, num_queries",
        "tuple(self.table.shape[1:]), self.stride, num_queries",
        (Window(2, 3, relative_bias=True),),
        ("seeds_only",),
    ),
    Mutant(
        "fill_is_zero",
        "Pairs outside a table get 0 whatever its fill.",
        "attnkit.layouts.relative:RelativeTable._edged",
        "table.new_full((table.shape[0], 1), self.fill)",
        "table.new_zeros((table.shape[0], 1))",
        (gather("stencil", "blocks"),),
        ("equals_dense",),
        60,
    ),
    Mutant(
        "window_of_a_table_mirrored",
        "A window is read from a table from the far end on.",
        WINDOW,
        "torch.arange(size, device=device) - size // 2",
        "size // 2 - torch.arange(size, device=device)",
        (gather("stencil"), LearnedQuery(2, 3)),
        ("backends_agree",),
    ),
    Mutant(
        "window_of_a_table_without_dilation",
        "A dilated window reads a table's values of direct neighbours.",
        WINDOW,
        ") * step + extent // 2",
        ") * min(step, 1) + extent // 2",
        (gather("stencil"),),
        ("backends_agree",),
        300,
    ),
]
