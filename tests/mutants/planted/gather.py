"""Mistakes in the gather backend."""

from __future__ import annotations

from attnkit import TopKRegion, Window
from tests.mutants.mutant import Mutant, gather

BLOCKS = "attnkit.kernels.gather:_blocks"
LISTS = "attnkit.kernels.gather:_lists"

MUTANTS = [
    Mutant(
        "prefix_keys_forgotten",
        "Blocks do not fetch the prefix tokens as keys.",
        BLOCKS,
        "keys = torch.cat([shared, keys], dim=3)",
        "keys = keys[..., :]",
        (gather("blocks"), Window(2, 2)),
        ("equals_dense",),
    ),
    Mutant(
        "padding_in_the_softmax",
        "Slots without a token enter the softmax as keys of zero.",
        BLOCKS,
        "valid = keys >= 0",
        "valid = keys >= -1",
        (gather("blocks"),),
        ("equals_dense",),
    ),
    Mutant(
        "blocks_forget_the_mask",
        "Blocks fetch masked keys, as zeros, into the softmax.",
        BLOCKS,
        "valid = valid & mask.expand(*shape, -1).gather(2, spots).view(*shape, *keys.shape[2:])",
        "valid = valid & torch.ones_like(mask.expand(*shape, -1).gather(2, spots).view(*shape, *keys.shape[2:]))",
        (gather("blocks"),),
        ("equals_dense",),
        60,
    ),
    Mutant(
        "lse_in_block_order",
        "The lse comes back in the order of the blocks instead of the tokens'.",
        BLOCKS,
        "_fetch(lse.flatten(2)[..., None], order.slot)[..., 0]",
        "lse.flatten(2)[..., : order.slot.shape[-1]]",
        (gather("blocks"),),
        ("equals_dense",),
        60,
    ),
    Mutant(
        "lists_forget_the_mask",
        "Listed keys that are masked stay in the softmax as zeros.",
        LISTS,
        "valid = valid & mask.expand(*shape, -1).gather(2, spots).view(*shape, *index.shape[2:])",
        "valid = valid & torch.ones_like(mask.expand(*shape, -1).gather(2, spots).view(*shape, *index.shape[2:]))",
        (gather("token_sets"),),
        ("equals_dense",),
    ),
    Mutant(
        "bias_of_other_queries",
        "Listed queries take the bias from the first row on, though prefix tokens stand before them.",
        LISTS,
        "torch.arange(first, layout.num_queries, device=index.device)",
        "torch.arange(0, layout.num_queries - first, device=index.device)",
        (gather("token_sets"),),
        ("equals_dense",),
        60,
    ),
    Mutant(
        "index_of_another_head",
        "All heads fetch what the first head's index lists.",
        "attnkit.kernels.gather:_fetch",
        "token.flatten(2).expand(batch, heads, -1)",
        "token.flatten(2)[:, :1].expand(batch, heads, -1)",
        (gather("token_sets", "blocks"), TopKRegion(2, 2, 1, routing="per_head")),
        ("equals_dense",),
        80,
    ),
    Mutant(
        "index_of_another_item",
        "All items fetch from the first one.",
        "attnkit.kernels.gather:_fetch",
        "torch.arange(batch, device=rows.device).view(-1, 1) * count",
        "torch.zeros(batch, 1, dtype=torch.int64, device=rows.device)",
        (gather("blocks"), TopKRegion(2, 2, 1)),
        ("equals_dense",),
        120,
    ),
    Mutant(
        "prefix_rows_see_masked_keys",
        "Prefix queries see masked keys.",
        "attnkit.kernels.softmax:global_rows",
        "mask = None if call.layout.key_mask is None else call.layout.key_mask[:, :, None]",
        "mask = None",
        (gather("blocks", "stencil"),),
        ("equals_dense",),
    ),
    Mutant(
        "nan_behind_the_mask",
        "Fetched values that are masked reach the output as zero times NaN.",
        "attnkit.kernels.softmax:visible_values",
        "call.v.where(mask[..., None], 0.0)",
        "call.v",
        (gather("blocks", "stencil"),),
        ("empty_rows",),
    ),
    Mutant(
        "gradients_added_up_in_half_precision",
        "Gradients of what many queries read are added up in half precision.",
        "attnkit.kernels.gather:_Select.backward",
        "torch.float32, device=grad.device)\n    return total.index_add(ctx.dim, ctx.saved_tensors[0], grad.float())",
        "grad.dtype, device=grad.device)\n    return total.index_add(ctx.dim, ctx.saved_tensors[0], grad)",
        (gather("blocks"),),
        ("equals_dense",),
        200,
    ),
]
