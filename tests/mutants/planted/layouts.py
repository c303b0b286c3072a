"""Mistakes in which keys a layout shows to a query."""

from __future__ import annotations

from attnkit import LearnedQuery, Neighborhood, Window
from tests.mutants.mutant import Mutant, gather, sdpa

MUTANTS = [
    Mutant(
        "no_block_is_the_first",
        "A block of -1, which stands for none, is block 0.",
        "attnkit.layouts.blocks:Blocks.key_tokens",
        "torch.where(self.index[..., None] < 0, -1, found)",
        "found",
        (gather("blocks"),),
        ("equals_dense",),
    ),
    Mutant(
        "one_block_is_full",
        "A single window counts as full attention although keys in it are masked.",
        "attnkit.layouts.blocks:Blocks.full",
        "not self.keys_cut.padded and self.key_mask is None",
        "not self.keys_cut.padded",
        (Window(2, 9),),
        ("equals_dense",),
    ),
    Mutant(
        "masked_dense_is_full",
        "A dense layout with masked keys counts as full.",
        "attnkit.layouts.dense:Dense.full",
        "return self.key_mask is None",
        "return True",
        (sdpa("dense"),),
        ("equals_dense",),
    ),
    Mutant(
        "prefix_hidden_from_image",
        "Image tokens do not see the prefix tokens.",
        "attnkit.layouts.base:framed",
        "inner.new_ones((*inner.shape[:-1], global_keys))",
        "inner.new_zeros((*inner.shape[:-1], global_keys))",
        (Window(2, 2),),
        ("equals_dense",),
    ),
    Mutant(
        "repeated_keys_count_twice",
        "A key listed twice counts twice in the softmax.",
        "attnkit.layouts.token_sets:without_repeats",
        "torch.where(repeated | (index < known), -1, index)",
        "torch.where(index < known, -1, index)",
        (gather("token_sets", "blocks"),),
        ("equals_dense",),
    ),
    Mutant(
        "listed_prefix_counts_twice",
        "A prefix token that is also listed counts twice in the softmax.",
        "attnkit.layouts.token_sets:without_repeats",
        "repeated | (index < known)",
        "repeated",
        (gather("token_sets"),),
        ("equals_dense",),
    ),
    Mutant(
        "stride_shifts_the_grid",
        "Queries of a strided stencil lie half a stride further on.",
        "attnkit.layouts.stencil:Stencil.axis_taps",
        "device=device) * self.strides[axis]",
        "device=device) * self.strides[axis] + self.strides[axis] // 2",
        (LearnedQuery(2, 3, stride=2),),
        ("equals_dense",),
    ),
    Mutant(
        "clamped_on_one_side",
        "Neighborhoods move inside at the near border only.",
        "attnkit.layouts.stencil:Stencil.axis_taps",
        "torch.minimum(inner - kernel // 2, length - kernel)",
        "(inner - kernel // 2)",
        (Neighborhood(2, 3),),
        ("equals_dense",),
    ),
    Mutant(
        "dilated_length",
        "The tokens of one remainder are counted as if the dilation divided the grid.",
        "attnkit.layouts.stencil:Stencil.axis_taps",
        "(size - remainder + step - 1) // step",
        "size // step + 0 * remainder",
        (Neighborhood(2, 3, dilation=2),),
        ("equals_dense",),
    ),
    Mutant(
        "cache_forgets_the_border",
        "A stencil takes the table of another border from the cache.",
        "attnkit.layouts.stencil:Stencil.taps",
        "self.dilation, self.border, device_key(device)",
        "self.dilation, device_key(device)",
        (gather("stencil"),),
        ("seeds_only",),
    ),
]
