"""FlexAttention on routed regions, with the mask of tiles written down from the table of regions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from attnkit_models.bench.case import Contender, refused

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Tokens of a tile, as FlexAttention has them unless told otherwise.
TILE = 128
# Its kernels' own tiles, where those of the mask are of 64 tokens.
SMALL = {f"BLOCK_{one}": 64 for one in ("M", "N", "M1", "N1", "M2", "N2")}


@functools.cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_regions(
    leaves: tuple[Tensor, Tensor, Tensor], index: Tensor, sizes: tuple[int, int], regions: int
) -> Contender:
    """FlexAttention on tokens that are brought into the order of regions, so that whole tiles can be left out.

    Where regions hold 64 tokens, a GPU gets tiles of 64 too, which leave out more: the faster of both counts.
    """
    q = leaves[0]
    count = q.shape[2]
    tokens = count // regions**2
    on_cpu = q.device.type == "cpu"
    if count % TILE or (tokens % TILE and TILE % tokens):
        return refused(f"FlexAttention needs tiles of {TILE} tokens, into which {count} tokens in regions do not go")
    routed = torch.zeros(index.shape[0], regions**2, regions**2, dtype=torch.bool, device=q.device)
    routed.scatter_(2, index, True)
    cut = {"y": regions, "x": regions, "h": sizes[0] // regions, "w": sizes[1] // regions}

    def on(mask: BlockMask, options: Mapping[str, int] | None) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            parts = [rearrange(one, "b m (y h x w) d -> b m (y x h w) d", **cut).contiguous() for one in leaves]
            if on_cpu:
                parts = [one.detach() for one in parts]
            out = _flex()(*parts, block_mask=mask, kernel_options=options)
            return rearrange(out, "b m (y x h w) d -> b m (y h x w) d", **cut)

        return forward

    forward = on(tiles(routed, tokens, TILE), None)
    variants = {}
    if tokens == TILE // 2 and not on_cpu:
        variants = {f"tiles of {TILE}": forward, f"tiles of {tokens}": on(tiles(routed, tokens, tokens), SMALL)}
    return Contender(forward, leaves, trains=not on_cpu, variants=variants, compiles=True)


def flex_neighborhoods(leaves: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, int], kernel: int) -> Contender:
    """FlexAttention on a map in row-major order, under windows that are moved inside at the border."""
    from torch.nn.attention.flex_attention import create_block_mask

    q = leaves[0]
    (height, width), on_cpu = sizes, q.device.type == "cpu"

    def near(query: Tensor, key: Tensor, length: int) -> Tensor:
        start = (query - kernel // 2).clamp(0, length - kernel)
        return (key >= start) & (key < start + kernel)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return near(query // width, key // width, height) & near(query % width, key % width, width)

    count = height * width
    mask = create_block_mask(visible, None, None, count, count, device=str(q.device), BLOCK_SIZE=TILE)

    def forward() -> Tensor:
        return _flex()(*((one.detach() for one in leaves) if on_cpu else leaves), block_mask=mask)

    return Contender(forward, leaves, trains=not on_cpu, compiles=True)


def tiles(routed: Tensor, tokens: int, tile: int) -> BlockMask:
    """The mask of tiles without the mask of all pairs.

    Args:
        routed: which regions a region sees, bool (B, R, R).
        tokens: of a region; regions lie one behind the other.
        tile: tokens of a tile, a multiple of `tokens` or a divisor, and of R * tokens a divisor.
    """
    from torch.nn.attention.flex_attention import BlockMask

    held = max(tile // tokens, 1)
    pairs = routed.unflatten(2, (-1, held)).unflatten(1, (-1, held)).transpose(2, 3).flatten(3)
    some, every = pairs.any(-1), pairs.all(-1)
    if tokens > tile:
        times = tokens // tile
        some, every = (one.repeat_interleave(times, 1).repeat_interleave(times, 2) for one in (some, every))
    length = routed.shape[1] * tokens

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return routed[batch, query // tokens, key // tokens]

    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=tile, mask_mod=visible, seq_lengths=(length, length)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool (B, Q, K) -> how many of a row are chosen, int32 (B, 1, Q), and their numbers first, int32 (B, 1, Q, K)."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()
